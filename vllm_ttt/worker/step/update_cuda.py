"""The passes of update.py over whole matrices as Triton kernels: each number is read once by each, and written once.

A program has a piece of one matrix, and of its master: M matrices after one another belong to one session, of whose row among
the masters ``rows`` tells. What a program sums is a number of its own, and torch adds those of a matrix in a fixed order: the
same bits each time. Arguments and results as in update.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ttt.worker.ranks import Ranks

#: Numbers of a matrix that a program has.
PIECE = 4096


# No annotation but constexpr in a kernel: Triton looks any other name up among the globals, and does not compile.
@triton.jit
def _sums(u, rows, g, out, n, M, BLOCK: tl.constexpr):
    """Grid: (matrices, pieces). out [4, matrices, pieces]: of g, of its squares, of g u, of the squares of u, a master's."""
    matrix, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    master = tl.load(rows + matrix // M) * M + matrix % M
    x = tl.load(g + matrix * n + i, i < n, 0.0)
    y = tl.load(u + master * n + i, i < n, 0.0).to(tl.float32)
    place = out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    each = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, tl.sum(x, 0))
    tl.store(place + each, tl.sum(x * x, 0))
    tl.store(place + 2 * each, tl.sum(x * y, 0))
    tl.store(place + 3 * each, tl.sum(y * y, 0))


@triton.jit
def _products(b, rows, u, out, n, M, BLOCK: tl.constexpr):
    """Grid as for `_sums`. out [3, matrices, pieces], float64: of the squares of b, a master's, of b u, of the squares of u."""
    matrix, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    master = tl.load(rows + matrix // M) * M + matrix % M
    x = tl.load(b + master * n + i, i < n, 0.0).to(tl.float64)
    y = tl.load(u + matrix * n + i, i < n, 0.0).to(tl.float64)
    place = out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    each = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, tl.sum(x * x, 0))
    tl.store(place + each, tl.sum(x * y, 0))
    tl.store(place + 2 * each, tl.sum(y * y, 0))


@triton.jit
def _write(ok, b, rows, u, last, kept, length, n, M, BLOCK: tl.constexpr):
    """Grid as for `_sums`; a matrix has the ``ok`` of its session, and its own ``kept`` and ``length``."""
    matrix, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(ok + matrix // M).to(tl.int1):
        at = (tl.load(rows + matrix // M) * M + matrix % M) * n + i
        y = tl.load(u + matrix * n + i, i < n, 0.0)
        tl.store(b + at, tl.load(b + at, i < n, 0.0) * tl.load(kept + matrix) - y * tl.load(length + matrix), i < n)
        tl.store(last + at, y, i < n)


@triton.jit
def _picked(x, rows, out, n, M, BLOCK: tl.constexpr):
    """Grid as for `_sums`."""
    matrix, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    master = tl.load(rows + matrix // M) * M + matrix % M
    tl.store(out + matrix * n + i, tl.load(x + master * n + i, i < n, 0.0), i < n)


def sums(g_SMOR: Tensor, last_PMOR: Tensor, rows_S: Tensor) -> tuple[Tensor, Tensor]:
    whole, *squares = _by_matrix(_sums, last_PMOR, rows_S, g_SMOR, 4, torch.float32)
    return whole.sum(1), torch.stack(squares)


def lengths(
    b_PMOR: Tensor, rows_S: Tensor, u_SMOR: Tensor, kept_S: Tensor, far_SM: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """|k b - l u|² = k² b² - 2 k l b u + l² u² needs nothing but sums that the same pass gives. They are float64: where k b and
    l u nearly cancel, their difference keeps its digits. (The Gram matrix would give |u| too, but of a gradient whose rank
    is small only to a few thousandths.)"""
    bb, bu, uu = ranks.total(_by_matrix(_products, b_PMOR, rows_S, u_SMOR, 3, torch.float64))
    length, kept = far_SM / (uu.sqrt() + 1e-12), kept_S[:, None].double()
    stepped = (kept * (kept * bb - 2 * length * bu) + length.square() * uu).clamp(min=0.0)
    return length.float(), stepped.sqrt().float(), bb.sqrt().float()


def write(
    ok_S: Tensor, b_PMOR: Tensor, rows_S: Tensor, u_SMOR: Tensor, last_PMOR: Tensor, kept_SM: Tensor, length_SM: Tensor
) -> None:
    S, M, size = *u_SMOR.shape[:2], u_SMOR.shape[2] * u_SMOR.shape[3]
    u, kept, length = (x.contiguous() for x in (u_SMOR, kept_SM, length_SM))
    if u.numel():
        _write[S * M, _pieces(size)](ok_S, b_PMOR, rows_S, u, last_PMOR, kept, length, size, M, **_piece())


def picked(x_PMOR: Tensor, rows_S: Tensor, dtype: torch.dtype) -> Tensor:
    M, size, S = x_PMOR.shape[1], x_PMOR.shape[2] * x_PMOR.shape[3], len(rows_S)
    out = torch.empty(S, *x_PMOR.shape[1:], dtype=dtype, device=x_PMOR.device)
    if out.numel():
        _picked[S * M, _pieces(size)](x_PMOR, rows_S, out, size, M, **_piece())
    return out


def _by_matrix(kernel: Any, x_PMOR: Tensor, rows_S: Tensor, y_SMOR: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count, S, M]: what ``kernel`` sums."""
    S, M, size = *y_SMOR.shape[:2], y_SMOR.shape[2] * y_SMOR.shape[3]
    out = torch.empty(count, S, M, _pieces(size), dtype=dtype, device=y_SMOR.device)
    if out.numel():
        kernel[S * M, _pieces(size)](x_PMOR, rows_S, y_SMOR.contiguous(), out, size, M, **_piece())
    return out.sum(-1)


def _pieces(size: int) -> int:
    return -(-size // PIECE)


def _piece() -> dict[str, Any]:
    return {"BLOCK": PIECE, "num_warps": 8}
