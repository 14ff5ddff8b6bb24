"""SIGKILL at random moments, with the real state dir, files and threads of a process; learning alone is a stand-in.

`tests/engine/test_survival.py` does the same to a whole server, fewer times, since each start takes a minute.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import signal
import sqlite3
import struct
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from test_audit import events
from test_vault import make_key
from world import World, killed

from vllm_ttt import audit_log
from vllm_ttt.engine.storage import database
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

KILLS = 30
NAMES = [f"s{i}" for i in range(12)]


def live(folder: Path, seed: int, pipe: int, key: str | None) -> NoReturn:
    """Learn, save, evict, roll back, delete; sometimes end, and begin anew. Never returns.

    A session's chunks have the values 1, 2, 4, ..., so that what it holds at version n is 2 ** n - 1.
    """

    def say(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    rng = random.Random(seed)
    settings = {"autosave": 0.1, "keep_versions": 2, "audit_log": "audit.jsonl", "key_file": key}
    world = World(folder, limit=4, rows=2, **settings)
    say("up")
    while True:
        name, act = rng.choice(NAMES), rng.random()
        session = world.use(name)
        if act < 0.5 and session.version < 20:  # float32 holds no more
            world.use(name, *(2.0 ** (session.version + i) for i in range(rng.randrange(1, 3))))
        elif act < 0.8:
            if (saved := world.save(name)) is not None:
                say(f"saved {session.uid} {saved.version}")
        elif act < 0.85 and session.saved is not None and session.version != session.saved.version:
            back = world.wait(world.go_back(session, session.saved.version))
            say(f"saved {back.uid} {back.version}")
        elif act < 0.9:
            say(f"removing {session.uid}")
            uid = session.uid
            world.wait(world.tiers.owner.remove(session))
            say(f"removed {uid}")
        elif act < 0.92:
            world.end()
            world = World(folder, limit=4, rows=2, **settings)


@pytest.mark.parametrize("sealed", [False, True])
def test_thirty_kills(tmp_path: Path, sealed: bool) -> None:
    folder, key = tmp_path / "state", make_key(tmp_path / "key") if sealed else None
    rng = random.Random(9)
    acknowledged: dict[str, int] = {}
    before: dict[str, int] = {}
    told: set[str] = set()
    leftovers = 0
    for cycle in range(KILLS):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            live(folder, cycle, write, key)
        os.close(write)
        with os.fdopen(read) as said:
            assert said.readline() == "up\n"
            time.sleep(rng.uniform(0.02, 0.8))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            removed = set()
            for line in said.read().splitlines():
                match line.split():
                    case ["saved", uid, version]:
                        acknowledged[uid] = int(version)
                    case ["removing", uid]:
                        removed.add(uid)
                        acknowledged.pop(uid, None)
                    case ["removed", uid]:
                        told.add(uid)
        report = Offline(folder, key_file=key).fsck()
        assert report["problems"] == [], f"after kill {cycle}"
        leftovers += len(report["leftovers"])
        world = World(folder, audit_log="audit.jsonl", key_file=key)
        rows = {row["session_id"]: row for row in Offline(folder, key_file=key).list()}
        found = {}
        for name, row in rows.items():
            assert world.value(name) == 2.0 ** row["version"] - 1, "the delta is not that of its version"
            session = world.ledger.peek(SessionKey("-", name))
            assert session is not None
            assert session.version == row["version"]
            assert session.tokens_learned == 16 * session.version
            found[session.uid] = session.version
        for uid, version in acknowledged.items():
            assert found.get(uid, -1) >= version, f"kill {cycle}: a save that was acknowledged is gone"
        assert all(uid in found or uid in removed or before[uid] == 0 for uid in before), "a session is gone"
        world.end()
        log = audit_log.verify(folder / "audit.jsonl")
        assert (log.problem, log.torn) == (None, 0), f"after kill {cycle}"
        assert told <= {e["uid"] for e in events(folder / "audit.jsonl") if e["event"] == "delete"}, (
            "an answer that is not told"
        )
        before = found
    assert acknowledged
    assert told
    assert sum(before.values()) > 20
    print(f"{KILLS} kills, {leftovers} leftovers of saves that were cut off, {len(before)} sessions")


#: x86_64, aarch64: fsync, fdatasync, seccomp
CALLS = {"x86_64": (74, 75, 317), "aarch64": (82, 83, 277)}


def no_sync(everywhere: bool) -> None:
    """From now on the kernel answers ENOSPC where this thread, or each, syncs a write-ahead log, as a file system does that
    allocates late. It never takes that back."""
    fsync, fdatasync, seccomp = CALLS[platform.machine()]
    logs = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if str(fd.resolve()).endswith("-wal")]
    assert logs
    load, equal, answer, refused, allowed = 0x20, 0x15, 0x06, 0x00050000 | errno.ENOSPC, 0x7FFF0000
    program = [(load, 0, 0, 0), (equal, 1, 0, fsync), (equal, 0, len(logs) + 1, fdatasync), (load, 0, 0, 16)]
    program += [(equal, len(logs) - i, 0, fd) for i, fd in enumerate(logs)]
    program += [(answer, 0, 0, allowed), (answer, 0, 0, refused)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.syscall(seccomp, 1, int(everywhere), head) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize("overwritten", [True, False])
@pytest.mark.parametrize("op", ["save", "rollback", "delete"])
def test_what_may_have_been_written_costs_nothing_and_is_said(tmp_path: Path, op: str, overwritten: bool) -> None:
    """The log of the database has it, and cannot be synced. SQLite goes on without it, and a restart would find it there:
    unless something else could be written over it, synced or not."""

    def life() -> None:
        world = World(tmp_path / "state", keep_versions=1 if op == "save" else 2)
        for value in (1.0, 2.0):
            session = world.use("a", value)
            world.save("a")
        if not overwritten:
            database._settled = lambda _: False
        no_sync(everywhere=True)
        if op == "save":
            world.use("a", 4.0)
            asked = world.tiers.save(session)
        else:
            asked = world.go_back(session, 1) if op == "rollback" else world.tiers.owner.remove(session)
        with pytest.raises(RequestError, match="a restart may find it written"):
            world.wait(asked)
        assert "stays as it was" not in str(asked.exception())
        assert world.value("a") == (7.0 if op == "save" else 3.0)

    killed(life)
    assert Offline(tmp_path / "state").fsck()["problems"] == []
    world = World(tmp_path / "state")
    assert world.value("a") == (3.0 if overwritten else {"save": 7.0, "rollback": 1.0, "delete": 0.0}[op])
    kept = len(list((tmp_path / "state" / "sessions").glob("*/*")))
    assert kept == (1 if op == "save" else 2 if overwritten else 1 if op == "rollback" else 0), "what is no more has no file"
    world.end()


@pytest.mark.parametrize("settled", [True, False])
def test_another_transaction_ends_the_doubt(tmp_path: Path, settled: bool) -> None:
    """Of some pages; the one that settles it has one."""
    World(tmp_path / "state").end()

    def life() -> None:
        db = database.connect(tmp_path / "state" / "sessions.db")
        database.name_audit_log(db, "a.jsonl")  # the log has a beginning
        failed: list[Exception] = []

        def write() -> None:
            no_sync(everywhere=False)
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO sessions VALUES ('u', '-', 'a', 1.0, 1.0, '{}', ?)", ("x" * 20_000,))
            try:
                db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                failed.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        assert failed
        assert db.execute("SELECT count(*) FROM sessions").fetchone() == (0,)
        if settled:
            assert database._settled(db)

    killed(life)
    names = [session["session_id"] for session in Offline(tmp_path / "state").list()]
    assert names == ([] if settled else ["a"])
