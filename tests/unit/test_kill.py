"""SIGKILL at random moments, with the real state dir, files and threads of a process; learning alone is a stand-in.

`tests/engine/test_survival.py` does the same to a whole server, fewer times, since each start takes a minute.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest
from test_audit import events
from test_vault import make_key
from world import World

from vllm_ttt import audit_log
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
