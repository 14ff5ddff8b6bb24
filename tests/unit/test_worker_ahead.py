"""While nobody is served a step is launched before the last one is over: shortly before, and never two ahead."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_worker_hooks import CHUNK, Hooks

from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.learn import ahead
from vllm_ttt.worker.learn.ahead import Ahead


class Device(Clock):
    """A device on which each step takes ``cost`` seconds of a clock that moves when somebody sleeps or waits."""

    def __init__(self, cost: float):
        super().__init__(torch.device("cpu"))
        self.cost, self.now, self.end, self.waits = cost, 100.0, 0.0, 0

    def mark(self) -> Any:
        return self.end

    def done(self, mark: Any) -> bool:
        return mark <= self.now

    def wait(self, mark: Any) -> None:
        self.waits += mark > self.now
        self.now = max(self.now, mark)


class Idle(Hooks):
    """A worker that serves nobody and has so many sessions with a chunk each to learn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sessions: int, thought: float, cost: float, lead: float = 0.006):
        super().__init__()
        self.device_clock = self.trainer.clock = Device(cost)
        self.ahead, self.reserve, self.iterations = Ahead(lead), [], deque()
        self.budget.calibrate(CHUNK, thought)
        #: (when it was launched, when the device began with it)
        self.launches: list[tuple[float, float]] = []
        for key in range(1, sessions + 1):
            self.start(f"r{key}", key, 1)
            self.batch((f"r{key}", 0, CHUNK + 1))
            self.backlog.finish(f"r{key}", CHUNK)
        step = self.trainer.compute.step

        def launch(*args: Any, **kwargs: Any) -> Any:
            clock = self.device_clock
            begins = max(clock.now, clock.end)
            self.launches.append((clock.now, begins))
            clock.end = begins + clock.cost
            return step(*args, **kwargs)

        monkeypatch.setattr(self.trainer.compute, "step", launch)

        def sleep(seconds: float) -> None:
            self.device_clock.now += max(seconds, 1e-5)

        found = SimpleNamespace(perf_counter=lambda: self.device_clock.now, sleep=sleep)
        monkeypatch.setattr(ahead, "time", found)
        monkeypatch.setattr("vllm_ttt.worker.worker.time", found)

    def run(self) -> None:
        while self.backlog.queues:
            self._between(False, [])
        self._between(False, [])


def test_the_next_step_is_launched_shortly_before_the_last_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Idle(monkeypatch, 6, thought=0.034, cost=0.034)
    worker.run()
    assert len(worker.launches) == 6
    waited = [began - launched for launched, began in worker.launches[1:]]
    assert all(0.0 < w <= 0.0061 for w in waited), f"the device waited, or a request would for more than one step: {waited}"
    assert {s.version for s in worker.trainer.deltas.sessions.values()} == {1}


@pytest.mark.parametrize("thought", [0.001, 0.5], ids=["thought too short", "thought too long"])
def test_what_a_step_is_thought_to_take_may_be_wrong(monkeypatch: pytest.MonkeyPatch, thought: float) -> None:
    worker = Idle(monkeypatch, 6, thought=thought, cost=0.034)
    worker.run()
    ahead_of = [began - launched for launched, began in worker.launches]
    assert max(ahead_of) <= 0.0341, "never two steps ahead"
    assert worker.device_clock.now <= 100.0 + 6 * 0.036, "and a step that is over is not slept through"
    assert {s.version for s in worker.trainer.deltas.sessions.values()} == {1}


def test_at_the_end_every_outcome_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Idle(monkeypatch, 2, thought=0.034, cost=0.034)
    worker._between(False, [])
    assert worker.trainer.outcomes, "a step is under way"
    worker._between(False, [])
    assert not worker.trainer.outcomes
