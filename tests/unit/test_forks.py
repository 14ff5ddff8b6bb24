"""A fork is what its source is, whoever asks for either meanwhile."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from test_admin import Engine
from test_changes import Held, ask, on_disk
from world import World

from vllm_ttt.engine.storage import records
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


def test_a_fork_is_what_its_source_is_whoever_asks_for_it_meanwhile(tmp_path: Path) -> None:
    world = World(tmp_path / "state", limit=2)
    engine = Engine(world)
    for name, values in (("a", (10.0, 20.0)), ("x", (1.0,)), ("y", (1.0,))):
        world.use(name, *values)
        world.save(name)
    assert engine.ask("get", "a")["tier"] == "disk"
    gate, load = threading.Event(), world.files._load
    world.files._load = lambda *args: (gate.wait(), load(*args))[1]
    fork = ask(engine, "fork", argument="new")
    world.step()
    target = world.ledger.open(SessionKey("-", "new"))
    target.requests.add("r")
    for _ in range(3):
        world.step()
        assert not world.tiers.ready(target), "it is not what its source is yet"
    gate.set()
    world.run(lambda: world.tiers.ready(target))
    assert fork.result()["result"]["version"] == 2
    world.trainer.learn(target.adapter, 5.0)
    world.step()
    target.requests.clear()
    world.tiers.left(target)
    assert world.value("new") == 35.0
    world.end()


def test_a_fork_that_fails_leaves_a_fresh_session_to_who_asked_for_it(tmp_path: Path) -> None:
    world = World(tmp_path / "state", limit=2)
    engine = Engine(world)
    for name in ("a", "x", "y"):
        world.use(name, 1.0)
        world.save(name)
    gate, load = threading.Event(), world.files._load

    def fail(*_: object) -> None:
        gate.wait()
        raise OSError(5, "Input/output error")

    world.files._load = fail
    fork = ask(engine, "fork", argument="new")
    world.step()
    target = world.ledger.open(SessionKey("-", "new"))
    target.requests.add("r")
    gate.set()
    world.run(fork.done)
    assert fork.result()["status"] == 507
    world.files._load = load
    world.run(lambda: world.tiers.ready(target))
    target.requests.clear()
    world.tiers.left(target)
    assert world.value("new") == 0.0
    world.end()


def test_an_answered_fork_outlives_a_kill(tmp_path: Path) -> None:
    """It is what its source was when the copy was made, saved or not; and it is answered when the state dir has it."""
    engine = Engine(World(tmp_path / "state"))
    world = engine.world
    world.use("a", 10.0, 20.0)
    engine.ask("freeze", "a")
    held = Held(world)
    fork = ask(engine, "fork", argument="b")
    for _ in range(5):
        world.step()
    assert not fork.done()
    assert on_disk(engine, tmp_path) == {"a": 0}
    target = world.ledger.open(SessionKey("-", "b"))
    target.requests.add("r")
    assert not world.tiers.ready(target), "what it is to meet is not on disk"
    held.release()
    world.run(fork.done)
    assert world.tiers.ready(target)
    answer = fork.result()["result"]
    assert (answer["version"], answer["saved_version"], answer["frozen"]) == (2, 2, True)
    assert on_disk(engine, tmp_path) == {"a": 0, "b": 2}
    target.requests.clear()
    world.crash()
    after = World(tmp_path / "state")
    assert after.value("b") == 30.0
    assert after.use("b").frozen
    after.end()


def test_a_fork_that_cannot_be_written_has_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(World(tmp_path / "state"))
    world = engine.world
    world.use("a", 10.0)
    real = records.put

    def fail(db: sqlite3.Connection, row: records.Row, keep: int) -> list[str]:
        if row.key.name == "b":
            raise sqlite3.OperationalError("database or disk is full")
        return real(db, row, keep)

    monkeypatch.setattr(records, "put", fail)
    assert engine.ask("fork", "a", "b") == 507
    assert engine.ask("get", "b") == 404
    assert world.ledger.quotas.of("-") == 1, "it takes no place of its key"
    assert world.tiers.placed == 1
    monkeypatch.undo()
    assert engine.ask("fork", "a", "b")["version"] == 1
    assert world.value("b") == 10.0
    world.end()


def test_a_fork_and_a_save_of_it_do_not_escape_the_guard(tmp_path: Path) -> None:
    """What no trial has seen counts in the copy too, and so does the last version that was good."""
    world = World(tmp_path / "state", limit=8, rows=4)
    engine = Engine(world)
    session = world.use("a", *[1.0] * 15)
    world.trainer.versions.add_good(session.adapter, 3, world.trainer.versions.kept[session.adapter][15])
    assert engine.ask("fork", "a", "b")["version"] == 15
    copied = world.use("b")
    assert world.trainer.guard.untried(copied.adapter) == 15
    assert world.trainer.versions.last_good(copied.adapter) == 3
    assert engine.ask("fork", "b", "c")["version"] == 15
    world.save("c")
    world.crash()

    after = World(tmp_path / "state", limit=8, rows=4)
    again = after.use("c")
    assert after.trainer.guard.untried(again.adapter) == 15
    after.end()


def test_a_version_that_is_saved_to_return_to_it_does_not_escape_the_guard(tmp_path: Path) -> None:
    """Of what no trial has seen, what had been committed by then counts in its file too."""
    world = World(tmp_path / "state", limit=8, rows=4)
    world.use("a", *[1.0] * 15)
    assert Engine(world).ask("rollback", "a", 14)["saved_version"] == 14
    world.crash()
    after = World(tmp_path / "state", limit=8, rows=4)
    session = after.use("a")
    assert after.trainer.guard.untried(session.adapter) == 14
    assert after.value("a") == 14.0
    after.end()
