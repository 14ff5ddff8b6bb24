"""The kernels of worker/step/pointwise_cuda.py beside plain torch: test_pointwise.py runs this file in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_ttt.worker.step import pointwise
from vllm_ttt.worker.step import pointwise_cuda as kernels
from vllm_ttt.worker.step.qkv import QKV, HeadNorm

pytestmark = pytest.mark.unit

T = 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def near(found: Any, expected: Any) -> None:
    found, expected = (list(x) if isinstance(x, tuple) else [x] for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [96, 128])
def test_norms(width: int) -> None:
    r, y, ln = draw(T, width), draw(T, width, seed=1), draw(width).abs()
    for more in (y, None, draw(T, width + 16, seed=1)[:, :width]):
        expected, x = pointwise.norm(r, more, ln, 1e-5, torch.float32)
        found = kernels.norm(r, more, ln, 1e-5, torch.float32)
        near((*found[0][:2], found[1]), (*expected[:2], x))
        for past in (draw(T, width, seed=2), None):
            args = past, draw(T, width, seed=3), ln, expected, torch.float32
            for room in (0, 16):
                found, other = (x.norm_backward(*args, room) for x in (kernels, pointwise))
                near(found[:2], other[:2])
                assert found.roomy is not None
                assert found.roomy.shape == (T, width + room)
                assert torch.equal(found.roomy[:, :width], found.low_TD)
            if more is not None:  # the stream as its two parts
                parts = pointwise.Normed(r, expected.i_T1, more)
                again = kernels.norm_backward(*args[:3], parts, torch.float32)
                near(again[:2], pointwise.norm_backward(*args)[:2])
                near(pointwise.norm_backward(*args[:3], parts, torch.float32)[:2], again[:2])


@pytest.mark.parametrize("width", [64, 1500])
def test_the_gated_activation(width: int) -> None:
    gu, dz = draw(T, 2 * width), draw(T, width)
    near(kernels.gated(gu, torch.float32), pointwise.gated(gu, torch.float32))
    near(kernels.gated_backward(gu, dz), pointwise.gated_backward(gu, dz))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "half", "normed"),
    [(4, 2, 32, 16, True), (4, 2, 32, 16, False), (3, 1, 48, 8, True)],
    ids=["normed", "plain", "turned in part"],
)
def test_heads(heads: int, kv_heads: int, width: int, half: int, normed: bool) -> None:
    X = (heads + 2 * kv_heads) * width
    norms = [HeadNorm(draw(width, seed=i).abs(), 10.0**-i) for i in (5, 6)] if normed else [None, None]
    of = QKV(draw(X, 8), draw(8), 1e-5, heads, kv_heads, 1.0, draw(50, 2 * half), None, *norms)
    qkv, positions = draw(T, X), torch.tensor([0, 49, 7, 7, 30])
    (expected, saved), (found, kept) = (x.turn(qkv, of, positions, torch.float32) for x in (pointwise, kernels))
    near(found, expected)
    d = draw(T, heads, width), draw(T, kv_heads, width), draw(T, kv_heads, width, seed=1)
    near(kernels.turn_backward(of, kept, d, torch.float32), pointwise.turn_backward(of, saved, d, torch.float32))


@pytest.mark.parametrize("width", [64, 1500])
def test_rows_in_eight_bits(width: int) -> None:
    """Of numbers that E4M3 has: the interpreter rounds what lies just below a power of two to half of it."""
    codes = (50 * draw(T, width)).clamp(-400, 400).to(torch.float8_e4m3fn).float()
    codes[:, 3], codes[2] = -448, 0
    x = (codes * 2.0 ** torch.tensor([-20, 0, 1, 7, -3])[:, None]).bfloat16()
    (found, scale), (expected, expected_scale) = kernels.scaled(x), pointwise.scaled(x)
    assert torch.equal(found.float(), codes)
    assert torch.equal(found.float(), expected.float())
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (0.5, 3.0)])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of -inf - -inf, which is then replaced
@pytest.mark.parametrize("vocabulary", [700, 9001])
def test_losses(vocabulary: int, scale: float, cap: float | None) -> None:
    logits, targets = 4 * draw(T, vocabulary), torch.tensor([0, vocabulary - 1, 5, 600, 5])
    for backward in (False, True):
        one, other, top, other_top = logits.clone(), logits.clone(), torch.empty(T), torch.empty(T)
        near(
            kernels.nll(one, targets, scale, cap, backward, top), pointwise.nll(other, targets, scale, cap, backward, other_top)
        )
        near(one, other)
        near(top, other_top)
        near(
            kernels.nll(logits.clone(), targets, scale, cap, backward),
            pointwise.nll(logits.clone(), targets, scale, cap, backward),
        )
        assert torch.equal(one, logits) != backward


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 3.0)])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # as above
@pytest.mark.parametrize("width", [700, 9001])
def test_what_is_known_of_a_part_of_the_vocabulary(width: int, scale: float, cap: float | None) -> None:
    logits, at, lse = 4 * draw(T, width + 3)[:, :width], torch.tensor([0, width - 1, -1, 600, -1]), 5 + draw(T)
    near(kernels.known(logits, at, scale, cap), pointwise.known(logits, at, scale, cap))
    one, other = logits.clone(), logits.clone()
    kernels.known_backward(one, at, lse, scale, cap)
    pointwise.known_backward(other, at, lse, scale, cap)
    near(one, other)
