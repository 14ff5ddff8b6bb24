"""The no-regret scale: what is measured, what it says, and that the oracle's own says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_worker_compute import V, make

from vllm_ttt.config import LearnConfig, TTTConfig
from vllm_ttt.engine.familiar import PAST, Past
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.no_regret import NoRegret
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.backlog import Chunk
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.measuring import Measuring
from vllm_ttt.worker.micro_step import Delta, accumulate
from vllm_ttt.worker.scale import add, choose, measured
from vllm_ttt.worker.scaled import scaled_losses
from vllm_ttt.worker.step_view import Rows

pytestmark = pytest.mark.unit

LEARN = LearnConfig(chunk=16, max_loss=2.0)
PROMPT = 45  # pairs 0-15, 16-31 and 32-43 are its chunks


def test_losses_under_a_scale_are_those_of_a_scaled_delta() -> None:
    compute = make()
    tail, scales = compute.tail, torch.tensor([0.0, 0.5, 1.25])
    tail.bo_D, tail.bgu_2F, tail.bd_D = torch.randn(32), torch.randn(128), torch.randn(32)
    delta = Delta(*(torch.randn_like(x) for x in Delta.zeros(tail, 2).tensors()))
    h, a = torch.randn(2, 7, 32), torch.randn(2, 7, 48)
    t, w = torch.randint(0, V, (2, 7)), torch.rand(2, 7)
    w[1, 4:] = 0
    found = scaled_losses(tail, delta, scales, h, a, t, w)
    for k, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(found[:, k], accumulate(tail, delta.times(scale), h, a, t, w, None))
    assert float((found[:, 0] - found[:, 2]).abs().min()) > 1e-3, "the delta does nothing: the comparison would prove nothing"


@given(
    requests=st.lists(st.tuples(st.lists(st.floats(0.5, 9), min_size=6, max_size=6), st.integers(8, 256)), max_size=8),
    scales=st.sampled_from([(0.0, 0.25, 0.5, 0.75, 1.0, 1.25), (0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.3, 0.6, 0.9)]),
    memory=st.sampled_from([1.0, 0.75, 0.0]),
)
def test_it_is_the_oracles(requests: list[tuple[list[float], int]], scales: tuple[float, ...], memory: float) -> None:
    learn = LearnConfig(scales=scales, scale_memory=memory)
    oracle, past = NoRegret(learn), [0.0] * len(scales)
    for losses, tokens in requests:
        losses = losses[: len(measured(scales))]
        past = add(past, scales, losses, tokens / learn.chunk, memory)
        oracle.add(losses, tokens)
        assert choose(past, scales, learn.scale_rate) == pytest.approx(oracle.chosen, abs=1e-4)
    assert past == pytest.approx(oracle.losses.tolist(), abs=1e-6)


def test_it_follows_what_serves_best() -> None:
    scales, past = LEARN.scales, [0.0] * 6
    assert choose(past, scales, 200) == pytest.approx(0.625), "nothing is known: the mean"
    for _ in range(4):
        past = add(past, scales, [2.0, 1.95, 1.9], 1.0, 0.75)  # measured at 0, 0.5 and 1.25
    assert choose(past, scales, 200) > 1.0
    served = []
    for _ in range(5):
        past = add(past, scales, [2.0, 2.1, 2.4], 1.0, 0.75)
        served.append(choose(past, scales, 200))
    assert served == sorted(served, reverse=True)
    assert served[2] < 0.3, "what helped before does not hold up for long what harms now"
    assert served[-1] < 0.1


@given(
    seed=st.integers(0, 1000),
    before=st.integers(0, 3 * PAST),
    shared=st.integers(0, 300),
    familiar=st.sampled_from([0, 0.5, 1.0]),
    start=st.sampled_from([0, 50, 390, 1000]),
)
def test_familiarity_is_the_oracles(seed: int, before: int, shared: int, familiar: float, start: int) -> None:
    draw = np.random.default_rng(seed)
    old = draw.integers(0, 5000, before).tolist()
    prompt = (old[-shared:] if shared else []) + draw.integers(0, 5000, 400).tolist()
    past, oracle = Past(), NoRegret(LearnConfig(familiar=familiar))
    past.note(old)
    oracle.note(old)
    ceiling = past.ceiling(prompt, start, familiar, 1.25)
    assert 0 <= ceiling <= 1.25
    assert min(0.625, ceiling) == pytest.approx(oracle.served(prompt, start), abs=0.01)


def test_a_new_subject_is_seen() -> None:
    past, draw = Past(), np.random.default_rng(0)
    assert past.ceiling([1, 2, 3], 0, 0.5, 1.25) == 1.25, "nothing is known"
    mine = draw.integers(0, 60, 6000).tolist()
    past.note(mine)
    assert past.ceiling(draw.integers(0, 60, 300).tolist(), 0, 0.5, 1.25) == 1.25
    assert past.ceiling(draw.integers(60, 120, 300).tolist(), 0, 0.5, 1.25) == 0.0
    chat = [*mine[:900], *draw.integers(60, 120, 300).tolist()]
    assert past.ceiling(chat, 0, 0.5, 1.25) == 1.25, "a chat goes on as it began"
    assert past.ceiling(chat, 900, 0.5, 1.25) < 0.1, "judged by what is new in it"
    back = Past.from_text(past.to_text())
    assert back.ceiling(chat, 900, 0.5, 1.25) == past.ceiling(chat, 900, 0.5, 1.25)
    assert back.pairs.tolist() == past.pairs.tolist()
    assert past.ceiling([7], 0, 0.5, 1.25) == 1.25, "a prompt without a pair says nothing"
    assert past.pairs.nbytes <= 4 * PAST


@pytest.mark.parametrize(
    "scales", [(), (1.0, 0.0), (0.5, 1.0), (0.0,), (0.0, 0.0), (0.0, 3.0), (0.0, 0.5, 0.25), tuple(range(20))]
)
def test_scales_that_mean_nothing_are_refused(scales: tuple[float, ...]) -> None:
    from vllm_ttt.config import parse_config

    with pytest.raises(ConfigError, match="scales"):
        parse_config({"learn": {"scales": list(scales)}})


def test_one_scale_switches_it_off() -> None:
    learn = TTTConfig.model_validate({"learn": {"scales": [1]}}).learn
    assert choose([0.0], learn.scales, learn.scale_rate) == 1.0
    assert NoRegret(learn).served([1] * 10) == 1.0


class Reading:
    """A request of one session on its way through the backlog; PROMPT tokens in two steps."""

    def __init__(self, learn: LearnConfig = LEARN) -> None:
        self.compute = make()
        self.backlog, self.deltas = self.compute.backlog, self.compute.deltas
        self.deltas.scales = learn.scales
        self.measuring = Measuring(learn, self.compute, self.backlog, self.deltas, Clock(torch.device("cpu")))
        row = self.deltas.row(7)
        for x in self.deltas.masters.tensors():
            x[row].normal_(std=0.3)
        torch.manual_seed(1)
        self.h, self.a, self.t = torch.randn(PROMPT, 32), torch.randn(PROMPT, 48), torch.randint(0, V, (PROMPT,))
        self.backlog.start("r", RequestPlan(7, PROMPT, learn=True, learn_output=False))

    def read(self, first: int, end: int) -> None:
        self.backlog.take([Rows("r", 0, first, self.t[first:end])], self.h[first:end], self.a[first:end])

    def learn_one(self) -> None:
        """What a commit does to the master."""
        self.backlog.advance(self.backlog.heads()[0])
        for x in self.deltas.masters.tensors():
            x[self.deltas.rows[7]] += 0.5

    def expected(self, delta: Delta, first: int, end: int) -> torch.Tensor:
        rows = slice(first, end, 2)
        n = len(self.t[rows])
        losses = [
            accumulate(
                self.compute.tail, delta.times(s), self.h[None, rows], self.a[None, rows], self.t[None, rows],
                torch.full((1, n), 1 / n), None,
            )
            for s in self.measuring.scales
        ]  # fmt: skip
        return torch.cat(losses)


@pytest.mark.parametrize("tokens", [1000, 3])
def test_the_last_chunk_is_measured_before_anything_is_learned(tokens: int) -> None:
    """Whatever the budget is, and in however many tiles."""
    reading = Reading()
    expected = reading.expected(Delta(*(x[:1].clone() for x in reading.deltas.read(7).tensors())), 32, 44)
    reading.read(0, PROMPT - 1)
    assert reading.measuring.sessions() == {7}, "it waits to be measured"
    spent = []
    while reading.measuring.sessions():
        spent.append(reading.measuring.run(tokens))
    assert len(spent) == (1 if tokens == 1000 else 2)
    assert sum(spent) == 6, "6 rows under 3 scales, forward only"
    (moved,) = reading.measuring.collect()
    session, chunk = reading.deltas.session(7), list(reading.backlog.queues[7])[-1]
    assert moved == 7
    assert chunk.measured is not None
    assert chunk.measured[0] == pytest.approx(expected[0].item(), rel=1e-5)
    assert chunk.measured[0] != pytest.approx(chunk.measured[1], abs=1e-3)
    assert session.losses == pytest.approx(add([0.0] * 6, LEARN.scales, expected.tolist(), 12 / 16, 0.75), abs=1e-6)
    assert session.chosen == choose(session.losses, LEARN.scales, LEARN.scale_rate) != session.scale
    assert not reading.deltas.pinned


def test_a_prompt_that_was_learned_in_part_is_measured_under_what_served_it() -> None:
    reading = Reading()
    master = Delta(*(x.clone() for x in reading.deltas.read(7).tensors()))
    reading.read(0, 20)
    assert not reading.measuring.sessions()
    reading.deltas.session(7).serving = master
    reading.learn_one()
    reading.read(20, PROMPT - 1)
    reading.measuring.run(1000)
    reading.measuring.collect()
    chunk = list(reading.backlog.queues[7])[-1]
    assert chunk.measured is not None
    assert chunk.measured[0] == pytest.approx(reading.expected(master, 32, 44)[0].item(), rel=1e-5)
    expected = add([0.0] * 6, LEARN.scales, reading.expected(master, 32, 44).tolist(), 12 / 16, 0.75)
    assert reading.deltas.session(7).losses == pytest.approx(expected)


def test_what_is_given_up_is_not_measured() -> None:
    reading = Reading()
    reading.read(0, PROMPT - 1)
    assert reading.measuring.sessions() == {7}
    reading.measuring.drop(reading.backlog.drop_session(7))
    assert not reading.measuring.sessions()
    assert reading.measuring.run(100) == 0


def test_what_is_not_finite_says_nothing() -> None:
    reading = Reading()
    reading.h[33:40] = float("nan")
    reading.read(0, PROMPT - 1)
    reading.measuring.run(1000)
    assert reading.measuring.collect() == []
    assert reading.deltas.session(7).losses == [0.0] * 6


def test_nothing_is_measured_where_it_is_off() -> None:
    reading = Reading(LearnConfig(chunk=16, max_loss=2.0, scales=(1.0,)))
    reading.read(0, PROMPT - 1)
    assert not reading.measuring.sessions()
    assert all(isinstance(c, Chunk) and c.measured is None for c in reading.backlog.queues[7])


@pytest.mark.parametrize(("prompt", "last"), [(45, 12), (33, 16), (35, 16), (17, 16), (10, 9)])
def test_which_chunk_is_the_last(prompt: int, last: int) -> None:
    """Where the rest of the prompt is too short to be learned, it is the one before."""
    reading = Reading()
    reading.backlog.min_chunk = 4
    reading.backlog.readings["r"].plan.prompt = prompt
    reading.read(0, min(20, prompt - 1))
    if prompt > 21:
        reading.read(20, prompt - 1)
    assert [c.rows for c in reading.backlog.last] == [last]
