"""One adapted layer after its attention, forward and backward by hand: o_proj, the norm and the MLP, with the deltas of several
sessions beside the frozen weights. Dimension suffixes as in micro_step.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_ttt.worker.delta import LayerDelta

if TYPE_CHECKING:
    from vllm_ttt.worker.step.micro_step import Tail


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
    """What the backward of a layer needs of its forward. ``ao``, ``ax`` and ``az``: inputs of modules, times A; None: that
    module is not adapted."""

    ao_TR: Tensor | None
    r1_TD: Tensor
    i1_T1: Tensor
    ax_TR: Tensor | None
    u_TF: Tensor
    s_TF: Tensor
    silu_TF: Tensor
    az_TR: Tensor | None


def forward(block: Block | Tail, tail: Tail, delta: LayerDelta, h_TD: Tensor, a_TQ: Tensor, S: int) -> tuple[Tensor, Passed]:
    """The residual stream that leaves the layer, [T, D] float32.

    Args:
        tail: its projections A.
        delta: of this layer, in the tail's dtype.
        h_TD: residual stream that enters the layer. a_TQ: its attention output, in the tail's dtype.
    """
    dt = block.wo_DQ.dtype
    o_TD, ao_TR = _linear(a_TQ, block.wo_DQ, tail.ao_RQ, delta.o, block.bo_D, S)
    r1_TD = h_TD.float() + o_TD
    i1_T1 = torch.rsqrt(r1_TD.square().mean(-1, keepdim=True) + block.eps)
    x_TD = (r1_TD * i1_T1 * block.ln_D).to(dt)
    gu_T2F, ax_TR = _linear(x_TD, block.wgu_2FD, tail.ai_RD, delta.gu, block.bgu_2F, S)
    g_TF, u_TF = gu_T2F.chunk(2, -1)
    s_TF = torch.sigmoid(g_TF)
    silu_TF = g_TF * s_TF
    z_TF = (silu_TF * u_TF).to(dt)
    d_TD, az_TR = _linear(z_TF, block.wd_DF, tail.ad_RF, delta.d, block.bd_D, S)
    return r1_TD + d_TD, Passed(ao_TR, r1_TD, i1_T1, ax_TR, u_TF, s_TF, silu_TF, az_TR)


def backward(
    block: Block | Tail, tail: Tail, delta: LayerDelta, grad: LayerDelta, saved: Passed, d2_TD: Tensor, S: int
) -> Tensor:
    """Add the gradient of the layer's deltas to ``grad``.

    Args:
        d2_TD: gradient with respect to the residual stream that leaves the layer, float32.
    Returns:
        the gradient with respect to the one that enters it, as far as it does not go through the attention output (see
        `attention_gradient`), [T, D] float32.
    """
    dt = block.wo_DQ.dtype
    add_outer(grad.d, d2_TD, saved.az_TR, S)
    dz_TF = _through(d2_TD.to(dt), block.wd_DF, tail.ad_RF, delta.d, S)
    # d silu(g) / dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    slope_TF = saved.s_TF + saved.silu_TF * (1 - saved.s_TF)
    dgu_T2F = torch.cat((dz_TF * saved.u_TF * slope_TF, dz_TF * saved.silu_TF), -1)
    add_outer(grad.gu, dgu_T2F, saved.ax_TR, S)
    dx_TD = _through(dgu_T2F.to(dt), block.wgu_2FD, tail.ai_RD, delta.gu, S)
    d1_TD = d2_TD + rms_backward(dx_TD * block.ln_D, saved.r1_TD, saved.i1_T1)
    add_outer(grad.o, d1_TD, saved.ao_TR, S)
    return d1_TD


def attention_gradient(block: Block | Tail, tail: Tail, delta: LayerDelta, d1_TD: Tensor, S: int) -> Tensor:
    """From what `backward` returned: the gradient with respect to the attention output, [T, Q] float32."""
    return _through(d1_TD.to(block.wo_DQ.dtype), block.wo_DQ, tail.ao_RQ, delta.o, S)


def rms_backward(g_TD: Tensor, x_TD: Tensor, inv_T1: Tensor) -> Tensor:
    """Through x * rsqrt(mean(x^2) + eps), of which ``inv_T1`` is the second factor; also of more dimensions than two."""
    return inv_T1 * g_TD - x_TD * (inv_T1.pow(3) * (g_TD * x_TD).mean(-1, keepdim=True))


def add_outer(g_SOR: Tensor | None, d_TO: Tensor, x_TR: Tensor | None, S: int) -> None:
    """g += d^T x, per session; nothing where the module is not adapted."""
    if g_SOR is None or x_TR is None:
        return
    d_SCO, x_SCR = d_TO.view(S, -1, d_TO.shape[-1]), x_TR.view(S, -1, x_TR.shape[-1])
    g_SOR.baddbmm_(d_SCO.transpose(1, 2), x_SCR.to(d_SCO.dtype))


def _linear(
    x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_SOR: Tensor | None, bias_O: Tensor | None, S: int
) -> tuple[Tensor, Tensor | None]:
    """x (W + B A)^T + bias, [T, O] float32, with x A^T [T, R] where there is a B."""
    y_TO, xa_TR = (x_TI @ w_OI.T).float(), None
    if b_SOR is not None:
        xa_TR = x_TI @ a_RI.T
        y_TO += torch.bmm(xa_TR.view(S, -1, xa_TR.shape[1]), b_SOR.transpose(1, 2)).flatten(0, 1)
    if bias_O is not None:
        y_TO += bias_O
    return y_TO, xa_TR


def _through(d_TO: Tensor, w_OI: Tensor, a_RI: Tensor, b_SOR: Tensor | None, S: int) -> Tensor:
    """The gradient that flows back through W + B A: [T, I] float32."""
    dx_TI = (d_TO @ w_OI).float()
    if b_SOR is not None:
        dx_TI += torch.bmm(d_TO.view(S, -1, d_TO.shape[-1]), b_SOR).view(d_TO.shape[0], -1) @ a_RI
    return dx_TI
