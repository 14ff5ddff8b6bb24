"""What stands between two matrix products of the step: norms, the gated activation, heads, the rotary embedding, the loss.

Here in plain torch, in float32, as a CPU runs it. On CUDA each is one kernel that reads and writes every number once
(pointwise_cuda.py), and what leaves a matrix product stays in its dtype; both are held to the same tests.

Dimension suffixes as in micro_step.py and attention.py; X = (H + 2 G) E; ``dt`` is the dtype of the matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_ttt.worker.step.attention import Own
    from vllm_ttt.worker.step.qkv import QKV, HeadNorm

#: The largest number of E4M3, and what stands for the largest of a row that has none.
LARGEST, NOTHING = 448.0, 1e-12


class Normed(NamedTuple):
    """A stream ``r_TD`` and its inverse norm ``i_T1``, both float32; with ``y_TD``, of either dtype, the stream is r + y."""

    r_TD: Tensor
    i_T1: Tensor
    y_TD: Tensor | None = None

    @property
    def stream(self) -> Tensor:
        return self.r_TD if self.y_TD is None else self.r_TD + self.y_TD


class Flow(NamedTuple):
    """The gradient with respect to a residual stream, [T, D]: in float32, and in dt for the product that comes next."""

    d_TD: Tensor
    low_TD: Tensor
    #: [T, D + room]: its first columns are ``low_TD``, the others are for what is multiplied beside it (`through_joined`)
    roomy: Tensor | None = None


def norm(r_TD: Tensor, y_TD: Tensor | None, ln_D: Tensor, eps: float, dt: torch.dtype) -> tuple[Normed, Tensor]:
    """RMS norm of r + y, [T, D] in dt; ``r_TD`` float32, ``y_TD`` of either dtype, None for 0."""
    if r_TD.is_cuda:
        return _cuda().norm(r_TD, y_TD, ln_D, eps, dt)
    r_TD = r_TD if y_TD is None else r_TD + y_TD
    i_T1 = torch.rsqrt(r_TD.square().mean(-1, keepdim=True) + eps)
    return Normed(r_TD, i_T1), (r_TD * i_T1 * ln_D).to(dt)


def norm_backward(d_TD: Tensor | None, dx_TD: Tensor, ln_D: Tensor, normed: Normed, dt: torch.dtype, room: int = 0) -> Flow:
    """``d_TD`` (None for 0), which goes past the norm, and ``dx_TD``, which goes through it.

    Args:
        room: so many columns `Flow.roomy` has besides.
    """
    if dx_TD.is_cuda:
        return _cuda().norm_backward(d_TD, dx_TD, ln_D, normed, dt, room)
    through = rms_backward(dx_TD * ln_D, normed.stream, normed.i_T1)
    d_TD = through if d_TD is None else d_TD + through
    low_TD, roomy = low_of(d_TD, dt, room)
    low_TD.copy_(d_TD)
    return Flow(d_TD, low_TD, roomy)


def low_of(d_TD: Tensor, dt: torch.dtype, room: int) -> tuple[Tensor, Tensor]:
    """Empty: the last two of a `Flow`."""
    roomy = torch.empty(d_TD.shape[0], d_TD.shape[1] + room, dtype=dt, device=d_TD.device)
    return roomy[:, : d_TD.shape[1]], roomy


def rms_backward(g_TD: Tensor, x_TD: Tensor, inv_T1: Tensor) -> Tensor:
    """Through x * rsqrt(mean(x^2) + eps), of which ``inv_T1`` is the second factor; also of more dimensions than two."""
    return inv_T1 * g_TD - x_TD * (inv_T1.pow(3) * (g_TD * x_TD).mean(-1, keepdim=True))


def gated(gu_T2F: Tensor, dt: torch.dtype) -> Tensor:
    """silu(g) u, [T, F] in dt; gate first."""
    if gu_T2F.is_cuda:
        return _cuda().gated(gu_T2F, dt)
    g_TF, u_TF = gu_T2F.chunk(2, -1)
    return (torch.nn.functional.silu(g_TF) * u_TF).to(dt)


def gated_backward(gu_T2F: Tensor, dz_TF: Tensor) -> Tensor:
    """The gradient with respect to gate and up, [T, 2F], from that with respect to ``gated``."""
    if gu_T2F.is_cuda:
        return _cuda().gated_backward(gu_T2F, dz_TF)
    g_TF, u_TF = gu_T2F.chunk(2, -1)
    s_TF = torch.sigmoid(g_TF)
    silu_TF = g_TF * s_TF
    # d silu(g) / dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
    return torch.cat((dz_TF * u_TF * (s_TF + silu_TF * (1 - s_TF)), dz_TF * silu_TF), -1)


def turn(qkv_TX: Tensor, of: QKV, positions_T: Tensor, dt: torch.dtype) -> tuple[Own, Any]:
    """Queries, keys and values in dt: the norm of each head, and the rotary embedding; and what `turn_backward` needs."""
    if qkv_TX.is_cuda:
        return _cuda().turn(qkv_TX, of, positions_T, dt)
    E, H, G = of.head, of.heads, of.kv_heads
    q, k, v = (x.unflatten(-1, (-1, E)) for x in qkv_TX.split([H * E, G * E, G * E], -1))
    (q, q_saved), (k, k_saved) = _head_norm(q, of.q_norm), _head_norm(k, of.k_norm)
    cos, sin = of.cos_sin_PI.index_select(0, positions_T).float().unsqueeze(1).chunk(2, -1)
    return (_rotate(q, cos, sin).to(dt), _rotate(k, cos, sin).to(dt), v.to(dt)), (cos, sin, q_saved, k_saved)


def turn_backward(of: QKV, saved: Any, heads: Own, dt: torch.dtype) -> Tensor:
    """The gradient with respect to the projection, [T, X] in dt, from those with respect to queries, keys and values."""
    if heads[0].is_cuda:
        return _cuda().turn_backward(of, saved, heads, dt)
    cos, sin, q_saved, k_saved = saved
    dq, dk = (_rotate(x.float(), cos, -sin) for x in heads[:2])
    dq, dk = _head_norm_backward(dq, of.q_norm, q_saved), _head_norm_backward(dk, of.k_norm, k_saved)
    return torch.cat((dq, dk, heads[2].float()), 1).flatten(1).to(dt)


def nll(
    logits_TV: Tensor, t_T: Tensor, scale: float, soft_cap: float | None, backward: bool, top_T: Tensor | None = None
) -> Tensor:
    """Losses [T] in nats; where asked, ``logits_TV`` becomes their gradient, softmax - onehot, in place.

    Args:
        scale, soft_cap: of the model's logits.
        top_T: float32, gets what the loss of the likeliest token would be; None: nobody asks.
    """
    if logits_TV.is_cuda:
        return _cuda().nll(logits_TV, t_T, scale, soft_cap, backward, top_T)
    x, slope = _as_the_models(logits_TV, scale, soft_cap)
    x = torch.log_softmax(x, -1)
    loss_T = -x.gather(1, t_T[:, None])[:, 0]
    if top_T is not None:
        top_T.copy_(-x.amax(-1))
    if backward:
        x.exp_().scatter_add_(1, t_T[:, None], x.new_full((1, 1), -1.0).expand(len(t_T), 1))
        if scale != 1.0:
            x *= scale
        if slope is not None:
            x *= slope
        logits_TV.copy_(x)
    return loss_T


def known(logits_TV: Tensor, at_T: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """What the logits of a part of the vocabulary say, [3, T]: their logsumexp, that at ``at_T`` (-inf where it is -1: the part
    has it not), and the largest. The rest as for `nll`."""
    if logits_TV.is_cuda:
        return _cuda().known(logits_TV, at_T, scale, soft_cap)
    x, _ = _as_the_models(logits_TV, scale, soft_cap)
    own_T = x.gather(1, at_T.clamp(min=0)[:, None])[:, 0].masked_fill(at_T < 0, -torch.inf)
    return torch.stack((torch.logsumexp(x, -1), own_T, x.amax(-1)))


def known_backward(logits_TV: Tensor, at_T: Tensor, lse_T: Tensor, scale: float, soft_cap: float | None) -> None:
    """Make logits of a part of the vocabulary their gradient, in place. ``lse_T``: of all parts."""
    if logits_TV.is_cuda:
        _cuda().known_backward(logits_TV, at_T, lse_T, scale, soft_cap)
        return
    x, slope = _as_the_models(logits_TV, scale, soft_cap)
    x = (x - lse_T[:, None]).exp_().scatter_add_(1, at_T.clamp(min=0)[:, None], -(at_T >= 0).float()[:, None])
    logits_TV.copy_(x * scale if slope is None else x * slope * scale)


def _as_the_models(logits_TV: Tensor, scale: float, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits as the model has them, float32, and the slope of its soft cap."""
    x, slope = logits_TV.float(), None
    if soft_cap is not None:
        x = torch.tanh(x / soft_cap)
        slope = 1 - x.square()
        x = x * soft_cap
    return x * scale if scale != 1.0 else x, slope


def scaled(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """x in E4M3, and the scale of each row, [T, 1] float32: the largest number of a row becomes the type's largest."""
    if x_TK.is_cuda:
        return _cuda().scaled(x_TK)
    most_T1 = x_TK.abs().amax(-1, keepdim=True).float().clamp(min=NOTHING)
    factor_T1 = torch.full_like(most_T1, LARGEST) / most_T1  # a number over a tensor is its reciprocal times that number
    return (x_TK.float() * factor_T1).to(torch.float8_e4m3fn), most_T1 / LARGEST


def _cuda() -> Any:
    from vllm_ttt.worker.step import pointwise_cuda  # it needs Triton

    return pointwise_cuda


def _head_norm(x_THE: Tensor, norm: HeadNorm | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    if norm is None:
        return x_THE, None
    inv = torch.rsqrt(x_THE.square().mean(-1, keepdim=True) + norm.eps)
    return x_THE * inv * norm.weight_E, (x_THE, inv)


def _head_norm_backward(d_THE: Tensor, norm: HeadNorm | None, saved: tuple[Tensor, Tensor] | None) -> Tensor:
    if norm is None or saved is None:
        return d_THE
    return rms_backward(d_THE * norm.weight_E, *saved)


def _rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in halves (GPT-NeoX); with -sin, its transpose. What is wider than the table is left alone."""
    half = cos.shape[-1]
    a, b, rest = x_THE.split([half, half, x_THE.shape[-1] - 2 * half], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
