"""The oracle's products with frozen weights as the engine has them: in FP8 (`learn.fp8`), or in 16 bits.

In FP8 both sides of a product are E4M3 with a scale for each of their vectors along the summed dimension: x and W on the way
forward, the gradient and W on the way back. What is summed is exact, and so is the sum, but for its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.eval.oracle import LayerWeights, Stack

#: The largest number of E4M3.
LARGEST = 448.0
#: The linear layers of a layer, as `LayerWeights` names them.
LINEAR = "qkvogud"
#: x m^T, both with the summed dimension last.
Product = Callable[[Tensor, Any], Tensor]


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in E4M3, and a scale for each row: with it the row's largest number is the type's largest."""
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x * (LARGEST / most)).to(torch.float8_e4m3fn), most / LARGEST


def rounded(x: Tensor) -> Tensor:
    """x as its codes and scales have it."""
    x8, scale = codes(x)
    return x8.to(x.dtype) * scale


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return weight.product(x, weight.forth)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.product(grads[0], ctx.weight.back), None


class Weight:
    """What stands for a weight W in ``x @ W.T``: ``prepare`` makes of W, and of its transpose, what ``product`` takes."""

    def __init__(self, w_OI: Tensor, prepare: Callable[[Tensor], Any], product: Product):
        self.forth, self.back, self.product, self.shape = prepare(w_OI), prepare(w_OI.T), product, w_OI.shape

    @property
    def T(self) -> Weight:
        return self

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)  # type: ignore[return-value]


def in_fp8(stack: Stack, dtype: torch.dtype | None = None) -> Stack:
    """``stack`` with all products of its layers' frozen weights in FP8; lm_head is as it was.

    Args:
        dtype: that sums are rounded to; None: they are not.
    """

    def product(x: Tensor, m: tuple[Tensor, Tensor]) -> Tensor:
        (x8, x_scale), (m8, m_scale) = codes(x), m
        y = x8.to(dtype or x.dtype) @ m8.T.to(dtype or x.dtype)
        return y.to(x.dtype) * x_scale * m_scale.T

    def prepare(m: Tensor) -> tuple[Tensor, Tensor]:
        m8, scale = codes(m)
        return m8.to(dtype or m.dtype), scale

    return replace(stack, layers=[_layer(w, lambda x: Weight(x, prepare, product)) for w in stack.layers])


def in_dtype(stack: Stack, dtype: torch.dtype) -> Stack:
    """``stack`` with all products of frozen weights, lm_head's too, in ``dtype``; what stands between them is not."""
    product: Product = lambda x, m: (x.to(dtype) @ m.T).to(x.dtype)  # noqa: E731
    make = lambda w: Weight(w, lambda m: m.to(dtype), product)  # noqa: E731
    return replace(stack, layers=[_layer(w, make) for w in stack.layers], head=make(stack.head))  # type: ignore[arg-type]


def _layer(w: LayerWeights, make: Callable[[Tensor], Weight]) -> LayerWeights:
    return replace(w, **{name: make(getattr(w, name)) for name in LINEAR})  # type: ignore[arg-type]
