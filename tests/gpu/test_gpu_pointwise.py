"""The kernels between two matrix products, compiled, beside plain torch on the same numbers in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

T = 70


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def near(found: Any, expected: Any, dt: torch.dtype) -> None:
    found, expected = (list(x) if isinstance(x, tuple) else [x] for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        error = ((one.cpu().float() - other.float()).norm() / other.float().norm()).item()
        assert error < 4 * torch.finfo(dt).eps, error


@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float16])
def test_each_kernel(dt: torch.dtype) -> None:
    from vllm_ttt.worker.step import pointwise, pointwise_cuda
    from vllm_ttt.worker.step.qkv import QKV, HeadNorm

    r, y, ln, d, dx = draw(T, 4096), draw(T, 4096, seed=1), draw(4096).abs(), draw(T, 4096, seed=2), draw(T, 4096, seed=3)
    low = lambda x: x.to(dt).float()  # noqa: E731
    gpu = lambda x: x.to(dt).cuda()  # noqa: E731
    for more, past in ((y, d), (None, None)):
        expected, x = pointwise.norm(r, None if more is None else low(more), ln, 1e-6, torch.float32)
        found, y = pointwise_cuda.norm(r.cuda(), None if more is None else gpu(more), ln.cuda(), 1e-6, dt)
        near((found.stream, found.i_T1, y), (expected.stream, expected.i_T1, x), dt)
        back = pointwise_cuda.norm_backward(None if past is None else past.cuda(), gpu(dx), ln.cuda(), found, dt)
        near(back[:2], pointwise.norm_backward(past, low(dx), ln, expected, dt)[:2], dt)
    gu, dz = draw(T, 2 * 12288), draw(T, 12288)
    near(pointwise_cuda.gated(gpu(gu), dt), pointwise.gated(low(gu), torch.float32), dt)
    near(pointwise_cuda.gated_backward(gpu(gu), gpu(dz)), pointwise.gated_backward(low(gu), low(dz)), dt)
    for width, half in ((128, 64), (64, 32), (96, 24)):
        X, norm = (8 + 2 * 2) * width, HeadNorm(draw(width).abs(), 1e-6)
        of = QKV(draw(X, 8), draw(8), 1e-6, 8, 2, 1.0, draw(999, 2 * half), None, norm, norm)
        there = copy.copy(of)
        there.cos_sin_PI, there.q_norm = of.cos_sin_PI.cuda(), HeadNorm(norm.weight_E.cuda(), 1e-6)
        there.k_norm = there.q_norm
        qkv, positions = draw(T, X), torch.randint(0, 999, (T,), generator=torch.Generator().manual_seed(0))
        expected, saved = pointwise.turn(low(qkv), of, positions, torch.float32)
        found, kept = pointwise_cuda.turn(gpu(qkv), there, positions.cuda(), dt)
        near(found, expected, dt)
        ds = draw(T, 8, width), draw(T, 2, width), draw(T, 2, width, seed=1)
        back = pointwise_cuda.turn_backward(there, kept, tuple(map(gpu, ds)), dt)
        near(back, pointwise.turn_backward(of, saved, tuple(map(low, ds)), dt), dt)
    logits, targets = 3 * draw(T, 151936), torch.randint(0, 151936, (T,), generator=torch.Generator().manual_seed(1))
    for scale, cap in ((1.0, None), (0.5, 30.0)):
        one, other = gpu(logits), low(logits)
        losses = pointwise_cuda.nll(one, targets.cuda(), scale, cap, True), pointwise.nll(other, targets, scale, cap, True)
        near(losses[0], losses[1], torch.float16)
        near(one, other, dt)
