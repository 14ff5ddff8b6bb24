"""What CUDA graphs need of `Compute`, tried without CUDA: a batch that is padded to a graph's shape gives the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.backlog import Backlog
from vllm_ttt.worker.compute import Compute
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.micro_step import Tail

pytestmark = pytest.mark.unit

D, Q, F, V, R = 32, 48, 64, 96, 8


def make() -> Compute:
    torch.manual_seed(0)
    weight = lambda *shape: torch.randn(*shape) * 0.1  # noqa: E731
    ones = torch.ones(D)
    tail = Tail(
        weight(D, Q), weight(2 * F, D), weight(D, F), weight(V, D), ones, ones, 1e-5, 1e-5, weight(R, Q), weight(R, D),
        weight(R, F), {"o": 3.0, "g": 3.0, "u": 3.0, "d": 3.0},
    )  # fmt: skip
    backlog = Backlog(4, 16, 1, torch.zeros(1, D), torch.zeros(1, Q))
    backlog.h_PCD.normal_()
    backlog.a_PCQ.normal_()
    backlog.t_PC.random_(0, V)
    return Compute(tail, LearnConfig(chunk=16, max_loss=2.0), backlog, Deltas(tail, 3))


class Eager:
    """Stands where a captured graph stands: the same function, on inputs of the graph's shape."""

    def __init__(self, function: Any):
        self.function, self.shapes = function, []

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(values[0].shape))
        return self.function(None, *values)


def learn(compute: Compute) -> torch.Tensor:
    """Two tiles of a chunk of session 0, one of session 2's; then both step."""
    flat = torch.stack((torch.arange(8), torch.arange(16, 24)))
    weight = torch.full((2, 8), 1 / 16)
    compute.score(flat, weight, torch.tensor([0, 2]), torch.tensor([False, False]))
    compute.score(flat[:1, :5] + 8, weight[:1, :5], torch.tensor([0]), torch.tensor([True]))
    return compute.apply(torch.tensor([0, 2]), torch.tensor([13 / 16, 8 / 16])).clone()


def test_a_padded_batch_learns_the_same() -> None:
    plain, padded = make(), make()
    score, apply = Eager(padded._score), Eager(padded._apply)
    padded.score_graphs[3, 16, 0] = score  # type: ignore[assignment]
    padded.apply_graphs[3] = apply  # type: ignore[assignment]
    expected, values = learn(plain), learn(padded)
    assert score.shapes == [(3, 16), (3, 16)], "the graph of the next larger shape was not taken"
    assert apply.shapes == [(3,)]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(padded.deltas.masters.tensors(), plain.deltas.masters.tensors(), strict=True):
        torch.testing.assert_close(one[:3], other[:3], rtol=1e-3, atol=1e-6)
    assert float(plain.deltas.masters.o[0].norm()) > 0
    assert float(padded.deltas.masters.o[1].norm()) == 0, "a session that was not in the batch moved"


def test_what_is_not_finite_in_one_session_stays_there() -> None:
    compute, clean = make(), make()
    compute.backlog.h_PCD[0].fill_(float("nan"))  # the page of session 0
    for c in (compute, clean):
        c.score_graphs[3, 16, 0] = Eager(c._score)  # type: ignore[assignment]
    values, expected = learn(compute), learn(clean)
    assert values[0].tolist() == [0.0, 1.0], "the session that is not finite stepped, or the other did not"
    assert float(compute.deltas.masters.o[0].norm()) == 0
    torch.testing.assert_close(compute.deltas.masters.gu[2], clean.deltas.masters.gu[2])
    assert torch.isfinite(expected).all()


def test_a_padded_batch_measures_the_same() -> None:
    plain, padded = make(), make()
    for c in (plain, padded):
        for x in c.deltas.masters.tensors():
            torch.manual_seed(3)
            x.normal_(std=0.3)
    graph = Eager(padded._measure)
    padded.measure_graphs[3, 16, 0] = graph  # type: ignore[assignment]
    flat, weight, rows = torch.stack((torch.arange(8), torch.arange(16, 24))), torch.full((2, 8), 1 / 8), torch.tensor([2, 0])
    found = padded.measure(flat, weight, rows)
    assert graph.shapes == [(3, 16)]
    torch.testing.assert_close(found, plain.measure(flat, weight, rows))
    assert found.shape == (2, 3)
