"""A session goes back to an earlier version, whatever else is under way; what is answered is on disk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from test_admin import Engine
from test_changes import Held, ask, engine, full, on_disk
from world import Unguarded

from vllm_ttt.config import SessionsConfig
from vllm_ttt.engine.ledger import Ledger, Open, Session
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.limits.quotas import Quotas
from vllm_ttt.engine.storage import records
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey, Trial
from vllm_ttt.worker.deltas import delta_file

__all__ = ["engine", "full"]
pytestmark = pytest.mark.unit


def test_a_rollback_to_a_version_that_is_being_dropped_costs_none(engine: Engine, tmp_path: Path) -> None:
    """The oldest of those that are kept, while a newer one waits to be recorded."""
    world = engine.world
    world.store.keep = 3
    for value in (4.0, 8.0):
        world.use("a", value)
        world.save("a")
    assert engine.ask("get", "a")["versions"] == [0, 2, 3, 4]
    session = world.use("a", 16.0)
    held = Held(world)
    save = world.tiers.save(session)
    while len(world.store.unwritten) < 2:
        world.step()
    rollback = ask(engine, "rollback", argument=2)
    held.release()
    world.run(rollback.done)
    assert rollback.result()["status"] == 409
    assert "no version 2; kept are: 0, 3, 4, 5" in rollback.result()["message"]
    assert world.wait(save).version == 5
    assert on_disk(engine, tmp_path) == {"a": 5}
    assert world.value("a") == 31.0
    assert engine.ask("rollback", "a", 3)["version"] == 3


@pytest.mark.parametrize("to", [0, 1, 2])
def test_a_save_beside_a_rollback_is_answered(engine: Engine, to: int) -> None:
    """In one turn of the engine's loop: to the base model, to a version in memory, to one on disk. Then it rests, and ends."""
    world = engine.world
    world.use("a", 4.0)
    save, rollback = ask(engine, "save"), ask(engine, "rollback", argument=to)
    world.run(lambda: save.done() and rollback.done())
    world.run()
    assert rollback.result()["result"]["version"] == to
    assert save.result()["result"]["version"] in (3, to)
    assert not world.tiers.busy
    world.tiers.close()
    world.run()


def test_a_save_is_answered_where_the_guard_rolls_back(engine: Engine) -> None:
    world = engine.world
    session = world.use("a", 4.0)
    save = ask(engine, "save")
    world.trainer.roll_back(session.adapter, 1)
    session.back_to(Trial(session.adapter, 3, 1.0, 1).back_to or 0)
    world.run(save.done)
    world.run()
    assert save.result()["result"]["saved_version"] == 1


def test_an_answered_rollback_outlives_a_kill(engine: Engine, tmp_path: Path) -> None:
    """Also where a save of a later version is under way when it is asked for."""
    world = engine.world
    world.use("a", 4.0)
    gate, write = threading.Event(), world.files._save
    world.files._save = lambda *args: (gate.wait(), write(*args))[1]
    save = ask(engine, "save")
    while not world.files.running:
        world.step()
    world.step()
    rollback = ask(engine, "rollback", argument=1)
    gate.set()
    world.run(rollback.done)
    answer = rollback.result()["result"]
    assert (answer["version"], answer["saved_version"]) == (1, 1)
    assert on_disk(engine, tmp_path) == {"a": 1}
    world.run(save.done)
    assert save.result()["ok"]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("damage", ["a byte", "gone", "unreadable"])
def test_a_rollback_to_a_file_that_cannot_be_read_costs_no_later_version(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, damage: str
) -> None:
    """It is read before the later ones go; and the session is what it was."""
    world = engine.world
    world.store.keep = 3
    session = world.use("a", 4.0)
    world.save("a")
    if where == "disk":
        for name in "bcd":
            world.use(name, 1.0)
            world.save(name)
    recorded = {v.version: v.file for v in records.versions(world.store.reader, session.uid)}
    file = world.store.folder.path(recorded[2])
    if damage == "a byte":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
    with monkeypatch.context() as patch:
        if damage == "unreadable":
            patch.setattr(delta_file, "read", mock.Mock(side_effect=OSError(5, "Input/output error")))
        world.trainer.versions.drop(session.adapter)
        rollback = ask(engine, "rollback", argument=2)
        world.run(rollback.done)
    assert rollback.result()["status"] == 507
    assert "stays as it was: version 2 could not be read: " in rollback.result()["message"]
    assert [s["version"] for s in Offline(tmp_path / "state").list() if s["session_id"] == "a"] == [3]
    assert world.value("a") == 7.0
    if damage == "unreadable":
        assert engine.ask("rollback", "a", 2)["version"] == 2, "it can be read again"
        assert world.value("a") == 3.0


def test_the_guard_rolls_back_between_a_snapshot_and_its_report(engine: Engine, tmp_path: Path) -> None:
    """What the snapshot holds is then not what the ledger says: it does not become a version."""
    world = engine.world
    session = world.use("a", 4.0)
    save = world.tiers.save(session)
    orders = world.tiers.take_orders()
    world.trainer.roll_back(session.adapter, 1)
    world.files.step(orders)
    world.step()  # the ledger does not know yet
    session.back_to(1)
    assert world.wait(save).version == 1
    world.run()
    assert on_disk(engine, tmp_path) == {"a": 1}


def test_a_rollback_that_cannot_be_written_has_not_happened(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a version that the worker has and the state dir has not: the answer and the session agree, in memory and on disk."""
    world = engine.world
    world.use("a", 4.0, 8.0)
    real = records.put
    for attribute, failing in (("put", records), ("encode", delta_file)):

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(failing, attribute, fail)
        assert engine.ask("rollback", "a", 3) == 507
        monkeypatch.undo()
        shown = engine.ask("get", "a")
        assert (shown["version"], shown["saved_version"], shown["versions"]) == (4, 2, [0, 2, 3, 4])
        assert on_disk(engine, tmp_path) == {"a": 2}
    assert records.put is real
    assert world.value("a") == 15.0
    assert engine.ask("rollback", "a", 3)["saved_version"] == 3
    assert on_disk(engine, tmp_path) == {"a": 3}
    assert world.value("a") == 7.0


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_request_that_comes_while_a_rollback_is_written_meets_that_version(engine: Engine, version: int) -> None:
    """It begins when the rollback is answered, and not before: the answer says what was asked for."""
    world = engine.world
    session = world.use("a", 4.0, 8.0)
    held = Held(world)
    rollback = ask(engine, "rollback", argument=version)
    session.requests.add("r")
    for _ in range(5):
        world.step()
        assert not world.tiers.ready(session)
    held.release()
    world.run(lambda: world.tiers.ready(session))
    answer = rollback.result()["result"]
    assert (answer["version"], answer["saved_version"]) == (version, version)
    world.trainer.learn(session.adapter, 16.0)
    world.step()
    session.requests.clear()
    world.tiers.left(session)
    assert (session.version, world.value("a")) == (version + 1, sum((1.0, 2.0, 4.0)[:version]) + 16.0)


def test_the_guard_returns_a_session_further_while_its_rollback_is_written(engine: Engine, tmp_path: Path) -> None:
    """What was asked for and is answered is what it is, and it is frozen all the same."""
    world = engine.world
    session = world.use("a", 4.0, 8.0)
    gate, write = threading.Event(), world.files._save
    world.files._save = lambda *args: (gate.wait(), write(*args))[1]
    rollback = ask(engine, "rollback", argument=3)
    world.run(lambda: bool(world.files.running))
    world.guard_stops(session, 4, back_to=2)
    world.tiers.save(session)
    gate.set()
    world.run(rollback.done)
    answer = rollback.result()["result"]
    assert (answer["version"], answer["saved_version"]) == (3, 3)
    world.run()
    assert on_disk(engine, tmp_path) == {"a": 3}
    assert Offline(tmp_path / "killed").list()[0]["frozen"]
    assert world.value("a") == 7.0


def test_what_a_rollback_that_fails_leaves_is_saved_all_the_same(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of saves was due for the session, whose turn the rollback took. Else it would keep its place for ever."""
    world = engine.world
    session = world.use("a", 4.0, 8.0)
    rollback = ask(engine, "rollback", argument=3)
    world.saves.next_round = 0.0
    with monkeypatch.context() as full:
        full.setattr(delta_file, "encode", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        world.run(rollback.done)
        assert rollback.result()["status"] == 507
        world.run()
    world.saves.next_round = 0.0
    world.run()
    assert (session.unsaved, world.store.full) == (False, "")
    assert on_disk(engine, tmp_path) == {"a": 4}


def test_a_version_that_is_given_up_while_a_rollback_waits_is_a_conflict(engine: Engine, tmp_path: Path) -> None:
    """As if it had not been kept when it was asked for: nothing is wrong with the disk. It is what the guard made of it."""
    world = engine.world
    session = world.use("a", 4.0, 8.0)
    rollback = ask(engine, "rollback", argument=3)
    world.run(lambda: "a" in {key.name for key in world.saves.due})  # it was found to be kept
    world.guard_stops(session, 4, back_to=2)
    world.run(rollback.done)
    refused = rollback.result()
    assert (refused["status"], world.store.full) == (409, "")
    assert "version 3" in refused["message"]
    world.run()
    shown = engine.ask("get", "a")
    assert (shown["version"], shown["frozen"], shown["error"]) == (2, True, None)
    assert world.value("a") == 3.0
    assert on_disk(engine, tmp_path) == {"a": 2}


def test_a_rollback_that_the_worker_cannot_do_is_done_from_the_file(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on disk by then: the call is a 500, and the session is what the state dir says, in no state between two."""
    world, worker = engine.world, engine.world.worker
    session = world.use("a", 4.0, 8.0)

    def fail(method: str, *args: Any) -> Any:
        if method == "ttt_roll_back":
            raise RuntimeError("CUDA error")
        return worker(method, *args)

    monkeypatch.setattr(world, "worker", fail)
    monkeypatch.setattr(world.tiers.guard, "failed", lambda _: None)
    assert engine.ask("rollback", "a", 3) == 500
    monkeypatch.undo()
    assert session.life.state is not State.CHANGING_IN_MEMORY
    assert world.value("a") == 7.0
    assert engine.ask("get", "a")["version"] == 3


def test_a_rollback_that_comes_after_the_guards_is_a_conflict() -> None:
    """Without a state dir, where the worker has no file to do it from: nothing has happened, and that is what is said."""
    ledger = Ledger(10, 4, Quotas(10**9, 10), 8)
    tiers = Tiers(ledger, SessionsConfig(), None, mock.Mock(), guard=Unguarded())
    session = ledger.open(SessionKey("-", "a"))
    session.version = 3
    kept = {"ttt_session": {"versions": [1, 2]}, "ttt_roll_back": [1]}
    answer = tiers.owner.go_back(session, 2, lambda method, *_: kept[method])
    with pytest.raises(RequestError, match="try again") as refused:
        answer.result(0)
    assert refused.value.status == 409
    assert session.version == 3


def test_all_that_was_sent_is_learned_skipped_or_waits() -> None:
    """Wherever the session returns to, and of what a kill leaves of it, too."""
    session = Session(SessionKey("-", "s"), 1, 4)
    session.tokens_learned, session.tokens_skipped["short"] = 20, 4
    session.open["r"], session.tokens_seen = Open(1, sent=6), 30
    state = session.to_state()
    assert state["tokens_seen"] == 24
    session.requests.add("r")
    for returned_to, seen in ((state, 30), ({}, 6)):
        session.become(returned_to, None)
        assert session.tokens_seen == seen
    session.requests.clear()
    session.become(state, None)
    assert session.tokens_seen == 24
