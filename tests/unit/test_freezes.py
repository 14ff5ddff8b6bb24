"""A session that is frozen learns nothing more, and stays frozen whatever befalls the server."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from test_admin import Engine
from test_changes import A, Held, ask, engine, full, on_disk

from vllm_ttt.engine.storage import records
from vllm_ttt.sessions.offline import Offline

__all__ = ["engine", "full"]
pytestmark = pytest.mark.unit


@pytest.mark.parametrize("op", ["freeze", "unfreeze"])
def test_an_answered_freeze_outlives_a_kill(engine: Engine, tmp_path: Path, op: str) -> None:
    frozen = op == "freeze"
    if not frozen:
        engine.ask("freeze", "a")
    engine.world.use("a", 4.0)
    held = Held(engine.world)
    answer = ask(engine, op)
    for _ in range(5):
        engine.world.step()
    assert not answer.done(), "it is not on disk"
    assert engine.ask("get", "a")["frozen"] is not frozen
    held.release()
    engine.world.run(answer.done)
    assert answer.result()["result"]["frozen"] is frozen
    assert on_disk(engine, tmp_path) == {"a": 2}
    assert Offline(tmp_path / "killed").list()[0]["frozen"] is frozen


def test_a_freeze_that_cannot_be_written_has_not_happened(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(records, "put", fail)
    assert engine.ask("freeze", "a") == 507
    assert not engine.ask("get", "a")["frozen"]
    monkeypatch.undo()
    assert engine.ask("freeze", "a")["frozen"]


def test_what_the_guard_freezes_while_an_unfreeze_is_written_stays_frozen(engine: Engine, tmp_path: Path) -> None:
    world = engine.world
    session = world.use("a", 4.0)
    engine.ask("freeze", "a")
    held = Held(world)
    answer = ask(engine, "unfreeze")
    world.guard_stops(session, 3, back_to=0)
    world.tiers.save(session)
    held.release()
    world.run(answer.done)
    assert answer.result()["result"]["frozen_reason"].startswith("at version 3 its delta")
    world.run()
    assert on_disk(engine, tmp_path) == {"a": 0}
    assert Offline(tmp_path / "killed").list()[0]["frozen"]


def test_a_frozen_session_whose_file_is_damaged_stays_frozen(engine: Engine, tmp_path: Path) -> None:
    """It falls back to a version that was saved before it was frozen: at once, and after a kill."""
    world = engine.world
    session = world.use("a", 4.0)
    engine.ask("save", "a")
    engine.ask("freeze", "a")
    for name in "xyz":
        world.use(name, 1.0)
        world.save(name)
    assert session.key not in world.ledger.sessions
    newest = world.ledger.peek(A)
    assert newest is not None
    assert newest.saved is not None
    world.store.folder.path(newest.saved.file).write_bytes(b"damaged")
    assert world.value("a") == 3.0
    assert engine.ask("get", "a")["frozen"]
    assert on_disk(engine, tmp_path)["a"] == 2
    assert {s["session_id"] for s in Offline(tmp_path / "killed").list() if s["frozen"]} == {"a"}
