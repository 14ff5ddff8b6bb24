"""The loss of some states that go into lm_head, and its gradient: the end of every step. Suffixes as in micro_step.py."""

from __future__ import annotations

from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from vllm_ttt.worker.ranks import Ranks
from vllm_ttt.worker.step import pointwise

#: Rows of logits that exist at once, in float32: the loss is computed in tiles of this many.
LOSS_ROWS = 256


class Readout(Protocol):
    """lm_head and what becomes of its logits. ``logits`` is the workspace, [LOSS_ROWS, V]; see `cross_entropy`.

    Of several ranks each has a part of the vocabulary, from ``first_token`` on, which may be empty.
    """

    head_VD: Tensor
    bias_V: Tensor | None
    logit_scale: float
    soft_cap: float | None
    logits: Tensor
    softmax_rows: int
    ranks: Ranks
    first_token: int


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
        if end.ranks.size > 1:
            losses.append(_split_nll(end, logits, t, backward, [next(tops) for _ in logits.split(end.softmax_rows)]))
        else:
            for part, t_part in zip(logits.split(end.softmax_rows), t.split(end.softmax_rows), strict=True):
                losses.append(pointwise.nll(part, t_part, end.logit_scale, end.soft_cap, backward, next(tops)))
        if backward:
            grads.append((logits @ end.head_VD).float() * w[:, None])
    return torch.cat(losses) * w_T, end.ranks.sum(torch.cat(grads)) if backward else None


def _split_nll(end: Readout, logits_TV: Tensor, t_T: Tensor, backward: bool, tops: list[Tensor | None]) -> Tensor:
    """As `pointwise.nll`, of logits of which this rank has some columns. ``tops``: its parts of ``softmax_rows`` rows each.

    What the ranks know of their own columns is gathered: the losses have the same bits on all of them.
    """
    parts, width, of = logits_TV.split(end.softmax_rows), logits_TV.shape[1], (end.logit_scale, end.soft_cap)
    at_T = t_T - end.first_token
    at_T = torch.where((at_T >= 0) & (at_T < width), at_T, -1)
    own_3T = torch.full((3, len(t_T)), -torch.inf, dtype=torch.float32, device=t_T.device)
    for known, part, at in zip(own_3T.split(end.softmax_rows, 1), parts, at_T.split(end.softmax_rows), strict=True):
        if width:
            known.copy_(pointwise.known(part, at, *of))
    all_N3T = end.ranks.gather(own_3T)
    lse_T = torch.logsumexp(all_N3T[:, 0], 0)
    loss_T = lse_T - all_N3T[:, 1].amax(0)
    top_T = lse_T - all_N3T[:, 2].amax(0)
    for top, found in zip(tops, top_T.split(end.softmax_rows), strict=True):
        if top is not None:
            top.copy_(found)
    each = zip(parts, *(x.split(end.softmax_rows) for x in (at_T, lse_T)), strict=True)
    for part, at, lse in each if backward and width else ():
        pointwise.known_backward(part, at, lse, *of)
    return loss_T
