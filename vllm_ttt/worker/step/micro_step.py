"""The micro-step: forward and backward of the tail by hand. The update of B is in update.py.

The tail is what follows the attention of the first adapted layer. With `last` that is o_proj, the MLP, the final norm and
lm_head: it needs no attention and no position, so the tokens of all sessions are rows of the same matrices; only the low-rank
parts are per session. With `deep` further layers come between, each with its attention (qkv.py). With `head` nothing is left of
it but lm_head (head.py).
The algorithm is docs/algorithm.md; `vllm_ttt.eval.oracle` is the plain loop that this file is held to.

Dimension suffixes:
  S sessions in the batch   C rows of each (padded)   T = S * C rows
  D hidden size             Q attention output        F intermediate size   R rank   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.step import block, head, pointwise, qkv
from vllm_ttt.worker.step.attention import Attention, SDPAAttention
from vllm_ttt.worker.step.block import Block, Passed
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.loss import cross_entropy, workspace
from vllm_ttt.worker.step.products import Back, Served
from vllm_ttt.worker.step.qkv import QKV, Past, Rotated
from vllm_ttt.worker.step.update import Norms


@dataclass
class Tail:
    """The model's weights that the step needs, in the dtype of its matrix products; those of a layer are of the last one.

    wo_DQ, wgu_2FD, wd_DF and head_VD are weights as [out, in]; ao_RQ, ai_RD, ad_RF the fixed projections A. ``head_VD`` holds
    the real vocabulary alone, without padding. ``norm`` are the Frobenius norms of the weights by MODULES, of which ``modules``
    are adapted.
    """

    wo_DQ: Tensor
    wgu_2FD: Tensor
    wd_DF: Tensor
    head_VD: Tensor
    ln_D: Tensor
    lnf_D: Tensor
    eps: float
    eps_f: float
    ao_RQ: Tensor
    ai_RD: Tensor
    ad_RF: Tensor
    norm: dict[str, float]
    modules: str = "ogud"
    bo_D: Tensor | None = None
    bgu_2F: Tensor | None = None
    bd_D: Tensor | None = None
    #: as in `Block`
    served: dict[str, Served] = field(default_factory=dict)
    back: dict[str, Back] = field(default_factory=dict)
    joined: dict[str, Tensor] = field(default_factory=dict)
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    #: the adapted layers below the last, lowest first, and the attention of each layer above the lowest; of the lowest too
    #: where that is the model's first: it is entered by ``embedding_VD``
    lower: tuple[Block, ...] = ()
    attentions: tuple[QKV, ...] = ()
    embedding_VD: Tensor | None = None
    kernel: Attention = field(default_factory=SDPAAttention)
    #: each has a part of Q, of F and of the vocabulary: this one's begins at ``first_token`` of ``tokens``. ``drawn``: A whole,
    #: by the number of its inputs; None: it is whole here
    ranks: Ranks = ALONE
    first_token: int = 0
    tokens: int | None = None
    drawn: dict[int, Tensor] | None = None

    def __post_init__(self) -> None:
        self.logits, self.softmax_rows = workspace(self.head_VD)
        self.norms = Norms(self.modules, [x.norm for x in self.blocks], self.head_VD.device)

    @property
    def captured(self) -> int:
        """Layers whose attention output is captured where it is served: the first adapted one, or none."""
        return len(self.blocks) - len(self.attentions) if self.attentions else 1

    @property
    def blocks(self) -> tuple[Block | Tail, ...]:
        """The adapted layers, lowest first."""
        return (*self.lower, self)

    @property
    def rank(self) -> int:
        return self.ao_RQ.shape[0]

    @property
    def room(self) -> int:
        """Of `pointwise.norm_backward`."""
        return self.rank if any(x.joined for x in self.blocks) else 0

    @property
    def vocabulary(self) -> int:
        """Of all ranks together."""
        return self.head_VD.shape[0] if self.tokens is None else self.tokens

    def entering(self, h: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the first adapted layer: ``h`` and ``a`` as captured, or the embeddings of the tokens ``x``."""
        if self.embedding_VD is None:
            return h, a
        if self.ranks.size == 1:
            return torch.nn.functional.embedding(x, self.embedding_VD), None
        at = x - self.first_token
        mine, at = (at >= 0) & (at < len(self.embedding_VD)), at.clamp(0, len(self.embedding_VD) - 1)
        found = torch.nn.functional.embedding(at, self.embedding_VD).float() * mine.unsqueeze(-1)
        return self.ranks.sum(found).to(self.embedding_VD.dtype), None

    @property
    def projections(self) -> dict[int, Tensor]:
        """A by the number of its inputs, whole."""
        if self.drawn is not None:
            return self.drawn
        return {a.shape[1]: a for a in (self.ao_RQ, self.ai_RD, self.ad_RF)}

    def exported(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """``delta``, B by name on the host, as an adapter of PEFT has it."""
        return delta

    def zeros(self, sessions: int, dtype: torch.dtype = torch.float32) -> Delta:
        """The delta of so many fresh sessions."""
        D, F = self.wd_DF.shape
        return Delta.zeros(self.modules, len(self.blocks), sessions, D, F, self.rank, dtype, self.head_VD.device)


def accumulate(
    tail: Tail | Head,
    delta: Delta,
    h_SCD: Tensor,
    a_SCQ: Tensor | None,
    t_SC: Tensor,
    w_SC: Tensor,
    grad: Delta | None,
    past: Past | None = None,
    rows_2SC: Tensor | None = None,
) -> Tensor:
    """Add the gradient of the weighted loss of some rows to ``grad``, and return that loss.

    Args:
        delta: B, in the tail's dtype.
        h_SCD: residual stream entering the first adapted layer. a_SCQ: that layer's attention output, None where the step
            computes it. Both as served.
        t_SC: int64, the token that follows.
        w_SC: float32, weight of each row's loss: 1 / (rows of its chunk), and 0 for padding.
        grad: float32; None to compute the loss alone.
        past: what the layers above the first attend to; None where there is none.
        rows_2SC: float32, gets of each row its weighted loss, and what that of the likeliest token would be, not weighted;
            None: nobody asks.
    Returns:
        [S] float32, the weighted sum of each session's losses in nats.
    """
    if isinstance(tail, Head):
        return head.accumulate(tail, delta, h_SCD, t_SC, w_SC, grad, rows_2SC)
    (S, C, _), blocks = h_SCD.shape, tail.blocks
    r_TD, y_TD, passed, rotated = forward(tail, delta, h_SCD, a_SCQ, past, grad is not None)
    dt = tail.wo_DQ.dtype
    normed, x_TD = pointwise.norm(r_TD, y_TD, tail.lnf_D, tail.eps_f, dt)
    top_T = None if rows_2SC is None else rows_2SC[1].view(-1)
    loss_T, dy_TD = cross_entropy(tail, x_TD, t_SC.reshape(-1), w_SC.reshape(-1), grad is not None, top_T)
    if rows_2SC is not None:
        rows_2SC[0].copy_(loss_T.view(S, C))
    loss_S = loss_T.view(S, C).sum(1)
    if grad is None:
        return loss_S
    assert dy_TD is not None

    flow = pointwise.norm_backward(None, dy_TD, tail.lnf_D, normed, dt, tail.room)
    for i in reversed(range(len(blocks))):
        flow = block.backward(blocks[i], tail, delta.layer(i), grad.layer(i), passed.pop(), flow, S)
        if i:
            da_TQ = block.attention_gradient(blocks[i], tail, delta.layer(i), flow, S)
            assert past is not None
            attention = tail.attentions[i - tail.captured]
            flow = qkv.backward(attention, tail.kernel, past, rotated.pop(), da_TQ, flow, tail.room)
    return loss_S


def forward(
    tail: Tail, delta: Delta, h_SCD: Tensor, a_SCQ: Tensor | None, past: Past | None, grad: bool
) -> tuple[Tensor, Tensor | None, list[Passed], list[Rotated]]:
    """The residual stream that leaves the last layer, as two terms [T, D], and where ``grad`` what a backward needs of a layer.

    Arguments as for `accumulate`.
    """
    S, C, D = h_SCD.shape
    r_TD, a_TQ = h_SCD.reshape(S * C, D).float(), None if a_SCQ is None else a_SCQ.reshape(S * C, -1).to(tail.wo_DQ.dtype)
    y_TD, passed, rotated = None, [], []
    for i, layer in enumerate(tail.blocks):
        if (number := i - tail.captured) >= 0:
            assert past is not None
            r_TD, a_TQ, turned = qkv.forward(tail.attentions[number], tail.kernel, past, number, r_TD, y_TD)
            if grad and i:
                rotated.append(turned)
        assert a_TQ is not None
        r_TD, y_TD, saved = block.forward(layer, tail, delta.layer(i), r_TD, a_TQ, S)
        if grad:
            passed.append(saved)
    return r_TD, y_TD, passed, rotated
