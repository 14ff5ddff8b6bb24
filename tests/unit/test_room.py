"""Who may begin to be read and learned, in vLLM's own scheduler: everybody, in turn, and nobody waits for itself."""

from __future__ import annotations

from typing import Any

import pytest
from test_deep_scheduler import Engine
from vllm.v1.core.sched.output import SchedulerOutput

pytestmark = pytest.mark.unit

#: The backlog holds four chunks.
CHUNK, TOKENS = 256, 1024


class Small(Engine):
    """The worker has so many complete chunks that wait."""

    def __init__(self, queued: int = 0) -> None:
        options: dict[str, Any] = {"learn": {"chunk": CHUNK}, "schedule": {"backlog_tokens": TOKENS}}
        super().__init__("last", {"max_model_len": 2048}, sessions={"resident": 16}, **options)  # slots for everybody
        self.queued = queued

    def step(self) -> SchedulerOutput:
        self.report.queued = self.queued
        return super().step()

    def begins(self, name: str) -> bool:
        """Whether the request is in the next step, whose reports say as much as the one before."""
        self.step()
        return name in self.scheduled


def prompt(number: int, length: int) -> list[int]:
    return [(7 * number + i) % 4000 for i in range(length)]


def test_short_prompts_are_counted_as_the_pages_that_they_take() -> None:
    """Four prompts of 40 tokens fill the pages of 1,024: a fifth would be learned at the cost of those who are served."""
    engine = Small()
    names = [engine.send(f"s{i}", prompt(i, 40), learn=True, outputs=3) for i in range(5)]
    engine.queued = 4  # as the worker reports at the end of the step
    engine.step()
    assert set(engine.scheduled) == set(names[:4])
    engine.step()
    assert names[4] not in engine.scheduled
    engine.queued = 3
    engine.step()
    assert engine.begins(names[4])


def test_a_prompt_longer_than_the_backlog_has_its_turn() -> None:
    """It needs all of it, and others come all the time: who came later does not go before it."""
    engine = Small(queued=1)
    engine.step()
    long = engine.send("long", prompt(0, 1500), learn=True)
    others = []
    for i in range(4):
        others.append(engine.send(f"s{i}", prompt(i + 1, 40), learn=True))
        reader = engine.send(f"t{i}", prompt(i + 1, 40))
        engine.step()
        assert long not in engine.scheduled
        assert not set(others) & set(engine.scheduled), "they came later"
        assert reader in engine.scheduled, "who learns nothing needs no room"
    engine.queued = 0
    engine.step()
    assert engine.begins(long)
    for _ in range(3):
        engine.step()
    assert all(name not in engine.scheduler.requests for name in (long, *others)), "and then all of them"


def test_who_leaves_while_it_waits_holds_up_nobody() -> None:
    engine = Small(queued=4)
    engine.step()
    waiting = engine.send("a", prompt(0, 1500), learn=True)
    engine.step()
    other = engine.send("b", prompt(1, 40), learn=True)
    engine.scheduler.finish_requests(waiting, engine.scheduler.requests[waiting].status.FINISHED_ABORTED)
    engine.queued = 3
    engine.step()
    assert engine.begins(other)


def test_a_request_that_is_preempted_does_not_wait_for_its_own_tokens() -> None:
    """Its chunks, and its open page, are what waits: nothing but itself could make room."""
    engine = Small()
    name = engine.send("a", prompt(0, 1000), learn=True, outputs=50, ttt_learn_output=1)
    engine.step()
    engine.queued, engine.report.pending = 4, 1024
    engine.step()
    scheduler: Any = engine.scheduler
    request = scheduler.requests[name]
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    assert engine.begins(name)


def test_what_others_answers_leave_open_keeps_nobody_out() -> None:
    """Pages of answers that are being learned are never empty: only what will be learned without them counts."""
    engine = Small()
    engine.send("a", prompt(0, 100), learn=True, outputs=200, ttt_learn_output=1)
    engine.step()
    engine.report.pending = 200
    engine.step()
    long = engine.send("b", prompt(1, 1500), learn=True)
    engine.report.pending = 200
    engine.step()
    assert long in engine.scheduled
