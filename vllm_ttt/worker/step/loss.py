"""The loss of some states that go into lm_head, and its gradient: the end of every step. Suffixes as in micro_step.py."""

from __future__ import annotations

from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from vllm_ttt.worker.step import pointwise

#: Rows of logits that exist at once, in float32: the loss is computed in tiles of this many.
LOSS_ROWS = 256


class Readout(Protocol):
    """lm_head and what becomes of its logits. ``logits`` is the workspace, [LOSS_ROWS, V]; see `cross_entropy`."""

    head_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    soft_cap: float | None
    logits: Tensor
    softmax_rows: int


def workspace(head_VD: Tensor) -> tuple[Tensor, int]:
    """``logits`` and ``softmax_rows`` of a `Readout`."""
    return head_VD.new_empty(LOSS_ROWS, head_VD.shape[0]), 32 if head_VD.device.type == "cpu" else LOSS_ROWS


def cross_entropy(
    end: Readout, y_TD: Tensor, t_T: Tensor, w_T: Tensor, backward: bool, top_T: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Weighted losses [T] and their gradient with respect to y [T, D].

    One buffer of LOSS_ROWS x V in the model's dtype holds first the logits, then their gradient; float32 exists for
    ``end.softmax_rows`` rows at a time (on a CPU, few enough to stay in its cache). ``top_T``: see `pointwise.nll`.
    """
    losses, grads, tops = [], [], repeat(None) if top_T is None else iter(top_T.split(end.softmax_rows))
    for y, t, w in zip(y_TD.split(LOSS_ROWS), t_T.split(LOSS_ROWS), w_T.split(LOSS_ROWS), strict=True):
        logits = end.logits[: y.shape[0]]
        torch.mm(y, end.head_VD.T, out=logits)
        if end.bias_V is not None:
            logits += end.bias_V
        for part, t_part in zip(logits.split(end.softmax_rows), t.split(end.softmax_rows), strict=True):
            losses.append(pointwise.nll(part, t_part, end.logit_scale, end.soft_cap, backward, next(tops)))
        if backward:
            grads.append((logits @ end.head_VD).float() * w[:, None])
    return torch.cat(losses) * w_T, torch.cat(grads) if backward else None
