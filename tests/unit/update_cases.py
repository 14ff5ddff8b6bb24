"""The kernels of worker/step/update_cuda.py beside plain torch: test_pointwise.py runs this file in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from test_update import NORMS, WIDENED, draw, drawn, fresh, step
from torch import Tensor

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.delta import State
from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.step import update
from vllm_ttt.worker.step import update_cuda as kernels

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.*(overflow|invalid value).*")]

#: Sessions, matrices, rows and ranks: a matrix is less than a piece, some pieces and a part of one, and none.
SHAPES = [(3, 2, 100, 16), (3, 1, 201, 64), (3, 0, 64, 16)]


#: Which rows of the masters the sessions have, and those that no step may touch where the second session is not updated.
ROWS, STAYS = torch.tensor([3, 0, 4]), [0, 1, 2]


def spread(x: Tensor) -> Tensor:
    """Masters: ``x`` in the rows ROWS of five."""
    masters = draw(9, 5, *x.shape[1:]).to(x.dtype)
    masters[ROWS] = x
    return masters


class Twins(Ranks):
    """Two, of which the other has the same rows."""

    def total(self, x: Tensor) -> Tensor:
        return 2 * x


def near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of a session with NaN they are NaN, and where squares overflow the gradient is finite all the same."""
    g, u = draw(1, *shape), draw(2, *shape).to(dtype)
    g[1, :, 7, 3], g[2, :, 3, 5] = math.nan, 1e30
    (whole, squares), (expected, expected_squares) = (f(g, spread(u), ROWS) for f in (kernels.sums, update._sums))
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-3, equal_nan=True)
    near(squares, expected_squares)
    assert torch.isfinite(whole).tolist() == [True, shape[1] == 0, True]
    assert not torch.isfinite(squares[0, 1:]).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_lengths(shape: tuple[int, ...]) -> None:
    b, u, kept, far = draw(1, *shape), draw(2, *shape), torch.tensor([1.0, 0.985, 0.5]), 50 * draw(3, *shape[:2]).abs()
    u[2], b[1] = 0, math.nan
    args = spread(b), ROWS, u, kept, far
    for found, expected in zip(kernels.lengths(*args, ALONE), update._lengths(*args, ALONE), strict=True):
        near(found, expected)
    both = spread(torch.cat((b, b), 2)), ROWS, torch.cat((u, u), 2)
    found = kernels.lengths(*args, Twins())
    for x, expected in zip(found, update._lengths(*both, kept, far, ALONE), strict=True):
        near(x, expected)


def test_the_length_of_what_a_step_nearly_takes_back() -> None:
    """A thousandth of what it was: as exact as plain torch, which subtracts before it squares."""
    u = draw(2, 1, 1, 201, 64)
    b = u + 1e-3 * draw(3, *u.shape)
    far = u.norm().view(1, 1)
    first = torch.zeros(1, dtype=torch.int64)
    _, found, _ = kernels.lengths(b, first, u, torch.ones(1), far, ALONE)
    assert found.item() == pytest.approx((b.double() - u.double()).norm().item(), rel=1e-4)
    _, found, _ = kernels.lengths(u, first, u, torch.ones(1), far, ALONE)
    assert found.item() < 1e-6 * far.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of a session that is not updated, and of those that are not among them, the bits that were there."""
    b, u, last = spread(draw(1, *shape)), draw(2, *shape).to(dtype).float(), spread(draw(3, *shape).to(dtype))
    u[1, :, 7, 3] = math.nan
    both = []
    for write in (kernels.write, update._write):
        own = b.clone(), last.clone()
        write(torch.tensor([True, False, True]), own[0], ROWS, u, own[1], draw(4, *shape[:2]), draw(5, *shape[:2]))
        both.append(own)
    for x, expected, old in zip(*both, (b, last), strict=True):
        near(x, expected)
        assert torch.equal(x[STAYS], old[STAYS])
        assert not x.numel() or not torch.equal(x[ROWS[0]], old[ROWS[0]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_picked(shape: tuple[int, ...]) -> None:
    x = spread(draw(1, *shape))
    assert torch.equal(kernels.picked(x, ROWS, torch.float32), x[ROWS])


@pytest.mark.parametrize(("modules", "layers"), [("ogud", WIDENED), ("od", [NORMS, NORMS]), ("gu", [NORMS, NORMS])])
def test_the_whole_update(monkeypatch: pytest.MonkeyPatch, modules: str, layers: list[dict[str, float]]) -> None:
    """Three chunks of six sessions: one that steps, one cut by the trust region, one whose gradient is NaN, one whose loss is
    too large, one of a short chunk, and one the squares of whose gradient overflow; also where weights are zero and
    their deltas are not. Last updates are float32: the interpreter cuts bfloat16 off instead of rounding."""
    scale = torch.tensor([1e-3, 100.0, 1e-3, 1e-3, 1e-3, 1e-3])[:, None, None, None]
    before = drawn(5, 6, modules)
    last, rate = fresh(6, modules=modules).last.to(torch.float32), torch.full((6,), 0.02)
    state = State(before.by(*(x * scale for x in before.tensors())), last, rate)
    loss, share = torch.tensor([1.0, 1.0, 1.0, 20.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1, 1.0])
    both = []
    for fused in (False, True):
        if fused:
            monkeypatch.setattr(kernels, "PIECE", 128)
            for name in ("sums", "lengths", "write"):
                monkeypatch.setattr(update, f"_{name}", getattr(kernels, name))
        found = [step(state, drawn(1, 6, modules), share=share, layers=layers)]
        grad = drawn(1, 6, modules)
        for x in grad.tensors():
            x[2, -1:, 3, 1], x[5, -1:, 3, 1] = math.nan, 1e30
        for _ in range(2):
            found.append(step(found[-1][0], grad, loss, share, LearnConfig(decay=0.015, max_norm=0.3), layers=layers))
        both.append(found)
    for (plain, ok, sizes), (fused, fused_ok, fused_sizes) in zip(*both, strict=True):
        assert torch.equal(ok, fused_ok)
        torch.testing.assert_close(fused_sizes, sizes, rtol=1e-5, atol=0)
        torch.testing.assert_close(fused.rate_S, plain.rate_S, rtol=1e-5, atol=0)
        for x, expected in zip(fused.tensors(), plain.tensors(), strict=True):
            near(x, expected)
    (first, _, _), (second, ok, sizes), _ = both[1]
    assert ok.tolist() == [True, True, False, False, True, False]
    assert torch.allclose(sizes[:, 1], torch.tensor(0.3))
    for x, old in zip(second.tensors(), first.tensors(), strict=True):
        assert torch.equal(x[[2, 3, 5]], old[[2, 3, 5]])
