"""A session that is removed leaves nothing in the state dir: no file, and no byte of the database."""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from test_admin import Engine
from test_changes import ask
from typer.testing import CliRunner
from world import World, killed

from vllm_ttt.cli import app
from vllm_ttt.engine.storage import database, erase, records
from vllm_ttt.engine.storage.records import Row, Version
from vllm_ttt.engine.storage.turns import Turns
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

#: No other name is like it.
NAME = "alice-of-the-second-floor"


def found(folder: Path, *texts: str) -> list[str]:
    """Files below ``folder`` that have one of the texts in their bytes or in their name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(f) for f in files for text in texts if text.encode() in f.read_bytes() or text in str(f)]


def churn(folder: StateDir, rng: random.Random, steps: int) -> tuple[int, int]:
    """Sessions come, are saved and go, with states of all sizes. Returns how many went, and of how many SQLite left bytes."""
    folder.create()
    db = database.connect(folder.database)
    database.create(db, {})
    live: dict[str, tuple[str, int]] = {}
    #: of each session: all losses that its states have had
    losses: dict[str, list[str]] = {}
    gone, left = 0, 0
    for i in range(steps):
        act = rng.random()
        uid = rng.choice(list(live)) if live and act > 0.6 else f"{rng.getrandbits(128):032x}"
        name, version = live.get(uid, (f"name{rng.randrange(10**12):012d}", 0))
        db.execute("BEGIN IMMEDIATE")
        if act < 0.85 or uid not in live:
            live[uid] = name, version + 1
            state = {"version": version + 1, "losses": [{"x": rng.random()} for _ in range(rng.choice([0, 3, 30, 300]))]}
            losses.setdefault(uid, []).extend(str(loss["x"]) for loss in state["losses"])
            file = f"sessions/{uid[:2]}/{uid}-{rng.getrandbits(32):08x}.safetensors"
            saved = Version(version + 1, file, 10, f"{rng.getrandbits(256):064x}", 0.5, state)
            records.put(db, Row(uid, SessionKey("-", name), 1.5 * i + 0.25, 1.5 * i + 0.25, state, saved), keep=3)
            db.execute("COMMIT")
            continue
        del live[uid]
        records.remove(db, uid)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        gone, left = gone + 1, left + bool(found(folder.root, uid, name))
        assert erase.wipe(db, folder, uid, name)
        assert found(folder.root, uid, name) == []
        data = folder.database.read_bytes()
        assert not any(loss.encode() in data for loss in losses.pop(uid)), "nor what any of its states said"
    assert len(records.listing(db, None)) == len(live)
    db.close()
    return gone, left


def test_no_byte_of_a_removed_row_is_left(tmp_path: Path) -> None:
    runs = [churn(StateDir(tmp_path / str(seed)), random.Random(seed), 100) for seed in (9, 13, 25)]
    assert sum(gone for gone, _ in runs) > 20
    assert sum(left for _, left in runs) > 0, "SQLite alone leaves nothing: the test would prove nothing"


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_deleted_session_leaves_nothing_and_the_receipt_says_what_there_was(tmp_path: Path, where: str) -> None:
    state = tmp_path / "state"
    world = World(state, limit=2)
    engine = Engine(world)
    for value in (1.0, 2.0, 4.0):
        world.use(NAME, value)
        world.save(NAME)
    forked = engine.ask("fork", NAME, "copy")
    world.save("copy")
    session = world.ledger.peek(SessionKey("-", NAME))
    assert session is not None
    uid, versions = session.uid, world.store.versions(session.uid)
    (state / "damaged" / f"{uid}-00000000.safetensors").write_bytes(b"set aside")
    if where == "memory":
        world.use(NAME, 8.0)  # it is not saved yet
    else:
        world.use("another", 32.0)
        world.save("another")
        world.use("third", 64.0)
        assert SessionKey("-", NAME) not in world.ledger.sessions
    assert found(state, NAME)
    receipt = engine.ask("delete", NAME)
    world.run()  # another session may be saved meanwhile, since memory is nearly full: its file takes its name
    assert receipt["version"] == (4 if where == "memory" else 3)
    assert receipt["tokens_learned"] == 16 * receipt["version"]
    assert [file["version"] for file in receipt["files"]] == versions == [1, 2, 3]
    assert receipt["bytes"] == sum(file["bytes"] for file in receipt["files"]) > 0
    assert (receipt["files_left"], receipt["database_wiped"]) == ([], True)
    digests = [file["digest"] for file in receipt["files"]]
    assert len({*digests, receipt["digest"]}) == (4 if where == "memory" else 3), "the digest is of what it was at the end"
    shas = [file["sha256"] for file in receipt["files"]]
    assert found(state, uid, NAME, *shas, *digests[:2]) == []
    copy = world.ledger.peek(SessionKey("-", "copy"))
    assert copy is not None
    assert copy.saved is not None
    assert copy.saved.state["digest"] == digests[2], "the fork is its own, and what the session was"
    assert (world.value("copy"), forked["version"]) == (7.0, 3)
    world.end()
    assert found(state, uid, NAME, *shas) == []


def test_what_never_learned_has_a_receipt_too(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    world.use(NAME)
    receipt = Engine(world).ask("delete", NAME)
    assert (receipt["version"], receipt["digest"], receipt["files"], receipt["database_wiped"]) == (0, None, [], True)
    world.end()


def test_a_reader_in_the_way_is_said(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    world.use(NAME, 1.0)
    world.save(NAME)
    reader = database.connect(world.store.folder.database, readonly=True)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM sessions").fetchone()
    assert Engine(world).ask("delete", NAME)["database_wiped"] is False
    assert found(tmp_path / "state", NAME)
    reader.close()
    world.use("another-session", 1.0)
    world.save("another-session")
    assert Engine(world).ask("delete", "another-session")["database_wiped"] is True
    assert found(tmp_path / "state", NAME) == [], "the next removal has done it"
    world.end()


@pytest.mark.parametrize("stop", ["a kill", "a reader in the way"])
def test_a_removal_that_was_cut_off_is_done_by_the_next_start(tmp_path: Path, stop: str) -> None:
    state = tmp_path / "state"

    def life() -> None:
        world = World(state)
        world.use(NAME, 1.0)
        world.save(NAME)
        session = world.ledger.peek(SessionKey("-", NAME))
        assert session is not None
        (state / "damaged" / f"{session.uid}-00000000.safetensors").write_bytes(NAME.encode())
        if stop == "a kill":
            erase.wipe = lambda *_: os._exit(0)
        else:
            reader = database.connect(world.store.folder.database, readonly=True)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sessions").fetchone()
            erase._PATIENCE = 1
        assert world.wait(world.tiers.owner.remove(session))["database_wiped"] is False
        world.crash()

    killed(life)
    if stop == "a kill":
        assert found(state, NAME)
    world = World(state)
    world.use("another-session", 1.0)
    world.save("another-session")
    world.run()
    assert found(state, NAME) == []
    assert erase.owed(world.store.reader) == []
    world.end()
    assert [session["session_id"] for session in Offline(state).list()] == ["another-session"]


def test_the_command_gives_a_receipt(tmp_path: Path) -> None:
    import json

    world = World(tmp_path / "state")
    world.use(NAME, 1.0)
    digest = world.save(NAME).state["digest"]
    world.end()
    result = CliRunner().invoke(app, ["sessions", "rm", str(tmp_path / "state"), NAME, "--json"])
    receipt = json.loads(result.stdout)
    assert (receipt["digest"], receipt["version"], receipt["database_wiped"]) == (digest, 1, True)
    assert found(tmp_path / "state", NAME, digest) == []


def test_a_text_is_found_wherever_the_pieces_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with mmap.mmap(-1, 4096) as data:
        at = [0, 5, 6, 62, 64, 127, 190, 4096 - 3]
        for place in at:
            data[place : place + 3] = b"aaa" if place == 5 else b"abc"
        for piece in (64, 100, 4096, 2**20):
            monkeypatch.setattr(erase, "_PIECE", piece)
            assert list(erase.places(data, b"abc")) == [i for i in range(4094) if data[i : i + 3] == b"abc"]
            assert list(erase.places(data, b"aa")) == [i for i in range(4095) if data[i : i + 2] == b"aa"]
            assert not list(erase.places(data, b"abd"))


def test_other_threads_run_while_the_database_is_searched() -> None:
    """The engine's is one: it would decode nothing meanwhile. No thread is interrupted here that does not give way itself."""
    turns, end, before = 0, threading.Event(), sys.getswitchinterval()

    def others() -> None:
        nonlocal turns
        while not end.is_set():
            turns += 1
            time.sleep(1e-4)

    thread = threading.Thread(target=others)
    with mmap.mmap(-1, 2**26) as data:
        try:
            sys.setswitchinterval(60)
            thread.start()
            begun = turns
            assert not list(erase.places(data, b"0123456789abcdef"))
            assert turns > begun
        finally:
            end.set()
            sys.setswitchinterval(before)
            thread.join()


def test_a_save_waits_for_one_removal_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody removes all that he has: what others ask for is done in between, and his removals are done in the end."""
    world = World(tmp_path / "state", limit=20)
    engine = Engine(world)
    for i in range(12):
        world.use(f"s{i}", 1.0)
        world.save(f"s{i}")
    gate, begun, wipe = threading.Semaphore(0), threading.Event(), erase.wipe
    monkeypatch.setattr(erase, "wipe", lambda *args: (begun.set(), gate.acquire(), wipe(*args))[2])
    removals = [ask(engine, "delete", f"s{i}") for i in range(12)]
    world.run(begun.is_set)  # the first is under way, the others wait
    save = world.tiers.save(world.use("theirs", 1.0, tenant="b"))
    world.run(lambda: len(world.store.unwritten) > 12)
    gate.release()
    world.run(save.done)
    assert sum(removal.done() for removal in removals) <= 1
    gate.release(12)
    world.run(lambda: all(removal.done() for removal in removals))
    assert all(removal.result()["result"]["database_wiped"] for removal in removals)
    world.end()


def test_who_yields_has_its_turn_in_the_end() -> None:
    turns = Turns()
    for i in range(40):
        turns.put(("slow", i), yields=True)
        turns.put(("quick", i))
    turns.put(None)
    taken = list(iter(turns.get, None))
    assert len(taken) == 80
    for kind in ("slow", "quick"):
        assert [i for what, i in taken if what == kind] == list(range(40)), "each in its order"
    first = [what for what, _ in taken].index("slow")
    assert 0 < first <= 20
