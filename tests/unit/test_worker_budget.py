"""The budget: learning takes its share of the time that serving took, and no more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.worker.learn.budget import SMALLEST, Budget, tile_sizes

pytestmark = pytest.mark.unit


def make(slowdown: float = 1.25, tokens_per_step: int = 512, per_token: float = 1e-4) -> Budget:
    budget = Budget(tokens_per_step, slowdown)
    for tokens in tile_sizes(tokens_per_step):
        budget.calibrate(tokens, tokens * per_token)
    return budget


@given(st.integers(16, 65536))
def test_tile_sizes_end_with_the_step(tokens: int) -> None:
    sizes = tile_sizes(tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == tokens
    assert sizes[0] == min(SMALLEST, tokens)
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))


@given(
    st.lists(st.floats(1e-4, 2.0), min_size=20, max_size=80),
    st.floats(1.01, 3.0),
    st.floats(1e-6, 1e-2),
)
def test_learning_takes_at_most_its_share(iterations: list[float], slowdown: float, per_token: float) -> None:
    """Whatever the iterations take: seconds learned <= share of seconds served."""
    budget, served, learned = make(slowdown, per_token=per_token), 0.0, 0.0
    for seconds in iterations:
        tokens = budget.tokens()
        budget.spend(tokens)
        learned += tokens * per_token
        served += seconds
        budget.served(seconds)
        assert learned <= served * (slowdown - 1) + 1e-9


def test_steady_decoding_earns_the_smallest_tile_now_and_then() -> None:
    """Iterations too short to pay for a tile save up for one."""
    budget, learned = make(per_token=1e-3), 0
    for _ in range(1000):
        tokens = budget.tokens()
        budget.spend(tokens)
        learned += tokens
        budget.served(0.01)
    assert learned * 1e-3 == pytest.approx(1000 * 0.01 * 0.25, rel=0.1)


def test_a_long_prefill_buys_no_long_pause_later() -> None:
    budget = make()
    budget.served(10.0)
    first = budget.tokens()
    assert first == 512, "never more than a step"
    budget.spend(first)
    budget.served(0.001)
    assert budget.credit <= 32 * 1e-4 + 1e-9, "what was earned and not spent is gone, but for the smallest tile"


def test_no_slowdown_allowed_means_no_learning_while_serving() -> None:
    budget = make(slowdown=1.0)
    budget.served(100.0)
    assert budget.tokens() == 0


@given(st.lists(st.floats(0.3, 1.9), min_size=50, max_size=300), st.booleans())
def test_a_step_that_takes_longer_than_was_thought_is_paid_for(factors: list[float], late: bool) -> None:
    """Also where it is known an iteration later: seconds learned <= share of seconds served, but for the steps under way."""
    budget, learned, waiting = make(per_token=1e-3), 0.0, list[tuple[int, float]]()
    for i, factor in enumerate(factors):
        if tokens := budget.tokens():
            budget.spend(tokens)
            learned += tokens * 1e-3 * factor
            waiting.append((tokens, tokens * 1e-3 * factor))
        if not late or i % 2:
            for step in waiting:
                budget.learned(*step)
            waiting = []
        budget.served(0.1)
        assert learned <= (i + 1) * 0.1 * 0.25 + 2 * 512 * 1e-3


def test_steps_that_always_take_longer_take_no_more_than_their_share() -> None:
    """As those that are measured under the base model, too: a third more than the tile."""
    budget, learned = make(per_token=1e-3), 0.0
    for _ in range(2000):
        if tokens := budget.tokens():
            budget.spend(tokens)
            learned += (seconds := tokens * 1e-3 * 4 / 3)
            budget.learned(tokens // 2 + 1, seconds)  # of which the tile's cost is not learned
        budget.served(0.01)
    assert learned == pytest.approx(2000 * 0.01 * 0.25, rel=0.1)


def test_what_is_learned_while_nobody_is_served_costs_no_credit() -> None:
    budget = make()
    budget.served(1.0)
    before = budget.credit
    budget.learned(512, 0.06, beside=False)
    assert budget.credit == before
    assert budget.cost(511) == pytest.approx(0.0512 + 0.2 * (0.06 - 0.0512))


def test_a_prompt_but_for_its_last_token_tells_what_a_tile_costs() -> None:
    budget = make()
    budget.learned(511, 0.06)
    assert budget.cost(512) > 0.0512
    told = budget.cost(512)
    budget.learned(300, 0.02)
    assert budget.cost(512) == told, "it is less than a tile"


def test_costs_follow_what_is_measured() -> None:
    budget = make(per_token=1e-3)
    for _ in range(40):
        budget.learned(32, 0.1, beside=False)
    budget.served(0.2)
    assert budget.tokens() == 0, "50 ms do not pay for what takes 100 ms"
    budget.served(0.5)
    assert budget.tokens() == 64
