"""The backlog: whatever vLLM does with a request, each pair is learned at most once and in order, and no page is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.chunk import Chunk
from vllm_ttt.worker.capture.step_view import Rows

pytestmark = pytest.mark.unit

CHUNK, MIN_CHUNK, PAGES, WIDTH, BATCH = 8, 3, 12, 2, 24
SESSIONS = 3


@contextlib.contextmanager
def targets(backlog: Backlog) -> Iterator[list[int]]:
    """The places that a gather writes to, in order."""
    found: list[int] = []
    copy_rows = backlog._copy_rows

    def spy(*args: Any) -> None:
        copy_rows(*args)
        found.extend(args[-1].target[-1].tolist())

    with mock.patch.object(backlog, "_copy_rows", spy):
        yield found


class Request:
    """A request as the scheduler sees it. The row of position p holds 1000 number + p, and is followed by token p + 1."""

    def __init__(self, number: int, plan: RequestPlan, outputs: int):
        self.number, self.plan, self.outputs = number, plan, outputs
        self.name = f"r{number}"
        self.computed = 0
        #: tokens known: the prompt, then one more with each step that reaches the end
        self.known = plan.prompt

    @property
    def done(self) -> bool:
        return self.known >= self.plan.prompt + self.outputs


class Backlogs(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.h, self.a = torch.zeros(BATCH, WIDTH), torch.zeros(BATCH, WIDTH)
        self.backlog = Backlog(PAGES, CHUNK, MIN_CHUNK, self.h, self.a)
        self.running: dict[str, Request] = {}
        self.all: list[Request] = []
        #: session: (request, pair) in the order in which they were learned
        self.learned: dict[int, list[tuple[int, int]]] = {s: [] for s in range(SESSIONS)}
        self.sizes: list[tuple[int, int, int]] = []
        self.short: set[tuple[int, int]] = set()
        self.settled: set[str] = set()
        #: (request, pair) of prompts whose request has ended before
        self.unread: set[tuple[int, int]] = set()

    @precondition(lambda self: len(self.running) < 4)
    @rule(
        session=st.integers(0, SESSIONS - 1),
        prompt=st.integers(1, 30),
        outputs=st.integers(1, 12),
        learn=st.booleans(),
        learn_output=st.booleans(),
        repeats=st.sampled_from([(0, 0), (0, 8), (4, 20), (0, 30)]),
    )
    def start(self, session: int, prompt: int, outputs: int, learn: bool, learn_output: bool, repeats: tuple[int, int]) -> None:
        if any(r.plan.session == session for r in self.running.values()):
            return  # read-your-writes: a session's learning requests follow each other
        request = Request(
            len(self.all), RequestPlan(session, prompt, learn, learn and learn_output, repetitive=[repeats]), outputs
        )
        self.all.append(request)
        self.running[request.name] = request
        self.backlog.start(request.name, request.plan)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One iteration: each running request gets some of its next tokens, or none."""
        view, first = [], 0
        for request in self.running.values():
            most = min(request.known - request.computed, BATCH - first)
            count = data.draw(st.integers(0, most), label=request.name)
            if not count:
                continue
            reaches_end = request.computed + count == request.known
            rows = torch.arange(request.computed, request.computed + count)
            self.h[first : first + count] = (1000 * request.number + rows)[:, None]
            self.a[first : first + count] = -(1000 * request.number + rows)[:, None].float()
            # The token after the last row is known where the step has sampled it.
            view.append(Rows(request.name, first, request.computed, rows + 1))
            first += count
            request.computed += count
            request.known += reaches_end
        needed = self.backlog.pages_needed(view)
        while self.backlog.room < needed and self.backlog.queues:
            self.learn_one(next(iter(self.backlog.queues)))
        assert not self.backlog.lacking(view), "sessions of which nothing waits fit"
        room = self.backlog.room
        with targets(self.backlog) as written:
            self.backlog.take(view, self.h, self.a)
        assert len(written) == len(set(written)), "two rows for one place: on CUDA either may win"
        assert room - len(self.backlog.free) == needed
        for request in [r for r in self.running.values() if r.done]:
            self.leave(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """vLLM computes the request again from the start, or from a block that it still has."""
        request = data.draw(st.sampled_from(list(self.running.values())))
        request.computed = data.draw(st.integers(0, request.computed))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(list(self.running.values()))))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort_an_iteration_late(self, data: st.DataObject) -> None:
        """Asynchronous scheduling: one iteration ran ahead of the end, and its pair does not count."""
        request = data.draw(st.sampled_from(list(self.running.values())))
        pairs = max(request.plan.prompt - 1, request.known - 1 - data.draw(st.integers(0, 1)))
        request.known = min(request.known, pairs + 1)
        self.leave(request, pairs)

    @precondition(lambda self: self.backlog.queues)
    @rule(data=st.data())
    def learn(self, data: st.DataObject) -> None:
        self.learn_one(data.draw(st.sampled_from(list(self.backlog.queues))))

    @rule(session=st.integers(0, SESSIONS - 1))
    def drop(self, session: int) -> None:
        self.backlog.drop_session(session)
        assert session not in self.backlog.queues

    @rule()
    def report(self) -> None:
        """What the worker does after each step."""
        for chunk in self.backlog.short:
            assert 0 < chunk.rows < MIN_CHUNK
        self.backlog.short.clear()
        for chunk in self.backlog.repetitive:
            first, end = self.all[int(chunk.request[1:])].plan.repetitive[0]
            assert 2 * (min(end, chunk.end) - max(first, chunk.first)) > chunk.rows
        self.backlog.repetitive.clear()
        for chunk in self.backlog.unread:
            self.unread.update((int(chunk.request[1:]), pair) for pair in range(chunk.first, chunk.end))
        self.backlog.unread.clear()
        for name, session in self.backlog.settled():
            assert name not in self.settled, "settled twice"
            assert not any(c.request == name for q in self.backlog.queues.values() for c in q)
            assert session == self.all[int(name[1:])].plan.session
            self.settled.add(name)
            self.backlog.forget(name)

    def leave(self, request: Request, pairs: int | None = None) -> None:
        del self.running[request.name]
        self.backlog.finish(request.name, pairs)

    def learn_one(self, session: int) -> None:
        chunk: Chunk = self.backlog.queues[session][0]
        rows = self.backlog.h_PCD[chunk.page, : chunk.rows, 0].long()
        attention = self.backlog.a_PCQ[chunk.page, : chunk.rows, 1].long()
        tokens = self.backlog.t_PC[chunk.page, : chunk.rows]
        assert torch.equal(attention, -rows)
        assert torch.equal(tokens, rows % 1000 + 1), "each row keeps the token that follows it"
        assert MIN_CHUNK <= chunk.rows <= CHUNK
        pairs = [(row // 1000, row % 1000) for row in rows.tolist()]
        assert len({number for number, _ in pairs}) == 1, "a chunk never spans two requests"
        self.learned[session] += pairs
        self.backlog.advance(chunk)
        self.backlog.settle(chunk)

    @invariant()
    def nothing_is_learned_twice_or_out_of_order(self) -> None:
        for session, pairs in getattr(self, "learned", {}).items():
            assert pairs == sorted(set(pairs))
            for number, pair in pairs:
                plan = self.all[number].plan
                assert plan.session == session
                assert plan.learn
                assert pair < plan.prompt - 1 or plan.learn_output
                assert pair < self.all[number].known - 1, "the pair is of this request"

    @invariant()
    def pages_balance(self) -> None:
        if not hasattr(self, "backlog"):
            return
        used = [c.page for q in self.backlog.queues.values() for c in q]
        used += [r.open.page for r in self.backlog.readings.values() if r.open]
        assert sorted(used + self.backlog.free + self.backlog.returned) == list(range(PAGES))
        assert self.backlog.pending >= 0

    def teardown(self) -> None:
        """Everybody leaves, everything is learned: nothing is held, and whoever was to learn has been reported settled."""
        if not hasattr(self, "backlog"):
            return
        for request in list(self.running.values()):
            self.leave(request)
        while self.backlog.queues:
            self.learn_one(next(iter(self.backlog.queues)))
        self.report()
        assert self.backlog.room == PAGES
        assert not self.backlog.readings
        assert not self.backlog.closing
        assert self.settled == {r.name for r in self.all if r.plan.learn}
        assert self.unread.isdisjoint(pair for pairs in self.learned.values() for pair in pairs)


Backlogs.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBacklogs = Backlogs.TestCase


def take(backlog: Backlog, name: str, first: int, count: int) -> None:
    rows = torch.arange(first, first + count)
    h = torch.zeros(64, WIDTH)
    h[:count] = rows[:, None]
    backlog.take([Rows(name, 0, first, rows + 1)], h, h)


def make(prompt: int, learn_output: bool = False) -> Backlog:
    buffer = torch.zeros(64, WIDTH)
    backlog = Backlog(PAGES, CHUNK, MIN_CHUNK, buffer, buffer)
    backlog.start("r", RequestPlan(7, prompt, True, learn_output))
    return backlog


def queued(backlog: Backlog) -> list[int]:
    return [chunk.rows for chunk in backlog.queues.get(7, ())]


def test_every_pair_of_a_prompt_is_learned() -> None:
    backlog = make(prompt=21)
    take(backlog, "r", 0, 5)
    assert (queued(backlog), backlog.pending, backlog.reading_sessions()) == ([], 5, {7})
    take(backlog, "r", 5, 7)
    assert queued(backlog) == [8]
    take(backlog, "r", 12, 9)
    assert queued(backlog) == [8, 8, 4]
    assert not backlog.reading_sessions()
    take(backlog, "r", 21, 1)
    assert queued(backlog) == [8, 8, 4], "the answer is not learned"


def test_the_answers_first_pair_is_the_prompts_last_position() -> None:
    backlog = make(prompt=9, learn_output=True)
    take(backlog, "r", 0, 9)
    assert queued(backlog) == [8]
    for position in range(9, 13):
        take(backlog, "r", position, 1)
    backlog.finish("r", pairs=8 + 5)
    assert queued(backlog) == [8, 5]


@pytest.mark.parametrize("answer", [7, 8, 9, 16])
def test_a_row_beyond_the_end_is_not_learned(answer: int) -> None:
    """Asynchronous scheduling: the step after the last token has run when the worker hears of the end. Where its row fills a
    chunk, or begins one, it is not learned either."""
    backlog = make(prompt=9, learn_output=True)
    take(backlog, "r", 0, 9)
    for position in range(9, 9 + answer):
        take(backlog, "r", position, 1)
    backlog.finish("r", pairs=8 + answer)
    assert sum(queued(backlog)[1:]) + sum(chunk.rows for chunk in backlog.short) == answer
    assert max(chunk.end for chunk in [*backlog.queues[7], *backlog.short]) == 8 + answer
    assert backlog.room == PAGES - len(queued(backlog))


@pytest.mark.parametrize("beyond", [1, 2, 3, 4])
@pytest.mark.parametrize("answer", [7, 8, 9, 13, 14, 15, 16, 17])
def test_accepted_drafts_beyond_the_end_are_not_learned(answer: int, beyond: int) -> None:
    """One step brings several rows: those beyond the last token may have closed the chunk in which it is."""
    backlog = make(prompt=9, learn_output=True)
    take(backlog, "r", 0, 9)
    take(backlog, "r", 9, answer - 4)
    take(backlog, "r", 9 + answer - 4, 3 + beyond)
    backlog.finish("r", pairs=8 + answer)
    learned = [*backlog.queues[7], *backlog.short]
    assert sum(chunk.rows for chunk in learned) - 8 == answer
    assert max(chunk.end for chunk in learned) == 8 + answer
    assert all(chunk.rows < MIN_CHUNK for chunk in backlog.short)
    assert min(queued(backlog)) >= MIN_CHUNK
    assert backlog.room == PAGES - len(queued(backlog))
    assert backlog.closing["r"].unlearned == len(queued(backlog)), "or its session would wait for ever"


@pytest.mark.parametrize("beyond", [1, 2])
@pytest.mark.parametrize("answer", [0, 1, 5, 7, 8, 9, 15, 16])
def test_what_is_sampled_anew_is_learned_in_its_place(answer: int, beyond: int) -> None:
    """With `reset_prefix_cache` and asynchronous scheduling vLLM throws away what it sampled last, which nobody was served."""
    backlog = make(prompt=9, learn_output=True)
    take(backlog, "r", 0, 9)
    for position in range(9, 8 + answer + beyond):
        take(backlog, "r", position, 1)
    backlog.resume("r", pairs=8 + answer)
    rows, h = torch.arange(8 + answer + 4), torch.zeros(64, WIDTH)
    for first in (0, 8 + answer):
        again = rows[first:][: 8 + answer if first == 0 else None]
        backlog.take([Rows("r", 0, first, again + 1 + 500 * (again >= 8 + answer))], h, h)
    backlog.finish("r", pairs=8 + answer + 4)
    chunks = [*backlog.queues[7], *backlog.short]
    said = {}
    for chunk in chunks:
        said |= dict(zip(range(chunk.first, chunk.end), backlog.t_PC[chunk.page, : chunk.rows].tolist(), strict=True))
    assert said == {pair: pair + 1 + 500 * (pair >= 8 + answer) for pair in range(8 + answer + 4)}
    assert sum(chunk.rows for chunk in chunks) == len(said), "each once"
    assert backlog.room == PAGES - len(backlog.queues[7])


def test_a_prompt_that_was_not_read_to_its_end_loses_its_open_chunk() -> None:
    backlog = make(prompt=30)
    take(backlog, "r", 0, 13)
    backlog.finish("r", pairs=29)
    assert queued(backlog) == [8]
    assert backlog.room == PAGES - 1
    assert [(chunk.first, chunk.end) for chunk in backlog.unread] == [(8, 29)], "nor is the rest learned: all of it is said"


@pytest.mark.parametrize("again", [0, 5, 20])
def test_what_had_been_read_before_a_preemption_is_said_apart(again: int) -> None:
    """Of a prompt whose client leaves; and nothing of a request that learns nothing."""
    backlog = make(prompt=30)
    backlog.start("other", RequestPlan(3, 30, False, False))
    take(backlog, "r", 0, 13)
    backlog.preempt("r")
    take(backlog, "r", 0, again)
    for request in ("r", "other"):
        backlog.finish(request, pairs=29)
    said = [(chunk.first, chunk.end) for chunk in (*backlog.lost, *backlog.unread)]
    assert said == ([(0, 13), (13, 29)] if again < 13 else [(16, 29)])
    assert sum(queued(backlog)) == (16 if again == 20 else 0)


def test_what_is_dropped_is_told() -> None:
    """Queued chunks, the open one, and the rest of the prompt: all its pairs, once."""
    backlog = make(prompt=31)
    take(backlog, "r", 0, 21)
    lost = backlog.drop_session(7)
    assert [chunk.rows for chunk in lost] == [8, 8, 5, 9]
    take(backlog, "r", 21, 10)
    assert not backlog.queues
    assert backlog.settled() == [("r", 7)]
    assert backlog.drop_session(7) == []


@pytest.mark.parametrize("spoiled", [257, 7], ids=["repetitive", "short"])
def test_a_page_is_nobody_elses_within_a_gather(spoiled: int) -> None:
    """A chunk that is not learned gives its page back while its rows are still to be copied there: the next chunk, here of
    another session, must not get it before the next gather. On CUDA either row could win."""
    h = torch.zeros(600, WIDTH)
    backlog = Backlog(4, 256, 8, h, h)
    backlog.start("spoiled", RequestPlan(1, spoiled, True, False, repetitive=[(0, 256)]))
    backlog.start("victim", RequestPlan(2, 257, True, False))
    view = [
        Rows("spoiled", 0, 0, torch.arange(spoiled)),
        Rows("victim", spoiled, 0, torch.arange(257) + 10000),
    ]
    with targets(backlog) as written:
        backlog.take(view, h, h)
    assert len(written) == len(set(written))
    (chunk,) = backlog.queues[2]
    assert torch.equal(backlog.t_PC[chunk.page], torch.arange(256) + 10000)
    assert backlog.room == 3


def test_a_prompt_and_its_answer_need_pages_of_their_own() -> None:
    h = torch.zeros(64, WIDTH)
    backlog = Backlog(3, CHUNK, MIN_CHUNK, h, h)
    backlog.start("r", RequestPlan(7, 12, True, True))
    view = [Rows("r", 0, 0, torch.arange(12))]
    assert backlog.pages_needed(view) == 3
    backlog.take(view, h, h)
    assert not backlog.free


def test_who_finds_no_room_is_named() -> None:
    """Open chunks of many requests of one session may be more than the pages: the last to come find none."""
    h = torch.zeros(64, WIDTH)
    backlog = Backlog(3, CHUNK, MIN_CHUNK, h, h)
    view = []
    for i in range(5):
        backlog.start(f"q{i}", RequestPlan(1, 20, True, True))
        view.append(Rows(f"q{i}", i, 0, torch.arange(1)))
    assert backlog.lacking(view) == ["q3", "q4"]


def test_what_stands_for_an_image_may_be_no_token_of_the_model() -> None:
    """It is never learned, but its loss is looked up."""
    h = torch.zeros(4, 2)
    backlog = Backlog(2, 4, 1, h, h, vocabulary=10)
    backlog.start("r", RequestPlan(7, 5, True, False))
    backlog.take([Rows("r", 0, 0, torch.tensor([3, 70, 9, 4]))], h, h)
    (chunk,) = backlog.heads()
    assert backlog.t_PC[chunk.page].tolist() == [3, 9, 9, 4]
