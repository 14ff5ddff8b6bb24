"""One adapted layer after its attention, forward and backward by hand: o_proj, the norm and the MLP, with the deltas of several
sessions beside the model's weights. Dimension suffixes as in micro_step.py.

Of several ranks each has its own part of Q and of F, as vLLM shards the weights. B of o_proj and down_proj is whole on each:
the residual stream is, too, so their gradients are, and nothing has to be said on the way back through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from vllm_ttt.worker.delta import LayerDelta
from vllm_ttt.worker.step import pointwise
from vllm_ttt.worker.step.pointwise import Flow, Normed
from vllm_ttt.worker.step.products import Back, Served, add_outer, linear, through, through_joined

if TYPE_CHECKING:
    from vllm_ttt.worker.step.micro_step import Tail


@dataclass
class Block:
    """The model's weights of one layer, as `Tail` has those of the last: [out, in], and ``norm``, their Frobenius norms."""

    wo_DQ: Tensor
    wgu_2FD: Tensor
    wd_DF: Tensor
    ln_D: Tensor
    eps: float
    norm: dict[str, float]
    bo_D: Tensor | None = None
    bgu_2F: Tensor | None = None
    bd_D: Tensor | None = None
    #: by "o", "gu" and "d"; those of quantised layers, and what is multiplied in FP8. A quantised weight with both has no
    #: memory: it is there for its shape
    served: dict[str, Served] = field(default_factory=dict)
    back: dict[str, Back] = field(default_factory=dict)
    #: by "o" and "d", [out + R, in]: the weight with A below it, where the model's own lies so (weights.py)
    joined: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Passed:
    """What the backward of a layer needs of its forward. ``ao``, ``ax`` and ``az``: inputs of modules, times A; None: that
    module is not adapted."""

    ao_TR: Tensor | None
    normed: Normed
    ax_TR: Tensor | None
    gu_T2F: Tensor
    az_TR: Tensor | None


def forward(
    block: Block | Tail, tail: Tail, delta: LayerDelta, r_TD: Tensor, a_TQ: Tensor, S: int
) -> tuple[Tensor, Tensor, Passed]:
    """The residual stream that leaves the layer, as its two terms [T, D]: float32, and what the MLP adds.

    Args:
        tail: its projections A.
        delta: of this layer, in the tail's dtype.
        r_TD: residual stream that enters the layer, float32. a_TQ: its attention output, in the tail's dtype.
    """
    dt, served, ranks, joined = block.wo_DQ.dtype, block.served.get, tail.ranks, block.joined.get
    o_TD, ao_TR = linear(a_TQ, block.wo_DQ, tail.ao_RQ, delta.o, block.bo_D, S, served("o"), ranks, joined("o"))
    normed, x_TD = pointwise.norm(r_TD, o_TD, block.ln_D, block.eps, dt)
    gu_T2F, ax_TR = linear(x_TD, block.wgu_2FD, tail.ai_RD, delta.gu, block.bgu_2F, S, served("gu"))
    z_TF = pointwise.gated(gu_T2F, dt)
    d_TD, az_TR = linear(z_TF, block.wd_DF, tail.ad_RF, delta.d, block.bd_D, S, served("d"), ranks, joined("d"))
    # The stream as its two parts: the first one is kept anyway, and where x A^T lies beside the second, so is that.
    return normed.r_TD, d_TD, Passed(ao_TR, Normed(r_TD, normed.i_T1, o_TD), ax_TR, gu_T2F, az_TR)


def backward(block: Block | Tail, tail: Tail, delta: LayerDelta, grad: LayerDelta, saved: Passed, flow: Flow, S: int) -> Flow:
    """Add the gradient of the layer's deltas to ``grad``.

    Args:
        flow: gradient with respect to the residual stream that leaves the layer.
    Returns:
        that with respect to the one that enters it, as far as it does not go through the attention output (see
        `attention_gradient`).
    """
    dt, back = block.wo_DQ.dtype, block.back.get
    add_outer(grad.d, flow, saved.az_TR, S)
    dz_TF = _through(block, "d", flow, block.wd_DF, tail.ad_RF, delta.d, S)
    dgu_T2F = pointwise.gated_backward(saved.gu_T2F, dz_TF)
    add_outer(grad.gu, Flow(dgu_T2F, dgu_T2F), saved.ax_TR, S)
    dx_TD = tail.ranks.sum(through(dgu_T2F.to(dt), block.wgu_2FD, tail.ai_RD, delta.gu, S, back("gu")))
    flow = pointwise.norm_backward(flow.d_TD, dx_TD, block.ln_D, saved.normed, dt, tail.room)
    add_outer(grad.o, flow, saved.ao_TR, S)
    return flow


def attention_gradient(block: Block | Tail, tail: Tail, delta: LayerDelta, flow: Flow, S: int) -> Tensor:
    """From what `backward` returned: the gradient with respect to the attention output, [T, Q]."""
    return _through(block, "o", flow, block.wo_DQ, tail.ao_RQ, delta.o, S)


def _through(block: Block | Tail, key: str, flow: Flow, w_DI: Tensor, a_RI: Tensor, b_SDR: Tensor | None, S: int) -> Tensor:
    """Back through o_proj ("o") or down_proj ("d"): [T, I]."""
    if (joined := block.joined.get(key)) is not None and b_SDR is not None:
        return through_joined(flow, joined, b_SDR, S)
    return through(flow.low_TD, w_DI, a_RI, b_SDR, S, block.back.get(key))
