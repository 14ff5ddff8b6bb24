"""The attention of one layer, forward and backward by hand, the attention proper apart: its norm,
the projection to queries, keys and values, Qwen3's norms of each head, and the rotary embedding. All of it is frozen.

Dimension suffixes as in micro_step.py and attention.py; X = (H + 2 G) E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.step.attention import Attended, Attention, Layout
from vllm_ttt.worker.step.block import rms_backward


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

    def served(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [P, G, E] of a layer."""
        return self.cache.read(layer, self.source_P)

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
    """What the backward needs: the stream that entered, its inverse norm, the attention, and heads before their norm."""

    r_TD: Tensor
    i_T1: Tensor
    cos: Tensor
    sin: Tensor
    attended: Attended
    heads: list[tuple[Tensor, Tensor] | None]


def forward(w: QKV, kernel: Attention, past: Past, layer: int, r_TD: Tensor, grad: bool) -> tuple[Tensor, Rotated]:
    """The attention output [T, Q] in the dtype of the weights, of the residual stream ``r_TD``, float32, that enters the layer.

    Args:
        layer: counted from the lowest whose attention the step computes.
        grad: whether `backward` will be called.
    """
    dt, E = w.wqkv_XD.dtype, w.head
    i_T1 = torch.rsqrt(r_TD.square().mean(-1, keepdim=True) + w.eps)
    qkv_TX = ((r_TD * i_T1 * w.ln_D).to(dt) @ w.wqkv_XD.T).float()
    if w.bqkv_X is not None:
        qkv_TX += w.bqkv_X
    q, k, v = (x.unflatten(-1, (-1, E)) for x in qkv_TX.split([w.heads * E, w.kv_heads * E, w.kv_heads * E], -1))
    (q, q_saved), (k, k_saved) = _normed(q, w.q_norm), _normed(k, w.k_norm)
    cos, sin = w.cos_sin_PI.index_select(0, past.positions_T).float().unsqueeze(1).chunk(2, -1)
    own = tuple(x.to(dt) for x in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
    keys, values = past.served(layer)
    attended = kernel.forward(own, (keys.to(dt), values.to(dt)), past.layout, w.scale, grad)  # type: ignore[arg-type]
    out = attended.out_THE.detach().flatten(1)
    return out, Rotated(r_TD, i_T1, cos, sin, attended, [q_saved, k_saved])


def backward(w: QKV, kernel: Attention, saved: Rotated, da_TQ: Tensor) -> Tensor:
    """The gradient with respect to the residual stream, [T, D] float32, from that with respect to the attention output."""
    dt, E = w.wqkv_XD.dtype, w.head
    dq, dk, dv = (x.float() for x in kernel.backward(saved.attended, da_TQ.to(dt).unflatten(-1, (-1, E))))
    dq, dk = (_rotate(x, saved.cos, -saved.sin) for x in (dq, dk))
    dq, dk = _norm_backward(dq, w.q_norm, saved.heads[0]), _norm_backward(dk, w.k_norm, saved.heads[1])
    dx_TD = (torch.cat((dq, dk, dv), 1).flatten(1).to(dt) @ w.wqkv_XD).float()
    return rms_backward(dx_TD * w.ln_D, saved.r_TD, saved.i_T1)


def _normed(x_THE: Tensor, norm: HeadNorm | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    if norm is None:
        return x_THE, None
    inv = torch.rsqrt(x_THE.square().mean(-1, keepdim=True) + norm.eps)
    return x_THE * inv * norm.weight_E, (x_THE, inv)


def _norm_backward(d_THE: Tensor, norm: HeadNorm | None, saved: tuple[Tensor, Tensor] | None) -> Tensor:
    if norm is None or saved is None:
        return d_THE
    return rms_backward(d_THE * norm.weight_E, *saved)


def _rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in halves (GPT-NeoX); with -sin, its transpose. What is wider than the table is left alone."""
    half = cos.shape[-1]
    a, b, rest = x_THE.split([half, half, x_THE.shape[-1] - 2 * half], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
