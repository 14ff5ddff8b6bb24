"""Requests that wait for a session that is not in memory, or is being changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from held import Held, other
from test_deep_scheduler import PROMPT

from vllm_ttt.engine.admin import admin

pytestmark = pytest.mark.unit


@pytest.fixture
def on_disk(tmp_path: Path) -> Held:
    """An engine that finds the sessions a and b, of version 1, on disk."""
    options: dict[str, Any] = {"sessions": {"resident": 1, "host_gib": 1e-9, "state_dir": str(tmp_path / "state")}}
    engine = Held(**options)
    for name in "ab":
        engine.learn(name, 1)
        engine.run(lambda: not engine.scheduler.has_requests())
        saved = engine.scheduler.ttt_tiers.save(engine.session(name))
        engine.run(saved.done)
    engine.run(lambda: not engine.scheduler.has_requests())
    engine.scheduler.shutdown()
    return Held(**options)


def test_a_session_on_disk_is_waited_for(on_disk: Held) -> None:
    """And who waits for a place in memory gets it when there is one: there is one place."""
    engine = on_disk
    first, second, other_ = engine.send("a", learn=True), engine.send("a", PROMPT[:50]), engine.send("b", other(1))
    assert engine.new() == set()
    (order,) = engine.loads
    assert order.session == engine.session("a").adapter
    assert engine.new() == set()
    engine.load()
    assert engine.begun(1) == [first]
    engine.settle(first, "a")
    assert engine.new() == {second}
    engine.run(lambda: engine.loads)
    assert other_ not in engine.scheduled
    engine.load()
    assert engine.begun(1) == [other_]


def test_who_waits_for_room_that_cannot_come_is_refused(on_disk: Held) -> None:
    """There is one place, and what has it cannot be saved any more: that begins after the other request has come."""
    engine = on_disk
    first = engine.send("a", learn=True)
    engine.run(lambda: engine.loads)
    engine.load()
    assert engine.begun(1) == [first]
    engine.learned(first, "a", 1)
    saves = engine.scheduler.ttt_tiers.saves
    assert saves is not None
    saves.failing.add(engine.session("a").key)
    other_ = engine.send("b", other(1))
    engine.run(lambda: first not in engine.scheduler.requests and not engine.session("a").open)
    engine.run(lambda: other_ not in engine.scheduler.requests)
    assert other_ not in engine.scheduled
    assert engine.holding.count == 0


def test_a_session_that_is_being_changed_is_waited_for(on_disk: Held) -> None:
    engine = on_disk
    rpc = lambda method, args=(): [{"tier": "memory", "bytes": 1, "tokens_pending": 0, "norm": {}}]  # noqa: E731
    core = SimpleNamespace(scheduler=engine.scheduler, model_executor=SimpleNamespace(collective_rpc=rpc))
    answer = admin(core, "reset", "-", "a")
    held = engine.send("a", learn=True)
    assert engine.holding.count == 1
    engine.run(answer.done)
    assert engine.begun(1) == [held]
    assert engine.session("a").version == 0


def test_a_fork_is_waited_for(on_disk: Held) -> None:
    engine = on_disk
    engine.scheduler.ttt_ledger.limit = 2

    def rpc(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [1 if method == "ttt_copy" else {"tier": "memory", "bytes": 1, "tokens_pending": 0, "norm": {}}]

    core = SimpleNamespace(scheduler=engine.scheduler, model_executor=SimpleNamespace(collective_rpc=rpc))
    answer = admin(core, "fork", "-", "a", "c")
    held = engine.send("c", learn=True)
    assert engine.new() == set()
    engine.load()
    assert engine.begun(1) == [held]
    assert answer.done()
    assert engine.session("c").version == 1
