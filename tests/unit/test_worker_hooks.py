"""What goes wrong in a hook of the worker costs the sessions that it is about: what others have waiting is learned."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from several import cut
from test_worker_compute import D, Q, V, make

from vllm_ttt.config import parse_config
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.budget import Budget
from vllm_ttt.worker.learn.device_times import DeviceTimes
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.serve.slots import Slots
from vllm_ttt.worker.step.micro_step import Tail
from vllm_ttt.worker.worker import AHEAD, PAUSE, TTTWorkerMixin

pytestmark = pytest.mark.unit

CHUNK = 16
A, B, C = 7, 8, 9


class Hooks(TTTWorkerMixin):
    """The hooks, on a batch that is given: vLLM's slots and forward are left out."""

    def __init__(self, pages: int = 8, ranks: Ranks = ALONE):
        config = parse_config({"learn": {"chunk": CHUNK, "min_chunk": 1, "max_loss": 2.0}, "guard": {"every": 0}})
        tail, self.ranks = make().tail, ranks
        assert isinstance(tail, Tail)
        tail = cut(tail, ranks, V // 2)
        h, a = torch.randn(256, D), ranks.part(torch.randn(256, Q), 1)
        self.tokens = torch.randint(0, V, (256,))
        self.backlog, deltas = Backlog(pages, CHUNK, 1, h, a), Deltas(tail, 3, config.learn.rate)
        slots: Any = SimpleNamespace(
            drop=lambda _: None, holds=lambda _: False, held=list, deltas=deltas, start=lambda *_: None, finish=lambda _: None
        )
        slots.write = lambda key, session: Slots.write(slots, key, session)
        self.probe, self.capture = Probe(1, h, a), SimpleNamespace(h_ND=h, a_NQ=a, taken=lambda: None)  # type: ignore[assignment]
        self.trainer = Trainer(tail, config, self.backlog, deltas, slots, self.probe)
        self.budget, self.ran, self.ends = Budget(CHUNK, 1.25), None, 0.0
        self.times = DeviceTimes(self.trainer.clock, self.budget)
        self.iterations, self.reserve = deque(), []
        self.go_by(self.trainer.clock)

    def go_by(self, clock: Clock) -> None:
        self.clock = self.times.clock = self.trainer.clock = self.trainer.guard.clock = clock

    def ttt_view(self, ran: Any, wanted: Any) -> list[Rows]:
        return [rows for rows in ran if rows.request in wanted]

    def start(self, name: str, key: int, chunks: int, learn_output: bool = False) -> None:
        self.trainer.start(name, RequestPlan(key, chunks * CHUNK + 1, True, learn_output))

    def batch(self, *parts: tuple[str, int, int]) -> None:
        """A batch of (request, first position, rows) has run."""
        self.ran = [Rows(name, 0, first, self.tokens[first : first + rows]) for name, first, rows in parts]
        self._guard(self._take)

    def learn(self) -> dict[int, int]:
        """Everything; the versions then."""
        while self.backlog.queues:
            self.trainer.learn(CHUNK)
        self.trainer.sync()
        return {key: session.version for key, session in self.trainer.deltas.sessions.items()}


def test_chunks_of_a_step_have_no_more_before_them_than_there_is_room_for() -> None:
    """One always goes, whatever comes before it; others join where that is not too much."""
    worker = Hooks()
    worker.trainer.cache, worker.trainer.compute.pasts = Any, 1000  # type: ignore[assignment]
    for key in range(4):
        worker.start(f"r{key}", key, 1)
        worker.batch((f"r{key}", 0, CHUNK + 1))
    for chunk, first in zip(worker.backlog.heads(), (1000, 0, 900, 101), strict=True):
        chunk.first = first
    pick = lambda *keys: [t.chunk.session for t in worker.trainer._pick(2048, frozenset(keys), True)]  # noqa: E731
    assert pick() == [0, 1], "no room for the others is left"
    assert pick(2) == [2, 1]
    assert pick(3) == [3, 1]


def lost(worker: Hooks) -> list[tuple[int, str, int]]:
    """(session, why, tokens) of what has been given up."""
    return [(c.session, c.skipped, c.tokens) for c in worker.trainer.take_report().chunks if c.skipped is not None]


@pytest.mark.parametrize("begun", [False, True], ids=["nothing was kept", "something was"])
def test_a_batch_that_cannot_be_kept_costs_its_own_sessions(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    worker = Hooks()
    worker.start("a", A, 2)
    worker.batch(("a", 0, 33))
    worker.backlog.finish("a", 32)
    worker.start("b", B, 2)
    take = worker.backlog.take

    def fail(*args: Any) -> None:
        if begun:
            take(*args)
        raise RuntimeError("planted by a test")

    with monkeypatch.context() as patch:
        patch.setattr(worker.backlog, "take", fail)
        worker.batch(("b", 0, 33))
    assert worker.trainer.errors.count == 1
    found = lost(worker)
    assert {(key, why) for key, why, _ in found} == {(B, "error")}
    assert sum(tokens for *_, tokens in found) == 32
    assert worker.learn()[A] == 2, "what was complete before has nothing to do with it"
    assert worker.backlog.room == 8


def test_an_outcome_that_cannot_be_taken_in_costs_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Hooks()
    for name, key in (("a", A), ("b", B)):
        worker.start(name, key, 2)
        worker.batch((name, 0, 33))
        worker.backlog.finish(name, 32)

    def fail(key: int) -> None:
        if key == A:
            raise RuntimeError("of session A")

    with monkeypatch.context() as patch:
        patch.setattr(worker.trainer.guard, "committed", fail)
        worker.trainer.learn(CHUNK)
        worker.trainer.collect()
        versions = worker.learn()
    assert versions[B] == 2
    assert lost(worker) == [(A, "error", 16), (A, "error", 16)]
    assert not worker.backlog.closing, "nobody waits for ever"


def test_who_finds_no_room_is_asked_again_when_one_has_gone() -> None:
    """Open chunks are more than the pages: where one session gives its page up, the next has room."""
    worker = Hooks(pages=2)
    for name, key in (("a", A), ("b", B), ("c", C), ("d", C)):
        worker.start(name, key, 2, learn_output=True)
    worker.batch(("c", 0, 4), ("a", 0, 4))
    worker.batch(("d", 0, 4), ("b", 0, 4))
    assert {key for key, *_ in lost(worker)} == {C}, "its page is enough for session B"
    assert {reading.plan.session for reading in worker.backlog.wanted().values() if not reading.closed} == {A, B}


def test_an_answer_that_finds_the_backlog_full_is_learned_all_the_same() -> None:
    """It cannot be held, as a prompt is; given up, it would be whoever fills the backlog that took it from its session."""
    worker = Hooks(pages=3)
    worker.start("a", A, 1, learn_output=True)
    worker.start("b", B, 1)
    worker.batch(("a", 0, CHUNK + 1))
    worker.batch(("b", 0, CHUNK + 1))
    worker.backlog.finish("b", CHUNK)
    for first in range(CHUNK + 1, 5 * CHUNK):
        worker.batch(("a", first, 1))
    worker.backlog.finish("a", 5 * CHUNK)
    assert lost(worker) == []
    assert worker.learn() == {A: 5, B: 1}


def test_what_is_served_while_a_prompt_is_read_is_kept_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of the device are all allocated at the start: a copy of the master there would not be among them."""
    worker = Hooks()
    copied = []
    monkeypatch.setattr("vllm_ttt.worker.learn.trainer.copy_to_host", lambda x: copied.append(x.shape) or x.clone())
    worker.start("a", A, 3)
    worker.batch(("a", 0, 20))
    worker.trainer.learn(CHUNK)
    worker.trainer.sync()
    session = worker.trainer.deltas.session(A)
    assert session.version == 1
    assert session.served == 0
    assert session.serving is not None
    assert not any(x.any() for x in session.serving.tensors()), "it is served with what it began with"
    assert copied == [x.shape for x in session.serving.tensors()]
    worker.batch(("a", 20, 29))
    worker.learn()
    assert session.served == session.version == 3


def test_the_metrics_say_whether_the_guard_works() -> None:
    worker = Hooks()
    assert worker.ttt_metrics()["guard_active"] == {"": 0}, "guard.every is 0"
    worker.trainer.guard.config = worker.trainer.guard.config.model_copy(update={"every": 1})
    assert worker.ttt_metrics()["guard_active"] == {"": 1}
    for _ in range(3):
        worker.trainer.guard.failed()
    assert worker.ttt_metrics()["guard_active"] == {"": 0}, "it has failed three times in a row"


def test_a_session_is_served_as_it_is_while_samples_are_to_begin() -> None:
    worker = Hooks()
    for key in (A, B):
        worker.start(f"r{key}", key, 1)
        worker.batch((f"r{key}", 0, CHUNK + 1))
    worker.trainer.still = {A}
    assert worker.learn() == {A: 1, B: 1}
    sessions = worker.trainer.deltas.sessions
    assert (sessions[A].served, sessions[B].served) == (0, 1)
    worker.trainer.still = set()
    worker.trainer.sync()
    assert sessions[A].served == 1


class Late(Clock):
    """Nothing is done before somebody waits for it."""

    def __init__(self) -> None:
        self.cuda, self.marks, self.reached = False, 0, 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def done(self, mark: int) -> bool:
        return mark <= self.reached

    def wait(self, mark: int) -> None:
        self.reached = max(self.reached, mark)

    def seconds(self, first: int, second: int) -> float:
        return 1.0


def test_what_a_request_begins_with_is_known() -> None:
    """With `consistency: eventual` a step of its session may be under way: its slot has what that has made already."""
    worker = Hooks()
    worker.go_by(Late())
    worker.start("a", A, 2)
    worker.batch(("a", 0, 2 * CHUNK + 1))
    worker.trainer.learn(CHUNK)
    worker.trainer.sync()
    session = worker.trainer.deltas.session(A)
    assert (session.version, session.serving) == (0, None)
    worker.start("b", A, 2)
    assert session.served == 1
    worker.batch(("b", 0, CHUNK))
    worker.trainer.learn(CHUNK)
    worker.trainer.collect(wait=True)
    worker.trainer.sync()
    assert (session.version, session.served) == (2, 1)
    worker.trainer.learn(CHUNK)
    assert worker.trainer.in_flight(A)
    worker.start("c", A, 2)
    assert worker.trainer.in_flight(A), "what is served is another: nobody waits"


def test_what_came_of_a_step_is_taken_in_while_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody is served, the device does not wait for the host between two steps: the next one is launched just before one
    ends, and no third."""
    worker, happened = Hooks(), list[str]()
    trainer = worker.trainer
    worker.go_by(Late())
    worker.budget.calibrate(CHUNK, 1.0)
    step, learned, wait = trainer.compute.step, trainer._learned, trainer.clock.wait
    note = lambda what, then: lambda *args: happened.append(what) or then(*args)  # noqa: E731
    monkeypatch.setattr(trainer.compute, "step", note("launched", step))
    monkeypatch.setattr(trainer, "_learned", note("taken in", learned))
    monkeypatch.setattr(trainer.clock, "wait", note("waited", wait))
    slept = list[float]()
    clock = SimpleNamespace(sleep=note("slept", slept.append), perf_counter=lambda: 5.0 + sum(slept))
    monkeypatch.setattr("vllm_ttt.worker.worker.time", clock)
    worker.start("a", A, 3)
    worker.batch(("a", 0, 3 * CHUNK + 1))
    worker.backlog.finish("a", 3 * CHUNK)
    for _ in range(3):
        worker._between(False, [])
        assert trainer.began is not None, "when the device began with it is known"
    once = [
        what
        for what, before in zip(happened, ["", *happened], strict=False)
        if what not in ("waited", "slept") or what != before
    ]
    assert once == ["launched", *["slept", "launched", "waited", "taken in"] * 2, "waited", "taken in"]
    assert sum(slept) == pytest.approx(2 * (1 - AHEAD)), "the next one is launched just before one ends"
    assert max(slept) <= PAUSE
    assert trainer.deltas.session(A).version == 3


def test_a_step_that_ends_early_is_not_slept_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small one it is known that it takes no longer than a large one."""
    worker, late, slept = Hooks(), Late(), list[float]()
    worker.go_by(late)
    worker.budget.calibrate(CHUNK, 1.0)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            late.wait(late.marks)

    monkeypatch.setattr("vllm_ttt.worker.worker.time", SimpleNamespace(sleep=sleep, perf_counter=lambda: 5.0))
    worker.start("a", A, 2)
    worker.batch(("a", 0, 2 * CHUNK + 1))
    worker.backlog.finish("a", 2 * CHUNK)
    for _ in range(2):
        worker._between(False, [])
    assert slept == [PAUSE] * 3


def test_what_makes_room_for_a_prompt_is_not_what_answers_it() -> None:
    """Its slot stays as its first part has read it, and so does what would fill that slot again."""
    worker = Hooks(pages=2)
    worker.start("a", A, 2)
    worker.batch(("a", 0, 2 * CHUNK + 1))
    worker.backlog.finish("a", 2 * CHUNK)
    worker.start("b", A, 3)
    worker.batch(("b", 0, CHUNK))
    session = worker.trainer.deltas.session(A)
    assert (session.version, session.served) == (1, 0)
    assert session.serving is not None
    assert not any(x.any() for x in session.serving.tensors())
    worker.batch(("b", CHUNK, 2 * CHUNK + 1))
    assert worker.learn()[A] > 2
    assert session.serving is None, "it is answered by what it has learned now"


def twice_learned() -> Hooks:
    """A worker that keeps every version, and whose session A has two."""
    worker = Hooks()
    worker.trainer.versions.every = 1
    worker.start("a", A, 2)
    worker.batch(("a", 0, 2 * CHUNK + 1))
    worker.backlog.finish("a", 2 * CHUNK)
    assert worker.learn()[A] == 2
    return worker


def test_a_session_that_is_rolled_back_in_the_middle_of_an_answer_goes_on_as_it_began() -> None:
    worker = twice_learned()
    worker.trainer.still = {A}
    assert worker.trainer.roll_back(A, 1)
    session = worker.trainer.deltas.session(A)
    assert (session.version, session.served) == (1, 2)
    worker.trainer.still = set()
    worker.trainer.sync()
    assert session.served == 1


def test_a_prompt_is_read_to_its_end_under_one_delta_also_where_its_session_is_rolled_back() -> None:
    """By the guard, say, while it is read in parts: nothing more of it is learned, and its slot stays until then."""
    worker = twice_learned()
    worker.start("b", A, 3)
    worker.batch(("b", 0, CHUNK))
    assert worker.trainer.roll_back(A, 1)
    session = worker.trainer.deltas.session(A)
    worker.batch(("b", CHUNK, CHUNK))
    worker.trainer.sync()
    assert (session.version, session.served) == (1, 2), "its first part was read with that"
    worker.batch(("b", 2 * CHUNK, CHUNK + 1))
    worker.trainer.sync()
    assert session.served == 1, "it has been read"
    assert not worker.backlog.queues
    assert [chunk.skipped for chunk in worker.trainer.take_report().chunks].count("rollback") == 2
    worker.backlog.finish("b", 3 * CHUNK)
    assert [request for request, _ in worker.trainer.take_report().settled] == []


@pytest.mark.parametrize("end", ["read", "given up"])
def test_a_prompt_that_is_preempted_is_read_again_under_that_delta(end: str) -> None:
    """Its first part has been learned: whatever says what its tokens cost has not seen them. Then the slot follows."""
    worker = Hooks()
    worker.start("a", A, 3)
    worker.batch(("a", 0, 2 * CHUNK))
    worker.trainer.learn(CHUNK)
    worker.backlog.preempt("a")
    worker.trainer.sync()
    session = worker.trainer.deltas.session(A)
    assert (session.version, session.served) == (1, 0)
    worker.batch(("a", 0, CHUNK))
    assert (worker.learn(), session.served) == ({A: 1}, 0)
    if end == "read":
        worker.batch(("a", CHUNK, 2 * CHUNK + 1))
    else:
        worker.backlog.preempt("a")
        worker.backlog.finish("a", 3 * CHUNK)
    assert worker.learn()[A] == session.served == (3 if end == "read" else 1)
    assert not worker.backlog.reading_sessions()


def test_the_first_token_is_of_the_delta_that_has_read_the_prompt() -> None:
    """Where all pairs of the prompt are read, and its last token is not yet."""
    worker = Hooks()
    worker.start("a", A, 1)
    worker.batch(("a", 0, CHUNK))
    session = worker.trainer.deltas.session(A)
    assert (worker.learn(), session.served) == ({A: 1}, 0)
    assert not worker.trainer.take_report().settled
    worker.batch(("a", CHUNK, 1))
    worker.trainer.sync()
    assert session.served == 1
    assert worker.trainer.take_report().settled == [("a", A)]


def test_of_a_prompt_whose_client_leaves_all_is_said() -> None:
    """So that it is given back to what may be learned in an hour."""
    worker = Hooks()
    worker.start("a", A, 3)
    worker.batch(("a", 0, CHUNK + 5))
    worker.backlog.finish("a", 3 * CHUNK)
    assert worker.learn() == {A: 1}
    report = worker.trainer.take_report()
    said = {chunk.skipped: (chunk.end - chunk.tokens, chunk.end) for chunk in report.chunks}
    assert said == {None: (0, CHUNK), "unread": (CHUNK, 3 * CHUNK)}
    assert report.settled == [("a", A)]


def test_history_is_read_under_that_delta_too() -> None:
    """It is read again where an epoch has ended, in parts, and nothing of it is captured."""
    worker = twice_learned()
    worker.trainer.start("b", RequestPlan(A, 4 * CHUNK + 1, True, False, start=2 * CHUNK))
    worker.batch(("b", 0, CHUNK))
    assert worker.trainer.roll_back(A, 1)
    session = worker.trainer.deltas.session(A)
    assert (session.version, session.served) == (1, 2)
    assert worker.trainer.take_report().behind == {A}
    worker.batch(("b", CHUNK, 3 * CHUNK + 1))
    worker.trainer.sync()
    assert session.served == 1
    assert not worker.trainer.take_report().behind


@pytest.mark.parametrize("serving", [True, False])
def test_what_is_urgent_is_learned_at_once_where_others_are_served(serving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody is, everything is learned anyway, step by step."""
    worker, asked = Hooks(), list[int]()
    worker.start("a", A, 3)
    worker.batch(("a", 0, 3 * CHUNK + 1))
    worker.backlog.finish("a", 3 * CHUNK)
    make_room = worker.trainer.make_room
    monkeypatch.setattr(worker.trainer, "make_room", lambda enough, tokens: asked.append(tokens) or make_room(enough, tokens))
    worker._between(serving, ["a"])
    assert asked == [CHUNK] * serving
    assert len(worker.backlog.queues.get(A, ())) == (0 if serving else 2)
    found = worker.times.snapshot()
    counted = {load for load, seconds in found["learning_seconds_total"].items() if seconds}
    assert counted == {"serving" if serving else "idle"}, "and its time is counted"


def test_what_fails_before_the_device_begins_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Hooks()
    worker.start("a", A, 1)
    worker.batch(("a", 0, CHUNK + 1))
    worker.backlog.finish("a", CHUNK)
    monkeypatch.setattr(worker.trainer, "_rows", lambda chunks: 1 / 0)
    worker._between(False, [])
    assert worker.trainer.errors.count == 1
    assert not worker.times.under_way
    worker.times.snapshot()
