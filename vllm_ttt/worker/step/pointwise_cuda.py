"""The functions of pointwise.py as Triton kernels: each number is read once and written once, and all between is float32.

A program has one row, or some heads of one row; a row of logits is read in pieces. Arguments and results as in pointwise.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ttt.worker.step import pointwise
from vllm_ttt.worker.step.attention import Own
from vllm_ttt.worker.step.pointwise import Flow, Normed
from vllm_ttt.worker.step.qkv import QKV, HeadNorm

#: Columns that a program of the gated activation, and a pass over a row of logits, has at once.
COLUMNS = 1024
PIECE = 4096
#: Heads of a row that a program turns, at most.
HEADS = 8


# No annotation but constexpr in a kernel: Triton looks any other name up among the globals, and does not compile.
@triton.jit
def _norm(r, y, ln, out, inv, x, D, y_stride, eps, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * D
    n = tl.arange(0, BLOCK)
    inside = n < D
    v = tl.load(r + row + n, inside, 0.0).to(tl.float32)
    if HAS_Y:
        v += tl.load(y + tl.program_id(0).to(tl.int64) * y_stride + n, inside, 0.0).to(tl.float32)
        tl.store(out + row + n, v, inside)
    i = 1.0 / tl.sqrt(tl.sum(v * v, 0) / D + eps)
    tl.store(inv + tl.program_id(0), i)
    tl.store(x + row + n, v * i * tl.load(ln + n, inside, 0.0), inside)


@triton.jit
def _norm_backward(
    d, dx, ln, r, y, inv, out, low, D, y_stride, low_stride, HAS_D: tl.constexpr, HAS_Y: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D
    n = tl.arange(0, BLOCK)
    inside = n < D
    g = tl.load(dx + row + n, inside, 0.0).to(tl.float32) * tl.load(ln + n, inside, 0.0)
    v = tl.load(r + row + n, inside, 0.0).to(tl.float32)
    if HAS_Y:
        v += tl.load(y + tl.program_id(0).to(tl.int64) * y_stride + n, inside, 0.0).to(tl.float32)
    i = tl.load(inv + tl.program_id(0))
    total = i * g - v * (i * i * i * (tl.sum(g * v, 0) / D))
    if HAS_D:
        total += tl.load(d + row + n, inside, 0.0)
    tl.store(out + row + n, total, inside)
    tl.store(low + tl.program_id(0).to(tl.int64) * low_stride + n, total, inside)


@triton.jit
def _gated(gu, z, F, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < F
    g = tl.load(gu + row * 2 * F + n, inside, 0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * F + F + n, inside, 0.0).to(tl.float32)
    tl.store(z + row * F + n, g * tl.sigmoid(g) * u, inside)


@triton.jit
def _gated_backward(gu, dz, dgu, F, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < F
    g = tl.load(gu + row * 2 * F + n, inside, 0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * F + F + n, inside, 0.0).to(tl.float32)
    d = tl.load(dz + row * F + n, inside, 0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgu + row * 2 * F + n, d * u * (s + g * s * (1.0 - s)), inside)
    tl.store(dgu + row * 2 * F + F + n, d * g * s, inside)


@triton.jit
def _turn(qkv, table, positions, qw, kw, q, k, inv, H, G, E, HALF, q_eps, k_eps, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
          HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: (T, (H + G) / HEADS); heads of a program are all of queries, or all of keys. A head's partner of a column is the
    other column of its pair."""
    row, j, n = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None],
        tl.arange(0, BLOCK)[None],
    )
    inside = n < E
    at = qkv + row * (H + 2 * G) * E + j * E
    other = tl.where(n < HALF, n + HALF, tl.where(n < 2 * HALF, n - HALF, n))
    x, y = tl.load(at + n, inside, 0.0).to(tl.float32), tl.load(at + other, inside, 0.0).to(tl.float32)
    queries = tl.program_id(1) * HEADS < H
    if Q_NORM and queries:
        i = 1.0 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / E + q_eps)
        x *= i * tl.load(qw + n, n < E, 0.0)
        y *= i * tl.load(qw + other, n < E, 0.0)
        tl.store(inv + row * (H + G) + j, i)
    if K_NORM and not queries:
        i = 1.0 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / E + k_eps)
        x *= i * tl.load(kw + n, n < E, 0.0)
        y *= i * tl.load(kw + other, n < E, 0.0)
        tl.store(inv + row * (H + G) + j, i)
    turned, angle = n < 2 * HALF, tl.where(n < HALF, n, n - HALF)
    place = table + tl.load(positions + row) * 2 * HALF + angle
    cos = tl.load(place, turned, 1.0).to(tl.float32)
    sin = tl.load(place + HALF, turned, 0.0).to(tl.float32)
    x = x * cos + tl.where(n < HALF, -1.0, 1.0) * y * sin
    if queries:
        tl.store(q + (row * H + j) * E + n, x, inside)
    else:
        tl.store(k + (row * G + j - H) * E + n, x, inside)


@triton.jit
def _turn_backward(qkv, table, positions, qw, kw, inv, dq, dk, dv, out, H, G, E, HALF, Q_NORM: tl.constexpr,
                   K_NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid: (T, (H + 2 G) / HEADS), as for `_turn`."""
    row, j, n = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None],
        tl.arange(0, BLOCK)[None],
    )
    first = tl.program_id(1) * HEADS
    inside = n < E
    to = row * (H + 2 * G) * E + j * E
    if first >= H + G:
        tl.store(out + to + n, tl.load(dv + (row * G + j - H - G) * E + n, inside, 0.0), inside)
        return
    other = tl.where(n < HALF, n + HALF, tl.where(n < 2 * HALF, n - HALF, n))
    if first < H:
        d = tl.load(dq + (row * H + j) * E + n, inside, 0.0).to(tl.float32)
        e = tl.load(dq + (row * H + j) * E + other, inside, 0.0).to(tl.float32)
    else:
        d = tl.load(dk + (row * G + j - H) * E + n, inside, 0.0).to(tl.float32)
        e = tl.load(dk + (row * G + j - H) * E + other, inside, 0.0).to(tl.float32)
    turned, angle = n < 2 * HALF, tl.where(n < HALF, n, n - HALF)
    place = table + tl.load(positions + row) * 2 * HALF + angle
    cos = tl.load(place, turned, 1.0).to(tl.float32)
    sin = tl.load(place + HALF, turned, 0.0).to(tl.float32)
    d = d * cos + tl.where(n < HALF, 1.0, -1.0) * e * sin
    if Q_NORM and first < H:
        x, i = tl.load(qkv + to + n, inside, 0.0).to(tl.float32), tl.load(inv + row * (H + G) + j)
        d *= tl.load(qw + n, n < E, 0.0)
        d = i * d - x * (i * i * i * (tl.sum(d * x, 1, keep_dims=True) / E))
    if K_NORM and first >= H:
        x, i = tl.load(qkv + to + n, inside, 0.0).to(tl.float32), tl.load(inv + row * (H + G) + j)
        d *= tl.load(kw + n, n < E, 0.0)
        d = i * d - x * (i * i * i * (tl.sum(d * x, 1, keep_dims=True) / E))
    tl.store(out + to + n, d, inside)


@triton.jit
def _logit(logits, n, inside, scale, cap, CAP: tl.constexpr):
    x = tl.load(logits + n, inside, -float("inf")).to(tl.float32)
    if CAP:
        x = cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)  # cap tanh(x / cap)
        x = tl.where(inside, x, -float("inf"))
    return x * scale


@triton.jit
def _size(logits, V, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Logsumexp and largest of a row of logits. Each column of a block keeps a maximum and a sum of its own."""
    most, total = tl.full((BLOCK,), -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        n = first + tl.arange(0, BLOCK)
        x = _logit(logits, n, n < V, scale, cap, CAP)
        more = tl.maximum(most, x)
        total = tl.where(more == -float("inf"), 0.0, total * tl.exp(most - more) + tl.exp(x - more))
        most = more
    peak = tl.max(most, 0)
    return peak + tl.log(tl.sum(total * tl.exp(most - peak), 0)), peak


@triton.jit
def _slopes(logits, target, size, V, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """A row of logits becomes its gradient."""
    for first in range(0, V, BLOCK):
        n = first + tl.arange(0, BLOCK)
        x = _logit(logits, n, n < V, scale, cap, CAP)
        g = (tl.exp(x - size) - tl.where(n == target, 1.0, 0.0)) * scale
        if CAP:
            share = x / (scale * cap)
            g *= 1.0 - share * share
        tl.store(logits + n, g, n < V)


@triton.jit
def _known(logits, targets, out, V, stride, T, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    size, peak = _size(logits, V, scale, cap, CAP, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out + row, size)
    tl.store(out + T + row, _logit(logits, target, target >= 0, scale, cap, CAP))
    tl.store(out + 2 * T + row, peak)


@triton.jit
def _known_backward(logits, targets, sizes, V, stride, scale, cap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    target, size = tl.load(targets + row), tl.load(sizes + row)
    _slopes(logits + row.to(tl.int64) * stride, target, size, V, scale, cap, CAP, BLOCK)


@triton.jit
def _nll(
    logits, targets, losses, tops, V, stride, scale, cap, CAP: tl.constexpr, TOPS: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    size, peak = _size(logits, V, scale, cap, CAP, BLOCK)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(losses + row, size - _logit(logits, target, target < V, scale, cap, CAP))
    if TOPS:
        tl.store(tops + row, size - peak)
    if BACKWARD:
        tl.debug_barrier()  # nothing is overwritten before all have read
        _slopes(logits, target, size, V, scale, cap, CAP, BLOCK)


@triton.jit
def _scaled(x, x8, scale, K, LARGEST: tl.constexpr, NOTHING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    n = tl.arange(0, BLOCK)
    inside = n < K
    v = tl.load(x + row + n, inside, 0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(v), 0), NOTHING)
    tl.store(scale + tl.program_id(0), tl.div_rn(most, LARGEST))
    tl.store(x8 + row + n, (v * tl.div_rn(LARGEST, most)).to(tl.float8e4nv), inside)


def norm(r_TD: Tensor, y_TD: Tensor | None, ln_D: Tensor, eps: float, dt: torch.dtype) -> tuple[Normed, Tensor]:
    T, D = r_TD.shape
    out = r_TD if y_TD is None else torch.empty_like(r_TD)
    inv, x = r_TD.new_empty(T, 1), torch.empty(T, D, dtype=dt, device=r_TD.device)
    stride = D if y_TD is None else y_TD.stride(0)
    _norm[(T,)](r_TD, y_TD, ln_D, out, inv, x, D, stride, eps, **_row(D, HAS_Y=y_TD is not None))
    return Normed(out, inv), x


def norm_backward(d_TD: Tensor | None, dx_TD: Tensor, ln_D: Tensor, normed: Normed, dt: torch.dtype, room: int = 0) -> Flow:
    (T, D), (r, inv, y), out = dx_TD.shape, normed, torch.empty_like(normed.r_TD)
    low, roomy = pointwise.low_of(r, dt, room)
    given = d_TD, dx_TD.contiguous(), ln_D, r, y, inv, out, low, D, D if y is None else y.stride(0), low.stride(0)
    _norm_backward[(T,)](*given, **_row(D, HAS_D=d_TD is not None, HAS_Y=y is not None))
    return Flow(out, low, roomy)


def gated(gu_T2F: Tensor, dt: torch.dtype) -> Tensor:
    T, F = gu_T2F.shape[0], gu_T2F.shape[1] // 2
    z = torch.empty(T, F, dtype=dt, device=gu_T2F.device)
    _gated[(T, triton.cdiv(F, COLUMNS))](gu_T2F, z, F, **dict[str, Any](BLOCK=COLUMNS))
    return z


def gated_backward(gu_T2F: Tensor, dz_TF: Tensor) -> Tensor:
    (T, F), dgu = dz_TF.shape, torch.empty_like(gu_T2F)
    _gated_backward[(T, triton.cdiv(F, COLUMNS))](gu_T2F, dz_TF, dgu, F, **dict[str, Any](BLOCK=COLUMNS))
    return dgu


def turn(qkv_TX: Tensor, of: QKV, positions_T: Tensor, dt: torch.dtype) -> tuple[Own, Any]:
    T, (H, G, E) = len(qkv_TX), (of.heads, of.kv_heads, of.head)
    q, k = (torch.empty(T, n, E, dtype=dt, device=qkv_TX.device) for n in (H, G))
    inv = torch.empty(T, H + G, device=qkv_TX.device)
    heads = _heads(H, G)
    _turn[(T, (H + G) // heads)](
        qkv_TX, of.cos_sin_PI, positions_T, _weight(of.q_norm), _weight(of.k_norm), q, k, inv, H, G, E,
        of.cos_sin_PI.shape[1] // 2, _eps(of.q_norm), _eps(of.k_norm), **_head(of, heads),
    )  # fmt: skip
    v = qkv_TX[:, (H + G) * E :].unflatten(-1, (G, E)).to(dt)
    return (q, k, v), (qkv_TX, inv, positions_T)


def turn_backward(of: QKV, saved: Any, heads: Own, dt: torch.dtype) -> Tensor:
    (qkv, inv, positions), (T, H, E), G = saved, heads[0].shape, of.kv_heads
    dq, dk, dv = (x.contiguous() for x in heads)
    out, at_once = torch.empty(qkv.shape, dtype=dt, device=qkv.device), _heads(H, G)
    _turn_backward[(T, (H + 2 * G) // at_once)](
        qkv, of.cos_sin_PI, positions, _weight(of.q_norm), _weight(of.k_norm), inv, dq, dk, dv, out, H, G, E,
        of.cos_sin_PI.shape[1] // 2, **_head(of, at_once),
    )  # fmt: skip
    return out


def nll(
    logits_TV: Tensor, t_T: Tensor, scale: float, soft_cap: float | None, backward: bool, top_T: Tensor | None = None
) -> Tensor:
    (T, V), losses = logits_TV.shape, torch.empty(len(t_T), device=logits_TV.device)
    tops = None if top_T is None else torch.empty_like(losses)  # aligned as all are, so that nothing is compiled again
    flags = dict[str, Any](CAP=soft_cap is not None, TOPS=top_T is not None, BACKWARD=backward, BLOCK=PIECE, num_warps=8)
    _nll[(T,)](logits_TV, t_T, losses, tops, V, logits_TV.stride(0), scale, soft_cap or 1.0, **flags)
    if top_T is not None and tops is not None:
        top_T.copy_(tops)
    return losses


def known(logits_TV: Tensor, at_T: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    (T, V), out = logits_TV.shape, torch.empty(3, len(at_T), device=logits_TV.device)
    flags = dict[str, Any](CAP=soft_cap is not None, BLOCK=PIECE, num_warps=8)
    _known[(T,)](logits_TV, at_T, out, V, logits_TV.stride(0), T, scale, soft_cap or 1.0, **flags)
    return out


def known_backward(logits_TV: Tensor, at_T: Tensor, lse_T: Tensor, scale: float, soft_cap: float | None) -> None:
    (T, V), flags = logits_TV.shape, dict[str, Any](CAP=soft_cap is not None, BLOCK=PIECE, num_warps=8)
    _known_backward[(T,)](logits_TV, at_T, lse_T, V, logits_TV.stride(0), scale, soft_cap or 1.0, **flags)


def scaled(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    (T, K), x = x_TK.shape, x_TK.contiguous()
    x8, scale = torch.empty(T, K, dtype=torch.float8_e4m3fn, device=x.device), torch.empty(T, 1, device=x.device)
    block = 1 << (K - 1).bit_length()
    flags = dict[str, Any](LARGEST=pointwise.LARGEST, NOTHING=pointwise.NOTHING, BLOCK=block, num_warps=_warps(block))
    _scaled[(T,)](x, x8, scale, K, **flags)
    return x8, scale


def _warps(block: int) -> int:
    """So many that a thread has at most 64 numbers of a row."""
    return min(max(block // 2048, 4), 32)


def _row(D: int, **flags: Any) -> dict[str, Any]:
    return {"BLOCK": triton.next_power_of_2(D), "num_warps": 8 if D > 2048 else 4, **flags}


def _heads(H: int, G: int) -> int:
    """How many heads of one row a program has: a power of two of which both numbers of heads are multiples."""
    return min(H & -H, G & -G, HEADS)


def _head(of: QKV, heads: int) -> dict[str, Any]:
    width, norms = triton.next_power_of_2(of.head), {"Q_NORM": of.q_norm is not None, "K_NORM": of.k_norm is not None}
    return {**norms, "HEADS": heads, "BLOCK": width, "num_warps": max(1, min(heads * width // 256, 4))}


def _weight(norm: HeadNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight_E


def _eps(norm: HeadNorm | None) -> float:
    return 0.0 if norm is None else norm.eps
