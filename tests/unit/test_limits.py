"""What is not learned: what repeats itself, and what is beyond the hour's tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.engine.limits.limits import Allowance, repetitive
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import Rows

pytestmark = pytest.mark.unit


def test_what_repeats_itself_is_found() -> None:
    draw = torch.randint(0, 8192, (1025,), generator=torch.Generator().manual_seed(0)).tolist()
    line = draw[:20]
    assert repetitive(draw, 0, 256, 8, 0.15) == []
    assert repetitive((line * 60)[:1025], 0, 256, 8, 0.15) == [(0, 256), (256, 512), (512, 768), (768, 1024)]
    assert repetitive(draw[:513] + (line * 30)[:512], 0, 256, 8, 0.15) == [(512, 768), (768, 1024)]
    assert repetitive((line * 60)[:1025], 0, 256, 8, 0) == [], "switched off"
    assert repetitive([5] * 40, 0, 256, 8, 0.15) == [], "too little to say"
    assert repetitive((line * 60)[:1025], 700, 256, 8, 0.15) == [(700, 956)], "from where it is new"
    assert repetitive([5] * 40, 0, 128, 48, 0.15) == [], "too short to be learned anyway"


def test_a_chunk_that_repeats_itself_is_not_queued() -> None:
    h, a = torch.zeros(32, 2), torch.zeros(32, 2)
    backlog = Backlog(4, 8, 2, h, a)
    backlog.start("r", RequestPlan(1, 25, learn=True, learn_output=False, repetitive=[(8, 16)]))
    backlog.take([Rows("r", 0, 0, torch.arange(1, 25))], h, a)
    assert [chunk.first for chunk in backlog.queues[1]] == [0, 16]
    assert [(chunk.first, chunk.rows) for chunk in backlog.repetitive] == [(8, 8)]
    assert backlog.room == 2


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 7200)), min_size=1, max_size=30))
def test_never_more_than_the_hours_tokens_and_a_refill(requests: list[tuple[int, float]]) -> None:
    """In any stretch of time: at most what a full allowance holds, and what has come in since."""
    allowance, now, taken = Allowance(), 0.0, []
    for tokens, pause in requests:
        now += pause
        if allowance.take(tokens, 1000, now):
            taken.append((now, tokens))
    for i, (begin, _) in enumerate(taken):
        for j in range(i, len(taken)):
            assert sum(n for _, n in taken[i : j + 1]) <= 1000 * (1 + (taken[j][0] - begin) / 3600) + 1e-6


def test_an_allowance_can_be_switched_off_and_is_spent_by_answers() -> None:
    allowance = Allowance()
    assert all(allowance.take(10**9, 0) for _ in range(3))
    assert allowance.take(600, 1000, now=0.0)
    allowance.spend(600)
    assert not allowance.take(1, 1000, now=0.0)
    assert allowance.take(1, 1000, now=800.0)
    assert not Allowance().take(1001, 1000, now=0.0), "more than an hour's"
