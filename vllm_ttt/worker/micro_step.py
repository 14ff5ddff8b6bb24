"""The micro-step of the `last` preset: forward and backward of the tail by hand, and the update of B.

The tail is what follows the last layer's attention: o_proj, the MLP, the final norm and lm_head. It needs no attention
and no position, so the tokens of all sessions are rows of the same matrices; only the low-rank parts are per session.
The algorithm is docs/algorithm.md; `vllm_ttt.eval.oracle` is the plain loop that this file is held to.

Dimension suffixes:
  S sessions in the batch   C rows of each (padded)   T = S * C rows
  D hidden size             Q attention output        F intermediate size   R rank   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows of logits that exist at once, in float32: the loss is computed in tiles of this many.
LOSS_ROWS = 256

#: The modules of a delta, in the order in which they are stored. gate and up are one tensor in the forward, two in the update.
MODULES = ("o", "g", "u", "d")


@dataclass
class Tail:
    """The frozen weights that the step needs, in the dtype of its matrix products.

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

    def __post_init__(self) -> None:
        #: the workspace of the loss, [LOSS_ROWS, V]
        self.logits = self.head_VD.new_empty(LOSS_ROWS, self.head_VD.shape[0])
        self.softmax_rows = 32 if self.head_VD.device.type == "cpu" else LOSS_ROWS

    @property
    def rank(self) -> int:
        return self.ao_RQ.shape[0]

    def outputs(self) -> dict[str, int]:
        """Rows of each module's B."""
        F = self.wd_DF.shape[1]
        return {"o": self.wo_DQ.shape[0], "g": F, "u": F, "d": self.wd_DF.shape[0]}


@dataclass
class Delta:
    """B matrices of several sessions: o_SDR, gu_S2FR (gate first) and d_SDR. Gradients have the same shape."""

    o: Tensor
    gu: Tensor
    d: Tensor

    @classmethod
    def zeros(cls, tail: Tail, sessions: int, dtype: torch.dtype = torch.float32) -> Delta:
        out, like = tail.outputs(), tail.wo_DQ
        new = lambda n: torch.zeros(sessions, n, tail.rank, dtype=dtype, device=like.device)  # noqa: E731
        return cls(new(out["o"]), new(out["g"] + out["u"]), new(out["d"]))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.o, self.gu, self.d

    def select(self, rows_S: Tensor) -> Delta:
        """A copy of the given sessions, in the given order."""
        return Delta(*(x.index_select(0, rows_S) for x in self.tensors()))

    def to(self, dtype: torch.dtype) -> Delta:
        return Delta(*(x.to(dtype) for x in self.tensors()))

    def times(self, scale: float) -> Delta:
        """The delta times ``scale``; itself where that is 1."""
        return self if scale == 1.0 else Delta(*(x * scale for x in self.tensors()))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(module, [S, out, R] view) in the order of MODULES."""
        F = self.gu.shape[1] // 2
        yield "o", self.o
        yield "g", self.gu[:, :F]
        yield "u", self.gu[:, F:]
        yield "d", self.d


def accumulate(
    tail: Tail, delta: Delta, h_SCD: Tensor, a_SCQ: Tensor, t_SC: Tensor, w_SC: Tensor, grad: Delta | None
) -> Tensor:
    """Add the gradient of the weighted loss of some rows to ``grad``, and return that loss.

    Args:
        delta: B as it is, whatever the scale it is served with, in the tail's dtype.
        h_SCD: residual stream entering the last layer. a_SCQ: the layer's attention output. Both as served.
        t_SC: int64, the token that follows.
        w_SC: float32, weight of each row's loss: 1 / (rows of its chunk), and 0 for padding.
        grad: float32; None to compute the loss alone.
    Returns:
        [S] float32, the weighted sum of each session's losses in nats.
    """
    S, C, D = h_SCD.shape
    dt = tail.wo_DQ.dtype
    lora = lambda x_TR, b_SOR: torch.bmm(x_TR.view(S, C, -1), b_SOR.transpose(1, 2)).view(S * C, -1)  # noqa: E731
    h_TD, a_TQ = h_SCD.reshape(S * C, D), a_SCQ.reshape(S * C, -1).to(dt)

    ao_TR = a_TQ @ tail.ao_RQ.T
    r1_TD = h_TD.float() + (a_TQ @ tail.wo_DQ.T).float() + lora(ao_TR, delta.o).float()
    if tail.bo_D is not None:
        r1_TD += tail.bo_D
    i1_T1 = torch.rsqrt(r1_TD.square().mean(-1, keepdim=True) + tail.eps)
    x_TD = (r1_TD * i1_T1 * tail.ln_D).to(dt)
    ax_TR = x_TD @ tail.ai_RD.T
    gu_T2F = (x_TD @ tail.wgu_2FD.T).float() + lora(ax_TR, delta.gu).float()
    if tail.bgu_2F is not None:
        gu_T2F += tail.bgu_2F
    g_TF, u_TF = gu_T2F.chunk(2, -1)
    s_TF = torch.sigmoid(g_TF)
    silu_TF = g_TF * s_TF
    z_TF = (silu_TF * u_TF).to(dt)
    az_TR = z_TF @ tail.ad_RF.T
    r2_TD = r1_TD + (z_TF @ tail.wd_DF.T).float() + lora(az_TR, delta.d).float()
    if tail.bd_D is not None:
        r2_TD += tail.bd_D
    i2_T1 = torch.rsqrt(r2_TD.square().mean(-1, keepdim=True) + tail.eps_f)
    y_TD = (r2_TD * i2_T1 * tail.lnf_D).to(dt)

    loss_T, dy_TD = _cross_entropy(tail, y_TD, t_SC.reshape(-1), w_SC.reshape(-1), backward=grad is not None)
    loss_S = loss_T.view(S, C).sum(1)
    if grad is None:
        return loss_S
    assert dy_TD is not None

    d2_TD = _rms_backward(dy_TD * tail.lnf_D, r2_TD, i2_T1)
    d2 = d2_TD.to(dt)
    _add_outer(grad.d, d2_TD, az_TR, S)
    dz_TF = (d2 @ tail.wd_DF).float() + _through(d2, delta.d, tail.ad_RF, S)
    # d silu(g) / dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    dgu_T2F = torch.cat((dz_TF * u_TF * (s_TF + silu_TF * (1 - s_TF)), dz_TF * silu_TF), -1)
    dgu = dgu_T2F.to(dt)
    _add_outer(grad.gu, dgu_T2F, ax_TR, S)
    dx_TD = (dgu @ tail.wgu_2FD).float() + _through(dgu, delta.gu, tail.ai_RD, S)
    d1_TD = d2_TD + _rms_backward(dx_TD * tail.ln_D, r1_TD, i1_T1)
    _add_outer(grad.o, d1_TD, ao_TR, S)
    return loss_S


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
        the new B; [S] bool, whether the session was updated; [4, S], norms of B relative to W, by MODULES.
    """
    finite_S = torch.isfinite(loss_S)
    for _, g_SOR in grad.parts():
        finite_S = finite_S & torch.isfinite(g_SOR.sum((1, 2)))
    ok_S = finite_S & (loss_S <= max_loss)
    new = Delta(*(torch.empty_like(x) for x in delta.tensors()))
    norms = []
    for (name, b_SOR), (_, g_SOR), (_, out_SOR) in zip(delta.parts(), grad.parts(), new.parts(), strict=True):
        u_SOR = orthogonalise(torch.where(finite_S[:, None, None], g_SOR, 0.0))
        length_S = share_S * (rate * tail.norm[name]) / (torch.linalg.vector_norm(u_SOR, dim=(1, 2)) + 1e-12)
        stepped = b_SOR * (1 - decay * share_S)[:, None, None] - u_SOR * length_S[:, None, None]
        norm_S = torch.linalg.vector_norm(stepped, dim=(1, 2))
        limit = max_norm * tail.norm[name]
        stepped = stepped * (limit / norm_S.clamp(min=limit))[:, None, None]
        torch.where(ok_S[:, None, None], stepped, b_SOR, out=out_SOR)
        norms.append(torch.linalg.vector_norm(out_SOR, dim=(1, 2)) / tail.norm[name])
    return new, ok_S, torch.stack(norms)


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


def _rms_backward(g_TD: Tensor, x_TD: Tensor, inv_T1: Tensor) -> Tensor:
    return inv_T1 * g_TD - x_TD * (inv_T1.pow(3) * (g_TD * x_TD).mean(-1, keepdim=True))


def _through(d_TO: Tensor, b_SOR: Tensor, a_RI: Tensor, S: int) -> Tensor:
    """The gradient that flows back through B A: [T, I] float32."""
    return (torch.bmm(d_TO.view(S, -1, d_TO.shape[-1]), b_SOR).view(d_TO.shape[0], -1) @ a_RI).float()


def _add_outer(g_SOR: Tensor, d_TO: Tensor, x_TR: Tensor, S: int) -> None:
    """g += d^T x, per session."""
    d_SCO, x_SCR = d_TO.view(S, -1, d_TO.shape[-1]), x_TR.view(S, -1, x_TR.shape[-1])
    g_SOR.baddbmm_(d_SCO.transpose(1, 2), x_SCR.to(d_SCO.dtype))
