"""The micro-step: forward and backward of the tail by hand, and the update of B.

The tail is what follows the attention of the first adapted layer. With `last` that is o_proj, the MLP, the final norm and
lm_head: it needs no attention and no position, so the tokens of all sessions are rows of the same matrices; only the low-rank
parts are per session. With `deep` further layers come between, each with its attention (qkv.py).
The algorithm is docs/algorithm.md; `vllm_ttt.eval.oracle` is the plain loop that this file is held to.

Dimension suffixes:
  S sessions in the batch   C rows of each (padded)   T = S * C rows
  D hidden size             Q attention output        F intermediate size   R rank   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_ttt.worker import block, qkv
from vllm_ttt.worker.attention import Attention, SDPAAttention
from vllm_ttt.worker.block import Block, Passed
from vllm_ttt.worker.qkv import QKV, Past, Rotated

#: Rows of logits that exist at once, in float32: the loss is computed in tiles of this many.
LOSS_ROWS = 256

#: The modules of a delta, in the order in which they are stored. gate and up are one tensor in the forward, two in the update.
MODULES = ("o", "g", "u", "d")


@dataclass
class Tail:
    """The frozen weights that the step needs, in the dtype of its matrix products; those of a layer are of the last one.

    wo_DQ, wgu_2FD, wd_DF and head_VD are weights as [out, in]; ao_RQ, ai_RD, ad_RF the fixed projections A. ``head_VD`` holds
    the real vocabulary alone, without padding. ``norm`` are the Frobenius norms of the weights of MODULES.
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
    bo_D: Tensor | None = None
    bgu_2F: Tensor | None = None
    bd_D: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    #: the adapted layers below the last, lowest first, and the attention of each layer above the lowest
    lower: tuple[Block, ...] = ()
    attentions: tuple[QKV, ...] = ()
    kernel: Attention = field(default_factory=SDPAAttention)

    def __post_init__(self) -> None:
        #: the workspace of the loss, [LOSS_ROWS, V]
        self.logits = self.head_VD.new_empty(LOSS_ROWS, self.head_VD.shape[0])
        self.softmax_rows = 32 if self.head_VD.device.type == "cpu" else LOSS_ROWS

    @property
    def blocks(self) -> tuple[Block | Tail, ...]:
        """The adapted layers, lowest first."""
        return (*self.lower, self)

    @property
    def rank(self) -> int:
        return self.ao_RQ.shape[0]

    def outputs(self) -> dict[str, int]:
        """Rows of each module's B."""
        F = self.wd_DF.shape[1]
        return {"o": self.wo_DQ.shape[0], "g": F, "u": F, "d": self.wd_DF.shape[0]}


class Delta:
    """B matrices of several sessions: o_SDR, gu_S2FR (gate first) and d_SDR of each adapted layer, lowest first. Gradients have
    the same shape."""

    __slots__ = ("_tensors",)

    def __init__(self, *tensors: Tensor):
        self._tensors = tensors

    @classmethod
    def zeros(cls, tail: Tail, sessions: int, dtype: torch.dtype = torch.float32) -> Delta:
        out, like = tail.outputs(), tail.wo_DQ
        sizes = (out["o"], out["g"] + out["u"], out["d"]) * len(tail.blocks)
        return cls(*(torch.zeros(sessions, n, tail.rank, dtype=dtype, device=like.device) for n in sizes))

    @property
    def o(self) -> Tensor:
        """Of the last layer, as ``gu`` and ``d`` are."""
        return self._tensors[-3]

    @property
    def gu(self) -> Tensor:
        return self._tensors[-2]

    @property
    def d(self) -> Tensor:
        return self._tensors[-1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self._tensors

    def layer(self, i: int) -> Delta:
        """Of one layer, counted from the lowest."""
        return Delta(*self._tensors[3 * i : 3 * i + 3])

    def layers(self) -> Iterator[Delta]:
        return (self.layer(i) for i in range(len(self._tensors) // 3))

    def select(self, rows_S: Tensor) -> Delta:
        """A copy of the given sessions, in the given order."""
        return Delta(*(x.index_select(0, rows_S) for x in self.tensors()))

    def to(self, dtype: torch.dtype) -> Delta:
        return Delta(*(x.to(dtype) for x in self.tensors()))

    def times(self, scale: float) -> Delta:
        """The delta times ``scale``; itself where that is 1."""
        return self if scale == 1.0 else Delta(*(x * scale for x in self.tensors()))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(module, [S, out, R] view), layer by layer, in the order of MODULES."""
        for layer in self.layers():
            F = layer.gu.shape[1] // 2
            yield "o", layer.o
            yield "g", layer.gu[:, :F]
            yield "u", layer.gu[:, F:]
            yield "d", layer.d


def accumulate(
    tail: Tail,
    delta: Delta,
    h_SCD: Tensor,
    a_SCQ: Tensor,
    t_SC: Tensor,
    w_SC: Tensor,
    grad: Delta | None,
    past: Past | None = None,
) -> Tensor:
    """Add the gradient of the weighted loss of some rows to ``grad``, and return that loss.

    Args:
        delta: B as it is, whatever the scale it is served with, in the tail's dtype.
        h_SCD: residual stream entering the first adapted layer. a_SCQ: that layer's attention output. Both as served.
        t_SC: int64, the token that follows.
        w_SC: float32, weight of each row's loss: 1 / (rows of its chunk), and 0 for padding.
        grad: float32; None to compute the loss alone.
        past: what the layers above the first attend to; None where there is none.
    Returns:
        [S] float32, the weighted sum of each session's losses in nats.
    """
    (S, C, _), blocks = h_SCD.shape, tail.blocks
    r_TD, passed, rotated = forward(tail, delta, h_SCD, a_SCQ, past, grad is not None)
    y_TD, i2_T1 = last_norm(tail, r_TD)
    loss_T, dy_TD = _cross_entropy(tail, y_TD, t_SC.reshape(-1), w_SC.reshape(-1), backward=grad is not None)
    loss_S = loss_T.view(S, C).sum(1)
    if grad is None:
        return loss_S
    assert dy_TD is not None

    d_TD = block.rms_backward(dy_TD * tail.lnf_D, r_TD, i2_T1)
    for i in reversed(range(len(blocks))):
        d_TD = block.backward(blocks[i], tail, delta.layer(i), grad.layer(i), passed.pop(), d_TD, S)
        if i:
            da_TQ = block.attention_gradient(blocks[i], tail, delta.layer(i), d_TD, S)
            d_TD = d_TD + qkv.backward(tail.attentions[i - 1], tail.kernel, rotated.pop(), da_TQ)
    return loss_S


def forward(
    tail: Tail, delta: Delta, h_SCD: Tensor, a_SCQ: Tensor, past: Past | None, grad: bool
) -> tuple[Tensor, list[Passed], list[Rotated]]:
    """The residual stream [T, D] that leaves the last layer, and what a backward needs of each layer where ``grad``.

    Arguments as for `accumulate`.
    """
    S, C, D = h_SCD.shape
    r_TD, a_TQ = h_SCD.reshape(S * C, D), a_SCQ.reshape(S * C, -1).to(tail.wo_DQ.dtype)
    passed, rotated = [], []
    for i, layer in enumerate(tail.blocks):
        if i:
            assert past is not None
            a_TQ, turned = qkv.forward(tail.attentions[i - 1], tail.kernel, past, i - 1, r_TD, grad)
            rotated.append(turned)
        r_TD, saved = block.forward(layer, tail, delta.layer(i), r_TD, a_TQ, S)
        if grad:
            passed.append(saved)
    return r_TD, passed, rotated


def last_norm(tail: Tail, r_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into lm_head, in its dtype, and the inverse norm [T, 1] of the rows."""
    inv_T1 = torch.rsqrt(r_TD.square().mean(-1, keepdim=True) + tail.eps_f)
    return (r_TD * inv_T1 * tail.lnf_D).to(tail.wo_DQ.dtype), inv_T1


def update(
    tail: Tail,
    delta: Delta,
    grad: Delta,
    loss_S: Tensor,
    share_S: Tensor,
    rate: float,
    decay: float,
    max_norm: float,
    max_loss: float,
) -> tuple[Delta, Tensor, Tensor]:
    """One step of the optimiser for each session, as new tensors; nothing is changed in place.

    Args:
        delta: the master B, float32. grad: its gradient, float32.
        loss_S: the chunk's mean loss in nats. share_S: the chunk's rows / rows of a full chunk.
        max_loss: nats; a session whose loss is larger, or whose gradient is not finite, keeps its B as it is.
    Returns:
        the new B; [S] bool, whether the session was updated; [4, S], norms of B relative to W, by MODULES, of the layer in
        which they are largest.
    """
    finite_S = torch.isfinite(loss_S)
    for _, g_SOR in grad.parts():
        finite_S = finite_S & torch.isfinite(g_SOR.sum((1, 2)))
    ok_S = finite_S & (loss_S <= max_loss)
    new = Delta(*(torch.empty_like(x) for x in delta.tensors()))
    weights = [layer.norm[name] for layer in tail.blocks for name in MODULES]
    norms = []
    for (_, b_SOR), (_, g_SOR), (_, out_SOR), weight in zip(delta.parts(), grad.parts(), new.parts(), weights, strict=True):
        u_SOR = orthogonalise(torch.where(finite_S[:, None, None], g_SOR, 0.0))
        length_S = share_S * (rate * weight) / (torch.linalg.vector_norm(u_SOR, dim=(1, 2)) + 1e-12)
        stepped = b_SOR * (1 - decay * share_S)[:, None, None] - u_SOR * length_S[:, None, None]
        norm_S = torch.linalg.vector_norm(stepped, dim=(1, 2))
        limit = max_norm * weight
        stepped = stepped * (limit / norm_S.clamp(min=limit))[:, None, None]
        torch.where(ok_S[:, None, None], stepped, b_SOR, out=out_SOR)
        norms.append(torch.linalg.vector_norm(out_SOR, dim=(1, 2)) / weight)
    return new, ok_S, torch.stack(norms).view(len(tail.blocks), len(MODULES), -1).amax(0)


def orthogonalise(g_SOR: Tensor) -> Tensor:
    """Newton-Schulz: five iterations that bring the singular values of each matrix near 1.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers (2024), with its coefficients.
    """
    tall = g_SOR.shape[1] > g_SOR.shape[2]
    x = g_SOR.transpose(1, 2) if tall else g_SOR
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-12)
    if x.device.type == "cuda":
        x = x.bfloat16()  # what the tensor cores are for; the iteration contracts its rounding
    for _ in range(5):
        xx = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.transpose(1, 2) if tall else x).float()


def token_losses(tail: Tail, y_TD: Tensor, t_T: Tensor, w_T: Tensor) -> Tensor:
    """Weighted losses [T] float32 in nats of the tokens ``t_T``, given the tail's last normalised states ``y_TD``."""
    return _cross_entropy(tail, y_TD, t_T, w_T, backward=False)[0]


def _cross_entropy(tail: Tail, y_TD: Tensor, t_T: Tensor, w_T: Tensor, backward: bool) -> tuple[Tensor, Tensor | None]:
    """Weighted losses [T] and their gradient with respect to y [T, D].

    One buffer of LOSS_ROWS x V in the model's dtype holds first the logits, then their gradient; float32 exists for
    ``tail.softmax_rows`` rows at a time (on a CPU, few enough to stay in its cache).
    """
    losses, grads = [], []
    for y, t, w in zip(y_TD.split(LOSS_ROWS), t_T.split(LOSS_ROWS), w_T.split(LOSS_ROWS), strict=True):
        logits = tail.logits[: y.shape[0]]
        torch.mm(y, tail.head_VD.T, out=logits)
        for part, t_part in zip(logits.split(tail.softmax_rows), t.split(tail.softmax_rows), strict=True):
            losses.append(_nll(tail, part, t_part, backward))
        if backward:
            grads.append((logits @ tail.head_VD).float() * w[:, None])
    return torch.cat(losses) * w_T, torch.cat(grads) if backward else None


def _nll(tail: Tail, logits: Tensor, t_T: Tensor, backward: bool) -> Tensor:
    """Losses of some rows; where asked, ``logits`` becomes their gradient, softmax - onehot, in place."""
    x, slope = logits.float(), None
    if tail.soft_cap is not None:
        x = torch.tanh(x / tail.soft_cap)
        slope = 1 - x.square()
        x = x * tail.soft_cap
    x = torch.log_softmax(x * tail.logit_scale if tail.logit_scale != 1.0 else x, -1)
    loss_T = -x.gather(1, t_T[:, None])[:, 0]
    if backward:
        x.exp_().scatter_add_(1, t_T[:, None], x.new_full((1, 1), -1.0).expand(len(t_T), 1))
        if tail.logit_scale != 1.0:
            x *= tail.logit_scale
        if slope is not None:
            x *= slope
        logits.copy_(x)
    return loss_T
