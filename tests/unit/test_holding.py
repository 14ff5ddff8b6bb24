"""Requests that are held, in vLLM's own scheduler: what they wait for, in which order they are let go, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from held import Held, other
from hypothesis import given
from hypothesis import strategies as st
from test_deep_scheduler import PROMPT
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from vllm_ttt.engine.hold import holding
from vllm_ttt.engine.hold.holding import Entry, Lane, Line
from vllm_ttt.types import SAMPLES, SessionKey

pytestmark = pytest.mark.unit


def test_those_that_wait_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, looked = Held(), 0
    engine.send(None, outputs=300)
    first = engine.send("a", learn=True)
    engine.step()

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal looked
            looked += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(holding.Line, "first", count(holding.Line.first))
    scheduler: Any = engine.scheduler
    monkeypatch.setattr(scheduler, "_handle_blocked_waiting_request", count(scheduler._handle_blocked_waiting_request))
    monkeypatch.setattr(holding.Holding, "_may_pass", count(holding.Holding._may_pass))
    waiting = [engine.send("a", other(0), learn=i % 2 == 0) for i in range(1000)]
    assert looked <= 5 * 1000, "each at its arrival"
    assert not scheduler.waiting
    assert scheduler.get_num_unfinished_requests() == 1 + 1000
    looked = 0
    for _ in range(50):
        engine.step()
    assert looked <= 50 * 3
    engine.settle(first, "a")
    assert engine.new() == {waiting[0]}
    assert looked < 200


def test_let_go_when_what_came_before_is_learned() -> None:
    engine = Held()
    first = engine.send("a", learn=True)
    readers = [engine.send("a", other(1)), engine.send("a", other(2))]
    second = engine.send("a", other(3), learn=True)
    last = engine.send("a", other(4))
    assert engine.new() == {first}
    assert engine.new() == set()
    engine.settle(first, "a")
    assert engine.new() == {*readers, second}, "readers do not wait for one another, nor a learner for a reader"
    assert engine.new() == set()
    engine.settle(second, "a")
    assert engine.new() == {last}
    assert engine.holding.count == 0
    assert not engine.holding.lanes, "nothing stays behind"
    assert not engine.holding.entries


def test_the_worker_hears_whom_somebody_waits_for() -> None:
    engine = Held()
    adapter = lambda name: engine.scheduler.ttt_ledger.sessions[SessionKey("-", name)].adapter  # noqa: E731
    heard = lambda: engine.step().ttt.awaited  # type: ignore[attr-defined]  # noqa: E731
    first, other_first = engine.send("a", learn=True), engine.send("b", learn=True)
    assert heard() == []
    reader = engine.send("b", other(1))
    engine.send("a", other(1))
    assert heard() == heard() == [adapter("b"), adapter("a")], "the longest-waiting first"
    engine.settle(first, "a")
    assert heard() == [adapter("b")]
    engine.scheduler.finish_requests([reader], RequestStatus.FINISHED_ABORTED)
    assert heard() == [], "nobody waits any more"
    engine.settle(other_first, "b")
    assert not engine.holding.awaited


def test_of_many_the_worker_hears_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "AWAITED", 2)
    engine = Held()
    for name in "abc":
        engine.send(name, learn=True)
    engine.step()
    for name in "cab":
        engine.send(name, other(1))
    sessions = engine.scheduler.ttt_ledger.sessions
    awaited = engine.step().ttt.awaited  # type: ignore[attr-defined]
    assert awaited == [sessions[SessionKey("-", name)].adapter for name in "ca"]


@pytest.mark.parametrize("begun", [True, False])
def test_let_go_when_what_came_before_is_aborted(begun: bool) -> None:
    engine = Held()
    first = engine.send("a", learn=True)
    assert engine.new() == {first}
    second, third = engine.send("a", other(1), learn=True), engine.send("a", other(2), learn=True)
    gone = first if begun else second
    engine.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
    assert engine.new() == set(), "what of the first was read is still to be learned"
    engine.settle(first, "a")
    assert engine.new() == {second if begun else third}


@pytest.mark.parametrize("consistency", ["read-your-writes", "eventual"])
def test_a_short_request_beside_a_long_one(consistency: str) -> None:
    """It waits until the long one has been learned, not until it has been answered; with `eventual` it does not wait."""
    engine = Held(schedule={"consistency": consistency})
    long = engine.send("a", learn=True, outputs=300)
    assert engine.new() == {long}
    short = engine.send("a", other(1)[:20], learn=True)
    assert engine.new() == (set() if consistency == "read-your-writes" else {short})
    engine.settle(long, "a")
    engine.drain() if consistency == "eventual" else None
    assert engine.new() == ({short} if consistency == "read-your-writes" else set())


def test_who_learns_nothing_keeps_nobody_waiting() -> None:
    engine = Held()
    reader = engine.send("a", outputs=300)
    assert engine.new() == {reader}
    learner = engine.send("a", other(1), learn=True)
    assert engine.new() == {learner}
    assert reader in engine.scheduled


def test_a_session_waits_and_the_others_do_not() -> None:
    engine = Held()
    engine.send("a", learn=True)
    engine.step()
    engine.send("a", other(1))
    assert engine.new() == set()
    others = {engine.send("b", other(2), learn=True), engine.send(None, other(3))}
    assert engine.new() == others


def test_the_backlog_is_waited_for_in_order() -> None:
    """Whoever learns nothing needs no room; who needs little does not overtake who needs much."""
    engine = Held(schedule={"backlog_tokens": 1024})  # two pages
    engine.report.queued, engine.report.busy = 1, True
    engine.step()
    engine.report.queued = 1
    much, little = engine.send("a", [*range(1000, 1900)], learn=True), engine.send("b", PROMPT[:20], learn=True)
    reader = engine.send("c", PROMPT)
    engine.report.queued = 1
    assert engine.new() == {reader}, "there is room for the second, and not for the first"
    engine.report.queued = 1
    assert engine.new() == set()
    assert engine.holding.count == 2
    assert engine.begun(2) == [much, little]


def test_slots_are_waited_for_in_order() -> None:
    """Four sessions have the four slots. What they send more does not keep a fifth from the first slot that is free."""
    engine = Held()
    running = [engine.send(name, other(i), outputs=5 + i) for i, name in enumerate("abcd")]
    assert engine.new() == set(running)
    more = engine.send("a", other(5), outputs=5)
    assert engine.new() == {more}, "nobody else waits for a slot"
    fifth, again = engine.send("e", other(6)), engine.send("b", other(7))
    assert engine.new() == set()
    assert engine.begun(2) == [fifth, again]
    assert engine.holding.taken <= 4


def test_many_sessions_wait_for_a_slot_and_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, looked = Held(), 0
    for i, name in enumerate("abcd"):
        engine.send(name, other(i), outputs=100)
    engine.step()
    for i in range(300):
        engine.send(f"s{i}", other(9))
    first = holding.Line.first

    def counted(line: Line) -> Any:
        nonlocal looked
        looked += 1
        return first(line)

    monkeypatch.setattr(holding.Line, "first", counted)
    for _ in range(20):
        engine.step()
    assert looked <= 20 * 3
    assert not engine.scheduler.waiting


def test_a_preempted_request_is_vllms() -> None:
    """It keeps its slot, and asks for no room in the backlog again: what is captured of it waits for the rest of it."""
    engine = Held(schedule={"backlog_tokens": 1024})
    name = engine.send("a", learn=True, outputs=20)
    assert engine.new() == {name}
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.report.queued, engine.report.busy = 2, True
    assert engine.scheduler.requests[name] in engine.scheduler.waiting
    assert (engine.holding.count, engine.holding.taken) == (0, 1)
    engine.step()
    assert name in engine.scheduled
    engine.report.queued = 2
    engine.drain()
    assert engine.holding.taken == 0


@pytest.mark.parametrize("state", [PauseState.PAUSED_ALL, PauseState.PAUSED_NEW], ids=["keep", "wait"])
def test_a_pause_keeps_what_waits(state: PauseState) -> None:
    engine = Held()
    first = engine.send("a", learn=True)
    second = engine.send("a", other(1), learn=True)
    engine.step()
    engine.scheduler.set_pause_state(state)
    assert engine.scheduler.get_num_unfinished_requests() == 0
    meanwhile = {engine.send("b", other(2)), engine.send(None, other(3))}
    engine.settle(first, "a")
    assert engine.new() == set()
    assert not engine.scheduler.has_requests(), "it would not come to rest"
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert engine.scheduler.get_num_unfinished_requests() == 3
    assert engine.new() == {second, *meanwhile}


def test_a_pause_that_aborts_aborts_what_waits() -> None:
    engine = Held()
    engine.send("a", learn=True)
    engine.step()
    engine.send(None, outputs=50)
    held = [engine.send("a", other(i)) for i in range(3)]
    finished = engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert {r.request_id for r in finished} >= set(held)
    assert engine.scheduler.get_num_unfinished_requests() == engine.holding.count == 0
    assert not engine.scheduler.ttt_requests
    assert not engine.session("a").requests


def test_priority() -> None:
    """Among those that wait for a slot, as in vLLM's queue; a session's own requests stay in order."""
    engine = Held(flags={"scheduling_policy": "priority"}, sessions={"resident": 1})
    engine.send("a", other(0), outputs=10)
    engine.step()
    late = engine.send("b", other(1), priority=5)
    early = engine.send("c", other(2), priority=1)
    assert engine.new() == set()
    assert engine.begun(2) == [early, late]
    first, second = engine.send("d", learn=True, priority=5), engine.send("d", other(3), learn=True, priority=0)
    assert engine.new() == {first}
    engine.settle(first, "d")
    assert engine.new() == {second}


def test_who_was_held_has_not_lost_its_place() -> None:
    """vLLM serves in the order of arrival. A request that was held is served before those that came later."""
    engine = Held(flags={"max_num_seqs": 1})
    first = engine.send("a", learn=True, outputs=3)
    engine.step()
    held = engine.send("a", other(1))
    base = [engine.send(None, other(i)) for i in range(2, 5)]
    engine.learned(first, "a", 1)
    assert engine.begun(4) == [held, *base]


def test_samples_of_one_request_are_let_go_together() -> None:
    """Also where something else of the session came in between: one version serves them all."""
    engine = Held()
    before = engine.send("a", learn=True)
    engine.step()
    for name in ("0_x-1", "between", "1_x-1"):
        extra = {"session_id": "a"} | ({} if name == "between" else {SAMPLES: 2})
        params = SamplingParams(max_tokens=1, ignore_eos=True, extra_args=extra)
        request = Request(name, PROMPT, params, None, block_hasher=engine.hasher, session_id=None)
        request.ttt_named = "between" if name == "between" else "x"  # type: ignore[attr-defined]
        engine.scheduler.add_request(request)
    assert engine.new() == set()
    engine.settle(before, "a")
    assert engine.new() == {"0_x-1", "1_x-1"}
    engine.settle("0_x-1", "a")
    assert engine.new() == {"between"}


def test_what_vllm_counts() -> None:
    engine = Held()
    first = engine.send("a", learn=True)
    held = engine.send("a", other(1))
    engine.step()
    stats = engine.scheduler.make_stats()
    assert stats is not None
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs) == (0, 0, 1)
    assert engine.scheduler.get_request_counts() == (0, 1)
    engine.settle(first, "a")
    engine.step()
    seconds = engine.scheduler.ttt_counts.snapshot()["held_seconds"][""]
    assert sum(seconds[1:]) == 1, f"{held} alone has waited"


def test_so_many_may_wait() -> None:
    engine = Held(sessions={"resident": 4, "held_per_session": 3})
    engine.holding.most = 3  # as it is where clients come over HTTP
    engine.send("a", learn=True)
    engine.step()
    held = [engine.send("a", other(i)) for i in range(3)]
    refused = engine.send("a", other(4))
    ((request, error),) = engine.scheduler.ttt_refused
    assert request.request_id == refused
    assert error.status == 429
    assert "3 requests of session 'a' wait for it already, and 3 may (sessions.held_per_session)" in error.message
    assert engine.send("b", other(5)) in engine.new(), "another session is another session"
    engine.scheduler.finish_requests(held[0], RequestStatus.FINISHED_ABORTED)
    engine.send("a", other(6))
    assert not engine.scheduler.ttt_refused
    assert engine.session("a").tokens_seen == len(PROMPT) - 1


def test_from_python_any_number_may_wait() -> None:
    engine = Held(sessions={"resident": 4, "held_per_session": 3})
    engine.send("a", learn=True)
    for i in range(10):
        engine.send("a", other(i))
    assert engine.holding.count == 10
    assert not engine.scheduler.ttt_refused


@given(st.lists(st.tuples(st.sampled_from(["push", "remove", "pop"]), st.integers(0, 40)), max_size=200))
def test_a_line_is_a_sorted_list(operations: list[tuple[str, int]]) -> None:
    line, plain = Line(), list[tuple[tuple[int, int], Entry]]()
    for number, (what, order) in enumerate(operations):
        if what == "push":
            entry = Entry(Any, None, Lane(SessionKey("", "")), ())  # type: ignore[arg-type]
            line.push((order, number), entry)
            plain.append(((order, number), entry))
        elif plain:
            plain.sort(key=lambda one: one[0])
            _, entry = plain.pop(0 if what == "pop" else order % len(plain))
            line.remove(entry)
        plain.sort(key=lambda one: one[0])
        assert line.first() is (plain[0][1] if plain else None)
        assert line.count == len(plain)
        assert len(line.heap) <= 2 * line.count + 17
