"""What CUDA graphs need of `Compute`, tried without CUDA: a batch that is padded to a graph's shape gives the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.learn.compute import Compute, Packed
from vllm_ttt.worker.step.micro_step import Tail

pytestmark = pytest.mark.unit

D, Q, F, V, R = 32, 48, 64, 96, 8
LEARN = LearnConfig(chunk=16, max_loss=2.0)
MODULES = ["od", "ogud", "d", "gu"]


def make(modules: str = "ogud") -> Compute:
    torch.manual_seed(0)
    weight = lambda *shape: torch.randn(*shape) * 0.1  # noqa: E731
    ones = torch.ones(D)
    tail = Tail(
        weight(D, Q), weight(2 * F, D), weight(D, F), weight(V, D), ones, ones, 1e-5, 1e-5, weight(R, Q), weight(R, D),
        weight(R, F), {"o": 3.0, "g": 3.0, "u": 3.0, "d": 3.0}, modules,
    )  # fmt: skip
    backlog = Backlog(4, 16, 1, torch.zeros(1, D), torch.zeros(1, Q))
    backlog.h_PCD.normal_()
    backlog.a_PCQ.normal_()
    backlog.t_PC.random_(0, V)
    return Compute(tail, LEARN, backlog, Deltas(tail, 3, LEARN.rate))


class Eager:
    """Stands where a captured graph stands: the same function, on inputs of the graph's shape."""

    def __init__(self, function: Any):
        self.function, self.shapes = function, []

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(values[0].shape))
        return self.function(None, *values)


def rows(first: int, second: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of so many rows of the pages 0 and 1, the shorter one filled up."""
    flat, weight = torch.zeros(2, max(first, second), dtype=torch.int64), torch.zeros(2, max(first, second))
    for page, count in enumerate((first, second)):
        flat[page] = 16 * page
        flat[page, :count] += torch.arange(count)
        weight[page, :count] = 1 / count
    return flat, weight


def learn(compute: Compute) -> torch.Tensor:
    """Two chunks of session 0, of 13 and of 8 rows; two of session 2, of 8 and of 13."""
    values = []
    for first, second in ((13, 8), (8, 13)):
        share = torch.tensor([first / 16, second / 16])
        values.append(compute.step(*rows(first, second), torch.tensor([0, 2]), share).clone())
    return torch.stack(values)


@pytest.mark.parametrize("modules", MODULES)
def test_a_padded_batch_learns_the_same(modules: str) -> None:
    plain, padded = make(modules), make(modules)
    graph = Eager(padded._step)
    padded.step_graphs[3, 16, 0] = graph  # type: ignore[assignment]
    padded.step_graphs[5, 16, 0] = Eager(None)  # type: ignore[assignment]
    expected, values = learn(plain), learn(padded)
    assert graph.shapes == [(3, 16), (3, 16)], "the graph of the next larger shape was not taken"
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-6)
    assert expected.shape == (2, 3 + len(modules), 2)
    applied, loss, rate = expected[:, 0], expected[:, 1], expected[:, 2]
    assert bool((applied == 1).all())
    assert bool((loss > 0).all())
    assert rate[0].tolist() == pytest.approx([LEARN.rate] * 2)
    assert not torch.isclose(rate[1], rate[0], rtol=1e-3).any(), "the second chunk moves the rate"
    for one, other in zip(padded.deltas.masters.tensors(), plain.deltas.masters.tensors(), strict=True):
        torch.testing.assert_close(one[:3], other[:3], rtol=1e-2, atol=1e-2 if one.dtype == torch.bfloat16 else 1e-5)
        if one.dim() > 1 and one.shape[1]:
            assert float(other[0].float().norm()) > 0
            assert float(one[1].float().norm()) == 0, "a session that was not in the batch moved"
    assert padded.deltas.masters.rate_S[1].item() == pytest.approx(LEARN.rate)


def test_what_is_not_finite_in_one_session_stays_there() -> None:
    compute, clean = make(), make()
    compute.backlog.h_PCD[0].fill_(float("nan"))  # the page of session 0
    for c in (compute, clean):
        c.step_graphs[3, 16, 0] = Eager(c._step)  # type: ignore[assignment]
    values, expected = learn(compute), learn(clean)
    assert values[:, 0].tolist() == [[0.0, 1.0]] * 2, "the session that is not finite stepped, or the other did not"
    lost = compute.deltas.masters.row(0)
    assert not any(x.any() for x in (*lost.delta.tensors(), *lost.last.tensors()))
    assert lost.rate_S.item() == pytest.approx(LEARN.rate)
    for one, other in zip(compute.deltas.masters.row(2).tensors(), clean.deltas.masters.row(2).tensors(), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("modules", MODULES)
def test_a_padded_batch_is_measured_the_same(modules: str) -> None:
    """Under the base model: no session's delta matters, nor its shape's filling."""
    plain, padded = make(modules), make(modules)
    for x in (*plain.deltas.masters.tensors(), *padded.deltas.masters.delta.tensors()):
        x.normal_(std=0.3)
    graph = Eager(padded._base_loss)
    padded.base_graphs[3, 16, 0] = graph  # type: ignore[assignment]
    flat, weight = rows(13, 8)
    found = padded.base_loss(flat, weight)
    assert graph.shapes == [(3, 16)]
    torch.testing.assert_close(found, plain.base_loss(flat, weight))
    fresh = make(modules)
    values = fresh.step(flat, weight, torch.tensor([2, 0]), torch.tensor([13 / 16, 0.5]))
    torch.testing.assert_close(found, values[1])  # a fresh session is the base model


def test_the_inputs_of_a_graph_are_one_copy() -> None:
    like = torch.arange(5), torch.ones(2, 3), torch.zeros(0, dtype=torch.int64), torch.arange(3, dtype=torch.int32)
    packed = Packed(like)
    buffer = packed.empty()
    for place, x in zip(packed.views(buffer), like, strict=True):
        place.copy_(x)
    for place, x in zip(packed.views(buffer.clone()), like, strict=True):
        assert place.dtype == x.dtype
        assert torch.equal(place, x)
    assert buffer.numel() % Packed.ALIGNED == 0


def test_warming_up_leaves_the_spare_row_fresh() -> None:
    compute = make()
    seconds = compute.warm_up([(1, 16), (3, 4)], lambda run: (run(), 0.5)[1])
    assert seconds == [0.5, 0.5]
    for x in compute.deltas.masters.delta.tensors():
        assert not x.any()
