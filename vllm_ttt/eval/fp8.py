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
#: x M^T of x.
Product = Callable[[Tensor], Tensor]


def codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in E4M3, and a scale for each row: with it the row's largest number is the type's largest."""
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x * (LARGEST / most)).to(torch.float8_e4m3fn), most / LARGEST


def rounded(x: Tensor) -> Tensor:
    """x as its codes and scales have it."""
    x8, scale = codes(x)
    return x8.to(x.dtype) * scale


def product_in_fp8(m: Tensor, dtype: torch.dtype | None = None) -> Product:
    """``dtype``: that sums are rounded to; None: they are not."""
    m8, m_scale = codes(m)
    m8 = m8.to(dtype or m.dtype)

    def product(x: Tensor) -> Tensor:
        x8, scale = codes(x)
        return (x8.to(m8.dtype) @ m8.T).to(x.dtype) * scale * m_scale.T

    return product


def product_in(m: Tensor, dtype: torch.dtype) -> Product:
    m = m.to(dtype)
    return lambda x: (x.to(dtype) @ m.T).to(x.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return weight.forth(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.back(grads[0]), None


class Weight:
    """What stands for a weight in ``x @ W.T``: x W^T on the way forward, and d W on the way back."""

    def __init__(self, shape: torch.Size, forth: Product, back: Product):
        self.shape, self.forth, self.back = shape, forth, back

    @property
    def T(self) -> Weight:
        return self

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)  # type: ignore[return-value]


def in_fp8(stack: Stack, ways: str = "both", dtype: torch.dtype | None = None) -> Stack:
    """``stack`` with the products of its layers' frozen weights in FP8; lm_head is as it was.

    Args:
        ways: `learn.fp8`, "back" or "both". dtype: of all other products, and of sums; None: the stack's.
    """

    def weight(w: Tensor) -> Weight:
        forth = product_in_fp8(w, dtype) if ways == "both" else product_in(w, dtype or w.dtype)
        return Weight(w.shape, forth, product_in_fp8(w.T, dtype))

    return replace(stack, layers=[_layer(w, weight) for w in stack.layers])


def in_dtype(stack: Stack, dtype: torch.dtype) -> Stack:
    """``stack`` with all products of frozen weights, lm_head's too, in ``dtype``; what stands between them is not."""

    def weight(w: Tensor) -> Any:
        return Weight(w.shape, product_in(w, dtype), product_in(w.T, dtype))

    return replace(stack, layers=[_layer(w, weight) for w in stack.layers], head=weight(stack.head))


def _layer(w: LayerWeights, make: Callable[[Tensor], Any]) -> LayerWeights:
    return replace(w, **{name: make(getattr(w, name)) for name in LINEAR})
