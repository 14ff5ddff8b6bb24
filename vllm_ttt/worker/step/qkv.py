"""The attention of one layer, forward and backward by hand, the attention proper apart: its norm,
the projection to queries, keys and values, Qwen3's norms of each head, and the rotary embedding. None of it is learned.

Dimension suffixes as in micro_step.py and attention.py; X = (H + 2 G) E.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.step import pointwise
from vllm_ttt.worker.step.attention import Attention, Layout, Own
from vllm_ttt.worker.step.pointwise import Flow, Normed
from vllm_ttt.worker.step.products import Back, linear, through
from vllm_ttt.worker.step.products import Served as ServedProduct


@dataclass
class HeadNorm:
    """RMS norm of each head: ``weight_E`` float32."""

    weight_E: Tensor
    eps: float


@dataclass
class QKV:
    """``cos_sin_PI``: the model's own table, cosines beside sines for half of the rotated part of a head, by position."""

    wqkv_XD: Tensor
    ln_D: Tensor
    eps: float
    heads: int
    kv_heads: int
    scale: float
    cos_sin_PI: Tensor
    bqkv_X: Tensor | None = None
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    #: of a quantised layer, or in FP8; as in `Block`
    served: ServedProduct | None = field(default=None, kw_only=True)
    back: Back | None = field(default=None, kw_only=True)
    #: each has some of the heads
    ranks: Ranks = field(default=ALONE, kw_only=True)

    @property
    def head(self) -> int:
        return self.wqkv_XD.shape[0] // (self.heads + 2 * self.kv_heads)


class Served(Protocol):
    """Keys and values as they were served."""

    def read(self, layer: int, slots_P: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P, G, E] in some slots, of a layer: the lowest whose attention the step computes is 0."""
        ...


@dataclass
class Past:
    """What the chunks of a step attend to besides themselves."""

    layout: Layout
    #: [T] int64, position of each row in its request
    positions_T: Tensor
    #: [P] int64, slots of ``cache``: the pasts, session after session
    source_P: Tensor
    cache: Served

    def served(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [P, G, E] of a layer."""
        keys, values = self.cache.read(layer, self.source_P)
        return keys.to(dtype), values.to(dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """What differs from step to step; `by` takes it back."""
        return self.positions_T, self.source_P, *self.layout.tensors()

    def by(self, positions_T: Tensor, source_P: Tensor, *layout: Tensor) -> Past:
        """With those of other steps."""
        return replace(self, layout=self.layout.by(*layout), positions_T=positions_T, source_P=source_P)

    def to(self, device: torch.device) -> Past:
        positions_T, source_P = (to_device(x, device) for x in (self.positions_T, self.source_P))
        return replace(self, layout=self.layout.to(device), positions_T=positions_T, source_P=source_P)


@dataclass
class Rotated:
    """What the backward needs."""

    normed: Normed
    own: Own
    #: of `pointwise.turn`, and of the attention's forward
    turned: Any
    attended: Any
    #: the layer's number
    layer: int


def forward(
    w: QKV, kernel: Attention, past: Past, layer: int, r_TD: Tensor, y_TD: Tensor | None
) -> tuple[Tensor, Tensor, Rotated]:
    """The residual stream r + y [T, D] that enters the layer, float32, and its attention output [T, Q], in the weights' dtype.

    Args:
        layer: counted from the lowest whose attention the step computes.
    """
    dt = w.wqkv_XD.dtype
    normed, x_TD = pointwise.norm(r_TD, y_TD, w.ln_D, w.eps, dt)
    qkv_TX, _ = linear(x_TD, w.wqkv_XD, None, None, w.bqkv_X, 1, w.served)
    own, turned = pointwise.turn(qkv_TX, w, past.positions_T, dt)
    out_THE, attended = kernel.forward(own, past.served(layer, dt), past.layout, w.scale)
    return normed.r_TD, out_THE.flatten(1), Rotated(normed, own, turned, attended, layer)


def backward(w: QKV, kernel: Attention, past: Past, saved: Rotated, da_TQ: Tensor, flow: Flow, room: int = 0) -> Flow:
    """The gradient with respect to the residual stream: that which comes through the attention, and ``flow``, past it.

    Args:
        room: of `pointwise.norm_backward`.
    """
    dt, E = w.wqkv_XD.dtype, w.head
    da_THE = da_TQ.to(dt).unflatten(-1, (-1, E))
    heads = kernel.backward(saved.own, past.served(saved.layer, dt), past.layout, w.scale, da_THE, saved.attended)
    d_TX = pointwise.turn_backward(w, saved.turned, heads, dt)
    dx_TD = w.ranks.sum(through(d_TX, w.wqkv_XD, None, None, 1, w.back))
    return pointwise.norm_backward(flow.d_TD, dx_TD, w.ln_D, saved.normed, dt, room)
