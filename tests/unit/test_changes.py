"""What an owner asks for is on disk when it is answered, or has not happened; and calls that meet do each other no harm."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from test_admin import Engine, one_session
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.storage import records
from vllm_ttt.engine.storage.store import Change
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

A = SessionKey("-", "a")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with one_session(tmp_path / "state") as engine:
        yield engine


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As a disk that is full: what the database is asked to remove cannot be. Returns what makes room again."""

    def fail(*_: object) -> list[str]:
        raise sqlite3.OperationalError("database or disk is full")

    real = records.remove, records.back_to
    monkeypatch.setattr(records, "remove", fail)
    monkeypatch.setattr(records, "back_to", fail)

    def make_room() -> None:
        monkeypatch.setattr(records, "remove", real[0])
        monkeypatch.setattr(records, "back_to", real[1])

    return make_room


class Held:
    """The store's thread is busy until `release`."""

    def __init__(self, world: World):
        self.gate = threading.Event()
        world.store.write(lambda db: (self.gate.wait(), Change())[1])

    def release(self) -> None:
        self.gate.set()


def ask(engine: Engine, op: str, name: str = "a", argument: Any = None) -> Future:
    answer = admin(engine, op, "-", name, argument)
    assert isinstance(answer, Future)
    return answer


def image(root: Path, target: Path) -> None:
    """Copy a folder as it was at one moment, as a kill leaves it, also while another thread writes there."""
    for _ in range(1000):
        shutil.rmtree(target, ignore_errors=True)
        before = listing(root)
        with contextlib.suppress(FileNotFoundError, shutil.Error):  # a file went meanwhile
            shutil.copytree(root, target)
            if listing(root) == before:
                return
        time.sleep(0.01)
    raise AssertionError(f"{root} did not stand still for as long as a copy takes")


def listing(root: Path) -> dict[Path, tuple[int, int]]:
    """File -> bytes, and when it was last written."""
    found = {}
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def on_disk(engine: Engine, tmp_path: Path) -> dict[str, int]:
    """What a server would find that is started after a kill at this moment: session id -> version."""
    image(engine.world.store.folder.root, tmp_path / "killed")
    found = {s["session_id"]: s["version"] for s in Offline(tmp_path / "killed").list()}
    assert Offline(tmp_path / "killed").fsck()["problems"] == []
    return found


@pytest.mark.parametrize(("op", "argument"), [("delete", None), ("reset", None), ("rollback", 2)])
def test_what_cannot_be_written_has_not_happened(
    engine: Engine, full: Callable[[], None], tmp_path: Path, op: str, argument: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world = engine.world
    world.use("a", 4.0)  # version 3, which is in memory alone
    answer = ask(engine, op, argument=argument)
    world.run(answer.done)
    refused = answer.result()
    assert (refused["ok"], refused["status"]) == (False, 507)
    assert "stays as it was" in refused["message"]
    assert "disk is full" in refused["message"]
    assert "disk is full" in caplog.text
    full()
    assert engine.ask("get", "a")["version"] == 3
    assert world.value("a") == 7.0
    assert on_disk(engine, tmp_path) == {"a": 2}
    world.use("b", 1.0)  # nobody else is refused
    assert engine.ask("save", "a")["saved_version"] == 3
    assert engine.ask(op, "a", argument) != 507


def test_an_answered_delete_outlives_a_kill(engine: Engine, tmp_path: Path) -> None:
    held = Held(engine.world)
    answer = ask(engine, "delete")
    for _ in range(5):
        engine.world.step()
    assert not answer.done(), "it is not on disk"
    assert on_disk(engine, tmp_path) == {"a": 2}
    held.release()
    engine.world.run(answer.done)
    assert on_disk(engine, tmp_path) == {}
    assert list(engine.world.store.folder.sessions.rglob("*.safetensors")) == []
    assert engine.ask("get", "a") == 404


def test_a_receipt_is_of_what_was_removed(engine: Engine) -> None:
    """Its version and its digest are of one moment, although what it was sent is still being learned when it is deleted."""
    world = engine.world
    session = world.use("a", 4.0)
    world.trainer.flying.add(session.adapter)
    answer = ask(engine, "delete")
    world.run(lambda: world.files.waiting)  # until it has been removed from the state dir
    world.trainer.learn(session.adapter, 8.0)
    world.trainer.flying.clear()
    world.run(answer.done)
    assert session.version == 4
    receipt = answer.result()["result"]
    assert (receipt["version"], receipt["tokens_learned"]) == (4, 4 * 16)


def test_an_answered_reset_outlives_a_kill(engine: Engine, tmp_path: Path) -> None:
    engine.ask("freeze", "a")
    created = engine.ask("get", "a")["created"]
    answer = ask(engine, "reset")
    engine.world.run(answer.done)
    assert on_disk(engine, tmp_path) == {"a": 0}
    (row,) = Offline(tmp_path / "killed").list()
    assert row["created"] == created
    assert row["frozen"]
    assert engine.world.value("a") == 0.0


def test_a_save_that_is_under_way_does_not_bring_a_deleted_session_back(engine: Engine, tmp_path: Path) -> None:
    """Its file is written before the row is removed, or after."""
    world = engine.world
    session = world.use("a", 4.0)
    gate, write = threading.Event(), world.files._save
    world.files._save = lambda *args: (gate.wait(), write(*args))[1]
    save = ask(engine, "save")
    while not world.saves.under_way or not world.files.running:
        world.step()
    held = Held(world)
    delete = ask(engine, "delete")
    gate.set()
    while world.files.running:  # the file is there, and the row of the session still is
        world.step()
    world.step()
    held.release()
    world.run(lambda: save.done() and delete.done())
    world.run()
    assert delete.result()["ok"]
    assert save.result()["result"]["saved_version"] == 3, "it was asked for first"
    assert on_disk(engine, tmp_path) == {}
    assert list(world.store.folder.sessions.rglob("*.safetensors")) == []
    assert session.key not in world.ledger.sessions


@pytest.mark.parametrize("op", ["delete", "reset"])
def test_a_request_that_comes_meanwhile_meets_the_base_model(engine: Engine, op: str) -> None:
    world = engine.world
    held = Held(world)
    answer = ask(engine, op)
    session = world.ledger.open(A)
    before = session.adapter
    session.requests.add("r")
    assert not world.tiers.ready(session), "what it is to meet is not decided"
    held.release()
    world.run(lambda: world.tiers.ready(session))
    assert answer.result()["ok"]
    assert session.adapter != before, "the worker's old one is not it"
    world.trainer.learn(session.adapter, 5.0)
    world.step()
    session.requests.clear()
    world.tiers.left(session)
    assert world.value("a") == 5.0
    assert engine.ask("save", "a")["saved_version"] == 1
    assert world.ledger.quotas.of("-") == 1


def test_one_change_at_a_time(engine: Engine, tmp_path: Path) -> None:
    """Each meets what the one before has left."""
    held = Held(engine.world)
    asked = ("freeze", None), ("reset", None), ("rollback", 1), ("fork", "b"), ("save", None), ("delete", None), ("reset", None)
    answers = [ask(engine, op, argument=argument) for op, argument in asked]
    for _ in range(5):
        engine.world.step()
    assert not any(answer.done() for answer in answers)
    held.release()
    engine.world.run(lambda: all(answer.done() for answer in answers))
    found = [answer.result() for answer in answers]
    assert [answer.get("status", 200) for answer in found] == [200, 200, 409, 200, 200, 200, 409]
    assert found[1]["result"]["frozen"]
    assert "has no version 1" in found[2]["message"]
    assert (found[3]["result"]["session_id"], found[3]["result"]["version"]) == ("b", 0)
    assert "was removed meanwhile" in found[6]["message"]
    assert on_disk(engine, tmp_path) == {"b": 0}


def test_a_session_that_cannot_be_written_costs_nobody_else(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one session's row is not one of the disk: others are saved, and new ones are let in."""
    world, real = engine.world, records.put

    def conflict(db: sqlite3.Connection, row: records.Row, keep: int) -> list[str]:
        if row.key == A:
            raise sqlite3.IntegrityError("UNIQUE constraint failed")
        return real(db, row, keep)

    monkeypatch.setattr(records, "put", conflict)
    world.use("a", 4.0)
    assert engine.ask("save", "a") == 507
    assert world.store.full == ""
    world.use("new", 1.0, tenant="other")
    world.use("b", 1.0)
    assert engine.ask("save", "b")["saved_version"] == 1


def test_a_session_that_is_changed_while_it_is_read_comes_back(tmp_path: Path) -> None:
    """The request that had it read is gone, a rollback makes another session of the file, and a request asks for that."""
    world = World(tmp_path / "state", limit=1)
    engine = Engine(world)
    for name in ("a", "b"):
        world.use(name, 1.0)
        world.save(name)
    gate, load = threading.Event(), world.files._load
    world.files._load = lambda *args: (gate.wait(), load(*args))[1]
    session = world.ledger.open(A)
    session.requests.add("r1")
    assert not world.tiers.ready(session)
    for _ in range(3):
        world.step()
    assert session.life.state is State.LOADING
    session.requests.clear()
    world.tiers.left(session)
    rollback = ask(engine, "rollback", argument=1)
    session = world.ledger.open(A)
    session.requests.add("r2")
    assert not world.tiers.ready(session)
    world.step()
    gate.set()
    world.run(lambda: world.tiers.ready(session))
    assert rollback.result()["status"] == 409, "a request of it came first"
    session.requests.clear()
    world.tiers.left(session)
    assert world.value("a") == 1.0
    assert world.tiers.placed == 1
    assert engine.ask("rollback", "a", 1)["version"] == 1
    world.end()


def test_expired_sessions_that_cannot_be_removed_stay(engine: Engine, full: Callable[[], None]) -> None:
    world = engine.world
    session = world.ledger.find(A)
    assert session is not None
    with pytest.raises(RequestError, match="stays as it was"):
        world.wait(world.tiers.owner.remove(session))
    assert world.value("a") == 3.0
    full()


def test_exports_are_a_few_at_once_and_stand_before_nobodys_saves(engine: Engine) -> None:
    """Each holds a copy of its session: a key may wait for four, and the worker is asked for two."""
    world = engine.world
    world.use("other", 1.0, tenant="b")
    gate, export = threading.Event(), world.files._export
    world.files._export = lambda *args: (gate.wait(), export(*args))[1]
    asked = [admin(engine, "export", "-", "a") for _ in range(50)]
    refused = [answer for answer in asked if not isinstance(answer, Future)]
    assert {answer["status"] for answer in refused} == {429}
    assert len(refused) == 46
    elsewhere = admin(engine, "export", "b", "other")
    assert isinstance(elsewhere, Future), "another key is not refused"
    for _ in range(5):
        world.step()
    assert len(world.files.running) == 2
    world.use("new", 1.0)
    assert engine.ask("save", "new")["saved_version"] == 1
    gate.set()
    waiting = [answer for answer in asked if isinstance(answer, Future)]
    world.run(lambda: elsewhere.done() and all(answer.done() for answer in waiting))
    assert all(answer.result()["ok"] for answer in waiting)
    assert engine.ask("export", "a")["version"] == 2
    assert not world.tiers.exports.counts
