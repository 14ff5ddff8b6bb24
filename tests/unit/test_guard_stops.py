"""What the guard has stopped learns nothing more, in both processes, whichever step it is in; and whose turn a trial is."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deep_scheduler import Engine
from test_samples import Answering
from test_worker_compute import D, Q, V, make
from vllm.v1.request import RequestStatus

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.engine.ledger import ASKED_FOR, Session
from vllm_ttt.engine.limits.trust import Trust
from vllm_ttt.types import ChunkReason, ChunkReport, RequestPlan, SessionKey, StepPlan, StepReport, Trial
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.deltas.versions import keep
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.budget import Budget
from vllm_ttt.worker.learn.device_times import DeviceTimes
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.step.micro_step import accumulate
from vllm_ttt.worker.worker import TTTWorkerMixin

pytestmark = pytest.mark.unit

CHUNK, EVERY, TEXT = 16, 4, 40
A, B = 7, 8


class Worker:
    """The worker's hooks, with all that is ours behind them; vLLM's slots and forward are left out."""

    def __init__(self, max_regression: float = 100.0):
        learn = {"chunk": CHUNK, "min_chunk": 1, "max_loss": 2.0}
        config = parse_config({"learn": learn, "guard": {"every": EVERY, "max_regression": max_regression}})
        tail = make().tail
        self.h, self.a, self.tokens = torch.randn(256, D), torch.randn(256, Q), torch.randint(0, V, (256,))
        self.backlog, self.deltas = Backlog(16, CHUNK, 1, self.h, self.a), Deltas(tail, 3, config.learn.rate)
        slots: Any = SimpleNamespace(
            write=lambda *_: None, drop=lambda _: None, holds=lambda _: False, start=lambda *_: None, finish=lambda _: None
        )
        self.probe = Probe(TEXT, self.h, self.a)
        self.trainer = Trainer(tail, config, self.backlog, self.deltas, slots, self.probe)
        self.hooks: Any = TTTWorkerMixin()
        self.hooks.trainer, self.hooks.probe, self.hooks.backlog, self.hooks.began = self.trainer, self.probe, self.backlog, {}
        self.hooks.iterations, self.hooks.budget, self.hooks.reserve = [], Budget(CHUNK, 1.25), []
        self.hooks.clock = self.trainer.clock
        self.hooks.times = DeviceTimes(self.hooks.clock, self.hooks.budget)
        self.hooks.budget.calibrate(CHUNK, 0.001)
        self.hooks._read_times = lambda: None
        self.number = 0
        self.probe.start("p", RequestPlan(99, TEXT + 1, False, False, probe=True))
        self.probe.take([Rows("p", 0, 0, self.tokens[: TEXT + 1])], self.h, self.a)
        self.probe.finish("p")

    def begin(self, key: int, chunks: int, learn: bool = True) -> str:
        """A step's plan has a request of the session."""
        self.number += 1
        name = f"r{self.number}"
        plan = StepPlan(started={name: RequestPlan(key, chunks * CHUNK + 1, learn=learn, learn_output=False)})
        self.hooks._start(plan)
        return name

    def read(self, name: str, chunks: int) -> None:
        """Its prompt goes through the model, and it leaves."""
        count = chunks * CHUNK + 1
        self.backlog.take([Rows(name, 0, 0, self.tokens[:count])], self.h, self.a)
        self.backlog.finish(name, count - 1)

    def send(self, key: int, chunks: int) -> str:
        name = self.begin(key, chunks)
        self.read(name, chunks)
        return name

    def between(self) -> StepReport:
        """Before a batch that serves somebody, with the time for one chunk."""
        self.hooks.budget.credit = 0.001
        self.hooks._between(True, [])
        return self.trainer.take_report()

    def harm(self, key: int) -> None:
        """Move the session's delta up the slope of the text's loss."""
        tail, grad = self.deltas.tail, self.deltas.tail.zeros(1)
        weight, delta = torch.full((1, TEXT), 1 / TEXT), self.deltas.read(key).delta
        accumulate(tail, delta, self.h[None, :TEXT], self.a[None, :TEXT], self.tokens[None, :TEXT], weight, grad)
        for x, g in zip(delta.tensors(), grad.tensors(), strict=True):
            x += 10 * g

    def learn(self, key: int, chunks: int) -> list[StepReport]:
        self.send(key, chunks)
        reports = []
        while self.backlog.queues or self.trainer.guard.busy:
            reports.append(self.between())
        return reports


# The order


def test_a_session_is_tried_before_it_goes_on_however_much_waits() -> None:
    """Every step serves somebody and has the time for one chunk: a trial takes the turn of what is learned."""
    worker = Worker()
    worker.send(A, 11)
    worker.send(B, 3)
    tried = []
    for _ in range(40):
        report = worker.between()
        assert worker.trainer.guard.untried(A) <= EVERY + len(tried), "it learns while its trial runs, and no further"
        tried += [(trial.session, trial.version) for trial in report.trials]
    assert tried == [(A, EVERY), (A, 2 * EVERY)], "each multiple of guard.every, and not the double of it"
    assert not worker.backlog.queues
    assert worker.trainer.versions.last_good(A) == 2 * EVERY


def test_who_is_spoiled_after_the_first_interval_keeps_what_it_learned_in_it() -> None:
    worker = Worker(max_regression=0.05)
    worker.learn(A, EVERY)
    assert worker.trainer.versions.last_good(A) == EVERY
    worker.send(A, EVERY)
    for _ in range(EVERY):
        worker.between()
    worker.harm(A)
    (trial,) = [trial for _ in range(12) for trial in worker.between().trials]
    assert (trial.session, trial.back_to) == (A, EVERY)


def test_to_go_back_does_not_escape_the_guard() -> None:
    """What was committed before that version, and no trial has seen, counts on; where it is a good one, there is none."""
    worker = Worker()
    trainer = worker.trainer
    worker.learn(A, EVERY)
    worker.learn(A, EVERY - 2)
    trainer.versions.add(A, 2 * EVERY - 2, keep(worker.deltas, A))
    worker.learn(A, 1)
    assert trainer.guard.untried(A) == EVERY - 1
    assert trainer.roll_back(A, 2 * EVERY - 2)
    assert trainer.guard.untried(A) == EVERY - 2
    worker.learn(A, 2)
    assert trainer.versions.last_good(A) == 2 * EVERY, "it was due"
    worker.learn(A, 1)
    assert trainer.roll_back(A, 2 * EVERY)
    assert trainer.guard.untried(A) == 0


# The worker's half


def spoiled() -> tuple[Worker, StepReport]:
    """A worker whose session A has just been stopped: the report in which that stands."""
    worker = Worker(max_regression=0.05)
    worker.send(A, EVERY)
    for _ in range(EVERY):
        worker.between()
    worker.harm(A)
    for _ in range(12):
        report = worker.between()
        if report.trials:
            assert report.trials[0].back_to == 0
            return worker, report
    raise AssertionError("the guard has not found it")


def test_a_request_that_was_planned_before_its_session_was_stopped_is_not_learned() -> None:
    """The engine core has made the plan of the step in which the guard stops the session."""
    worker, _ = spoiled()
    name = worker.begin(A, 3)
    worker.read(name, 3)
    report = worker.between()
    assert [(c.request, c.tokens, c.skipped) for c in report.chunks] == [(name, 3 * CHUNK, "frozen")]
    assert (name, A) in report.settled
    for _ in range(6):
        assert not worker.between().chunks
    assert worker.deltas.session(A).version == 0
    assert worker.backlog.room == 16
    other = worker.send(B, 1)
    assert [(c.request, c.skipped) for c in worker.between().chunks] == [(other, None)], "nobody else is stopped"


def test_what_is_planned_knowing_of_it_is_learned() -> None:
    """Its owner has unfrozen it: what the engine core plans from then on is learned."""
    worker, _ = spoiled()
    worker.trainer.stopped.difference_update(StepPlan(stopped=[A]).stopped)
    name = worker.send(A, 1)
    assert [(c.request, c.skipped, c.version) for c in worker.between().chunks] == [(name, None, 1)]


def test_a_copy_is_trusted_as_its_source_is() -> None:
    worker = Worker(max_regression=0.05)
    worker.learn(A, EVERY)
    worker.learn(A, EVERY - 1)
    assert worker.trainer.copy(A, B) == 2 * EVERY - 1
    assert worker.trainer.guard.untried(B) == EVERY - 1
    worker.send(B, 1)
    worker.between()
    worker.harm(B)
    (trial,) = [trial for _ in range(12) for trial in worker.between().trials]
    assert (trial.session, trial.version, trial.back_to) == (B, 2 * EVERY, EVERY)


def test_a_copy_of_what_is_being_tried_is_tried() -> None:
    worker = Worker()
    worker.learn(A, EVERY)
    worker.send(A, EVERY)
    for _ in range(EVERY):
        worker.between()
    worker.trainer.guard.run(2, worker.deltas, frozenset())
    assert worker.trainer.guard.task is not None, "its trial has begun"
    assert worker.trainer.copy(A, B) == 2 * EVERY
    assert worker.trainer.guard.due() == {B}


# The engine core's half


class Told(Answering):
    """A session `a`, and what the worker is told."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[StepPlan] = []
        schedule, scheduler = self.scheduler.schedule, self.scheduler

        def listen(*args: Any) -> Any:
            output = schedule(*args)
            self.plans.append(output.ttt)  # type: ignore[attr-defined]
            return output

        scheduler.schedule = listen  # type: ignore[method-assign]

    def stop(self, version: int, back_to: int = 0) -> None:
        """The worker's next report: the guard has returned the session."""
        self.report.trials.append(Trial(self.session("a").adapter, version, 1.0, back_to))


def test_what_has_started_when_its_session_is_stopped_says_that_it_was_not_learned() -> None:
    engine = Told()
    (first,) = engine.ask("one", list(range(400)), outputs=(4,))
    engine.step()
    engine.learned(first, "a", 2, settled=False)
    engine.report.chunks[0].tokens = engine.report.chunks[1].tokens = 100
    engine.step()
    engine.stop(2, back_to=1)
    engine.report.settled.append((first, engine.session("a").adapter))
    engine.step()
    engine.drain()
    assert engine.said[first] == {"version": 0, "tokens_learned": 100}, "of two chunks the session still has one"
    assert engine.session("a").frozen is not None
    assert engine.session("a").version == 1


def test_what_waits_when_its_session_is_frozen_is_not_learned() -> None:
    """By its owner: what has begun is learned to its end."""
    engine = Told()
    (first,) = engine.ask("one", list(range(400)))
    (second,) = engine.ask("two", list(range(400, 800)))
    engine.step()
    session = engine.session("a")
    session.frozen = ASKED_FOR
    engine.learned(first, "a", 1)
    for _ in range(3):
        engine.step()
    (plan,) = [plan.started[second] for plan in engine.plans if second in plan.started]
    assert not plan.learn
    assert (engine.said[first]["tokens_learned"], engine.said[second]["tokens_learned"]) == (399, 0)
    assert session.tokens_skipped["frozen"] == 399
    assert session.version == 1
    assert not session.open


def test_what_waits_and_what_is_released_when_its_session_is_stopped_is_not_learned() -> None:
    """Requests back to back: the second is held until the first has been learned, and is released as the guard speaks."""
    engine = Told()
    (first,) = engine.ask("one", list(range(400)))
    (second,) = engine.ask("two", list(range(400, 800)))
    (third,) = engine.ask("three", list(range(800, 1200)))
    engine.step()
    engine.learned(first, "a", 1)
    engine.step()
    assert second not in engine.scheduled
    engine.stop(1)
    engine.step()  # the second begins: its plan is on its way when the guard stops the session
    assert engine.plans[-1].started[second].learn
    assert third not in engine.scheduled, "the worker has not said yet what became of the second"
    adapter = engine.session("a").adapter
    engine.report.chunks.append(ChunkReport(adapter, second, 399, math.nan, None, "frozen", 399, 0))
    engine.report.settled.append((second, adapter))
    for _ in range(3):
        engine.step()
    assert {*engine.said} == {first, second, third}
    assert engine.said[second]["tokens_learned"] == engine.said[third]["tokens_learned"] == 0
    assert engine.session("a").tokens_skipped["frozen"] == 2 * 399
    assert not engine.session("a").open
    told = [plan for plan in engine.plans if plan.stopped]
    assert [plan.stopped for plan in told] == [[engine.session("a").adapter]], "once"
    started = [plan.started[third] for plan in engine.plans if third in plan.started]
    assert [plan.learn for plan in started] == [False]


def test_what_is_not_learned_is_given_back() -> None:
    """Of what a session and its key may have learned in an hour: what the guard has stopped was taken off as it began."""
    engine = Told()
    (first,) = engine.ask("one", list(range(400)))
    (second,) = engine.ask("two", list(range(400, 800)))
    engine.step()
    engine.learned(first, "a", 1)
    engine.step()
    engine.stop(1)
    engine.step()
    session, trust = engine.session("a"), engine.scheduler.ttt_trust
    full, key = float(trust.config.guard.hourly_tokens), trust.keys["-"].tokens
    assert session.allowance.tokens is not None
    assert key is not None
    assert session.allowance.tokens < full - 700, "both have been taken off"
    left = session.allowance.tokens
    reasons: dict[ChunkReason, int] = {"frozen": 200, "filter": 100, "loss": 50, "short": 9, "unread": 40}
    for skipped, tokens in reasons.items():
        engine.report.chunks.append(ChunkReport(session.adapter, second, tokens, math.nan, None, skipped, 399, 0))
    engine.report.settled.append((second, session.adapter))
    for _ in range(3):
        engine.step()
    assert session.allowance.tokens == left + 349, "a step was made of what the gate refused"
    assert trust.keys["-"].tokens == key + 349


def test_an_answer_that_is_not_learned_is_given_back_once_it_has_been_taken_off() -> None:
    """What is generated is taken off as the request leaves."""
    trust, session = Trust(TTTConfig()), Session(SessionKey("-", "a"), 1, 8)
    assert trust.refuses(session, 100) is None
    before = session.allowance.tokens
    assert before is not None
    chunk = ChunkReport(1, "r", 40, math.nan, None, "frozen", 120, 0)
    running: Any = SimpleNamespace(prompt=101)
    trust.counted(session, chunk, running)
    assert session.allowance.tokens == before + 20, "of the pairs 80 to 119, the prompt has 20"
    trust.spend(session, 40)
    trust.counted(session, chunk, None)
    assert session.allowance.tokens == before + 20


def test_what_is_given_up_in_the_step_of_the_trial_hides_no_return() -> None:
    """A request that was planned is given up after the worker went back: its chunk says the earlier version already."""
    engine = Told()
    (first,) = engine.ask("one", list(range(400)))
    engine.step()
    engine.learned(first, "a", 2)
    engine.drain()
    session = engine.session("a")
    before = session.life.returned_at
    assert session.history.known(list(range(500))) > 0
    engine.report.chunks.append(ChunkReport(session.adapter, "planned", 99, math.nan, None, "frozen", 99, 1))
    engine.stop(2, back_to=1)
    engine.step()
    assert session.version == 1
    assert session.life.returned_at > before, "what was taken of the bad version is none of the session"
    assert session.history.known(list(range(500))) == 0, "what was learned since is not history"


def test_a_session_that_its_owner_has_returned_further_stays_there() -> None:
    engine = Told()
    engine.learn("a", 3)
    session = engine.scheduler.ttt_ledger.find(SessionKey("-", "a"))
    assert session is not None
    session.back_to(1)
    engine.stop(3, back_to=2)
    engine.step()
    assert session.version == 1
    assert session.frozen is not None
    assert session.frozen.endswith("it is back at version 1")


# The text


def test_a_text_that_was_aborted_is_read_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Everything is aborted while it is read, as `POST /pause?mode=abort` does: the next request of a session reads it anew."""
    engine = Engine("last", guard={"every": 4})
    engine.send("a")
    probe = engine.scheduler.ttt_probe
    first = set(probe.open)
    assert len(first) > 1
    with caplog.at_level("WARNING"):
        engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not probe.open
    assert sum("is read again" in record.message for record in caplog.records) == 1
    engine.send("a")
    assert len(probe.open) == len(first)
    assert not first & set(probe.open), "the worker may not have heard of the end of those yet"
    engine.drain()
    assert not probe.open
    engine.send("a")
    assert not probe.open, "once is enough"


def test_the_worker_tries_nothing_on_half_a_text() -> None:
    worker = Worker()
    probe = Probe(60, worker.h, worker.a)
    plan = RequestPlan(99, 31, False, False, probe=60)
    for name, rows in (("one", 31), ("two", 20)):
        probe.start(name, plan)
        probe.take([Rows(name, 0, 0, worker.tokens[:rows])], worker.h, worker.a)
        probe.finish(name)
    assert not probe.ready, "the second was aborted"
    for name in ("one again", "two again"):
        probe.start(name, plan)
        assert not probe.ready
        probe.take([Rows(name, 0, 0, worker.tokens[:31])], worker.h, worker.a)
        probe.finish(name)
    assert probe.ready
    assert probe.rows == 60
    probe.start("three", plan)
    probe.finish("three")
    assert probe.ready, "who has it all needs no more"
