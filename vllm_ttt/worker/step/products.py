"""The matrix products of the step: with frozen weights, and beside them the low-rank parts of several sessions.

On CUDA what a product gives stays in its dtype, as vLLM serves it, and the low-rank part is added by the product itself; on a
CPU it is float32. Dimension suffixes as in micro_step.py; O and I are the output and input widths of a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.step.pointwise import Flow

#: x W^T as a quantised layer serves it, or in FP8 (fp8.py): [T, O] of [T, I].
Served = Callable[[Tensor], Tensor]
#: d W in FP8: [T, I] of [T, O].
Back = Callable[[Tensor], Tensor]


def linear(
    x_TI: Tensor,
    w_OI: Tensor,
    a_RI: Tensor | None,
    b_SOR: Tensor | None,
    bias_O: Tensor | None,
    S: int,
    served: Served | None = None,
    ranks: Ranks = ALONE,
    joined: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x (W + B A)^T + bias, [T, O], with x A^T [T, R] where there is a B; ``served`` in place of the product with W alone.

    Of several ``ranks`` each has some columns of x, W and A. B, the bias and what is returned are whole. ``joined`` [O + R, I]
    is W with A below it, where they lie so: one product gives x W^T and x A^T, and one message of the ranks has both.
    """
    if joined is not None and b_SOR is not None:
        both_TX = x_TI @ joined.T
        y_TO, xa_TR = both_TX.split(b_SOR.shape[1:], 1)
        _add(y_TO.unflatten(0, (S, -1)), xa_TR.unflatten(0, (S, -1)), b_SOR.transpose(1, 2))
        both_TX = ranks.sum(both_TX)
        y_TO, xa_TR = both_TX.split(b_SOR.shape[1:], 1)
        return y_TO if bias_O is None else y_TO.add_(bias_O), xa_TR
    y_TO, xa_TR = x_TI @ w_OI.T if served is None else served(x_TI), None
    y_TO = y_TO if y_TO.is_cuda else y_TO.float()
    if b_SOR is not None and a_RI is not None:
        xa_TR = x_TI @ a_RI.T
        _add(y_TO.view(S, -1, y_TO.shape[1]), xa_TR.view(S, -1, xa_TR.shape[1]), b_SOR.transpose(1, 2))
    if ranks.size > 1:
        y_TO, xa_TR = _summed(ranks, y_TO, xa_TR)
    if bias_O is not None:
        y_TO += bias_O
    return y_TO, xa_TR


def through(d_TO: Tensor, w_OI: Tensor, a_RI: Tensor | None, b_SOR: Tensor | None, S: int, back: Back | None = None) -> Tensor:
    """The gradient that flows back through W + B A: [T, I]; ``back`` in place of the product with W alone."""
    dx_TI = d_TO @ w_OI if back is None else back(d_TO)
    dx_TI = dx_TI if dx_TI.is_cuda else dx_TI.float()
    if b_SOR is not None and a_RI is not None:
        db_TR = torch.bmm(d_TO.view(S, -1, d_TO.shape[1]), b_SOR).flatten(0, 1)
        _add(dx_TI, db_TR, a_RI)
    return dx_TI


def through_joined(flow: Flow, joined: Tensor, b_SOR: Tensor, S: int) -> Tensor:
    """As `through`, of W and A that lie in one piece of memory, and of a gradient with room for its product with B."""
    assert flow.roomy is not None
    d_SCO, db_SCR = flow.roomy.unflatten(0, (S, -1)).split(b_SOR.shape[1:], 2)
    torch.bmm(d_SCO, b_SOR, out=db_SCR)
    return flow.roomy @ joined


def add_outer(g_SOR: Tensor | None, flow: Flow, x_TR: Tensor | None, S: int) -> None:
    """g += d^T x, per session, g in float32; nothing where the module is not adapted."""
    if g_SOR is None or x_TR is None:
        return
    x_SCR = x_TR.unflatten(0, (S, -1))
    split = lambda d_TO: d_TO.unflatten(0, (S, -1)).transpose(1, 2)  # noqa: E731
    if x_TR.is_cuda:
        torch.baddbmm(g_SOR, split(flow.low_TD), x_SCR, out_dtype=torch.float32, out=g_SOR)
    else:
        g_SOR.baddbmm_(split(flow.d_TD), x_SCR.to(flow.d_TD.dtype))


def _summed(ranks: Ranks, y_TO: Tensor, xa_TR: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both over the ranks, in one message."""
    if xa_TR is None:
        return ranks.sum(y_TO), None
    both = ranks.sum(torch.cat((y_TO, xa_TR.to(y_TO.dtype)), 1))
    y_TO, summed = (x.contiguous() for x in both.split([y_TO.shape[1], xa_TR.shape[1]], 1))
    return y_TO, summed.to(xa_TR.dtype)


def _add(y: Tensor, left: Tensor, right: Tensor) -> None:
    """y += left right, in place; in float32 where y is."""
    if y.dtype != left.dtype:
        y += left @ right
    elif y.ndim == 3:
        y.baddbmm_(left, right)
    else:
        y.addmm_(left, right)
