"""One adapted layer after its attention, forward and backward by hand: o_proj, the norm and the MLP, with the deltas of several
sessions beside the frozen weights. Dimension suffixes as in micro_step.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_ttt.worker.micro_step import Delta, Tail


@dataclass
class Block:
    """The frozen weights of one layer, as `Tail` has those of the last: [out, in], and ``norm``, their Frobenius norms."""

    wo_DQ: Tensor
    wgu_2FD: Tensor
    wd_DF: Tensor
    ln_D: Tensor
    eps: float
    norm: dict[str, float]
    bo_D: Tensor | None = None
    bgu_2F: Tensor | None = None
    bd_D: Tensor | None = None


@dataclass
class Passed:
    """What the backward of a layer needs of its forward."""

    ao_TR: Tensor
    r1_TD: Tensor
    i1_T1: Tensor
    ax_TR: Tensor
    u_TF: Tensor
    s_TF: Tensor
    silu_TF: Tensor
    az_TR: Tensor


def forward(block: Block | Tail, tail: Tail, delta: Delta, h_TD: Tensor, a_TQ: Tensor, S: int) -> tuple[Tensor, Passed]:
    """The residual stream that leaves the layer, [T, D] float32.

    Args:
        tail: its projections A.
        delta: of this layer, in the tail's dtype.
        h_TD: residual stream that enters the layer. a_TQ: its attention output, in the tail's dtype.
    """
    dt = block.wo_DQ.dtype
    lora = lambda x_TR, b_SOR: torch.bmm(x_TR.view(S, -1, x_TR.shape[1]), b_SOR.transpose(1, 2)).flatten(0, 1)  # noqa: E731
    ao_TR = a_TQ @ tail.ao_RQ.T
    r1_TD = h_TD.float() + (a_TQ @ block.wo_DQ.T).float() + lora(ao_TR, delta.o).float()
    if block.bo_D is not None:
        r1_TD += block.bo_D
    i1_T1 = torch.rsqrt(r1_TD.square().mean(-1, keepdim=True) + block.eps)
    x_TD = (r1_TD * i1_T1 * block.ln_D).to(dt)
    ax_TR = x_TD @ tail.ai_RD.T
    gu_T2F = (x_TD @ block.wgu_2FD.T).float() + lora(ax_TR, delta.gu).float()
    if block.bgu_2F is not None:
        gu_T2F += block.bgu_2F
    g_TF, u_TF = gu_T2F.chunk(2, -1)
    s_TF = torch.sigmoid(g_TF)
    silu_TF = g_TF * s_TF
    z_TF = (silu_TF * u_TF).to(dt)
    az_TR = z_TF @ tail.ad_RF.T
    r2_TD = r1_TD + (z_TF @ block.wd_DF.T).float() + lora(az_TR, delta.d).float()
    if block.bd_D is not None:
        r2_TD += block.bd_D
    return r2_TD, Passed(ao_TR, r1_TD, i1_T1, ax_TR, u_TF, s_TF, silu_TF, az_TR)


def backward(block: Block | Tail, tail: Tail, delta: Delta, grad: Delta, saved: Passed, d2_TD: Tensor, S: int) -> Tensor:
    """Add the gradient of the layer's deltas to ``grad``.

    Args:
        d2_TD: gradient with respect to the residual stream that leaves the layer, float32.
    Returns:
        the gradient with respect to the one that enters it, as far as it does not go through the attention output (see
        `attention_gradient`), [T, D] float32.
    """
    dt = block.wo_DQ.dtype
    d2 = d2_TD.to(dt)
    add_outer(grad.d, d2_TD, saved.az_TR, S)
    dz_TF = (d2 @ block.wd_DF).float() + _through(d2, delta.d, tail.ad_RF, S)
    # d silu(g) / dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    slope_TF = saved.s_TF + saved.silu_TF * (1 - saved.s_TF)
    dgu_T2F = torch.cat((dz_TF * saved.u_TF * slope_TF, dz_TF * saved.silu_TF), -1)
    dgu = dgu_T2F.to(dt)
    add_outer(grad.gu, dgu_T2F, saved.ax_TR, S)
    dx_TD = (dgu @ block.wgu_2FD).float() + _through(dgu, delta.gu, tail.ai_RD, S)
    d1_TD = d2_TD + rms_backward(dx_TD * block.ln_D, saved.r1_TD, saved.i1_T1)
    add_outer(grad.o, d1_TD, saved.ao_TR, S)
    return d1_TD


def attention_gradient(block: Block | Tail, tail: Tail, delta: Delta, d1_TD: Tensor, S: int) -> Tensor:
    """From what `backward` returned: the gradient with respect to the attention output, [T, Q] float32."""
    d1 = d1_TD.to(block.wo_DQ.dtype)
    return (d1 @ block.wo_DQ).float() + _through(d1, delta.o, tail.ao_RQ, S)


def rms_backward(g_TD: Tensor, x_TD: Tensor, inv_T1: Tensor) -> Tensor:
    """Through x * rsqrt(mean(x^2) + eps), of which ``inv_T1`` is the second factor; also of more dimensions than two."""
    return inv_T1 * g_TD - x_TD * (inv_T1.pow(3) * (g_TD * x_TD).mean(-1, keepdim=True))


def add_outer(g_SOR: Tensor, d_TO: Tensor, x_TR: Tensor, S: int) -> None:
    """g += d^T x, per session."""
    d_SCO, x_SCR = d_TO.view(S, -1, d_TO.shape[-1]), x_TR.view(S, -1, x_TR.shape[-1])
    g_SOR.baddbmm_(d_SCO.transpose(1, 2), x_SCR.to(d_SCO.dtype))


def _through(d_TO: Tensor, b_SOR: Tensor, a_RI: Tensor, S: int) -> Tensor:
    """The gradient that flows back through B A: [T, I] float32."""
    return (torch.bmm(d_TO.view(S, -1, d_TO.shape[-1]), b_SOR).view(d_TO.shape[0], -1) @ a_RI).float()
