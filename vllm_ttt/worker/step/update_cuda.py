"""The passes of update.py over whole matrices as Triton kernels: each number is read once by each, and written once.

A program has a piece of one matrix. What it sums is a number of its own, and torch adds those of a matrix in a fixed order: the
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
def _sums(g, u, out, n, BLOCK: tl.constexpr):
    """Grid: (matrices, pieces). out [4, matrices, pieces]: of g, of its squares, of g u, of the squares of u."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * n + i
    x = tl.load(g + at, i < n, 0.0)
    y = tl.load(u + at, i < n, 0.0).to(tl.float32)
    place = out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    each = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, tl.sum(x, 0))
    tl.store(place + each, tl.sum(x * x, 0))
    tl.store(place + 2 * each, tl.sum(x * y, 0))
    tl.store(place + 3 * each, tl.sum(y * y, 0))


@triton.jit
def _products(b, u, out, n, BLOCK: tl.constexpr):
    """Grid as for `_sums`. out [3, matrices, pieces], float64: of the squares of b, of b u, of the squares of u."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * n + i
    x = tl.load(b + at, i < n, 0.0).to(tl.float64)
    y = tl.load(u + at, i < n, 0.0).to(tl.float64)
    place = out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    each = tl.num_programs(0) * tl.num_programs(1)
    tl.store(place, tl.sum(x * x, 0))
    tl.store(place + each, tl.sum(x * y, 0))
    tl.store(place + 2 * each, tl.sum(y * y, 0))


@triton.jit
def _written(ok, b, u, last, kept, length, new, new_last, n, M, BLOCK: tl.constexpr):
    """Grid as for `_sums`; of M matrices in a row each has the ``ok`` of their session, and its own ``kept`` and ``length``."""
    matrix, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = matrix.to(tl.int64) * n + i
    x = tl.load(b + at, i < n, 0.0)
    if tl.load(ok + matrix // M).to(tl.int1):
        y = tl.load(u + at, i < n, 0.0)
        tl.store(new + at, x * tl.load(kept + matrix) - y * tl.load(length + matrix), i < n)
        tl.store(new_last + at, y, i < n)
    else:
        tl.store(new + at, x, i < n)
        tl.store(new_last + at, tl.load(last + at, i < n, 0.0), i < n)


def sums(g_SMOR: Tensor, u_SMOR: Tensor) -> tuple[Tensor, Tensor]:
    whole, *squares = _by_matrix(_sums, g_SMOR, u_SMOR, 4, torch.float32)
    return whole.sum(1), torch.stack(squares)


def lengths(b_SMOR: Tensor, u_SMOR: Tensor, kept_S: Tensor, far_SM: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """|k b - l u|² = k² b² - 2 k l b u + l² u² needs nothing but sums that the same pass gives. They are float64: where k b and
    l u nearly cancel, their difference keeps its digits. (The Gram matrix would give |u| too, but of a gradient whose rank
    is small only to a few thousandths.)"""
    bb, bu, uu = ranks.total(_by_matrix(_products, b_SMOR, u_SMOR, 3, torch.float64))
    length, kept = far_SM / (uu.sqrt() + 1e-12), kept_S[:, None].double()
    stepped = (kept * (kept * bb - 2 * length * bu) + length.square() * uu).clamp(min=0.0)
    return length.float(), stepped.sqrt().float(), bb.sqrt().float()


def written(
    ok_S: Tensor, b_SMOR: Tensor, u_SMOR: Tensor, last_SMOR: Tensor, kept_SM: Tensor, length_SM: Tensor
) -> tuple[Tensor, Tensor]:
    S, M, size = *b_SMOR.shape[:2], b_SMOR.shape[2] * b_SMOR.shape[3]
    b, u, last, kept, length = (x.contiguous() for x in (b_SMOR, u_SMOR, last_SMOR, kept_SM, length_SM))
    new, new_last = torch.empty_like(b), torch.empty_like(last)
    if b.numel():
        _written[S * M, _pieces(size)](ok_S, b, u, last, kept, length, new, new_last, size, M, **_piece())
    return new, new_last


def _by_matrix(kernel: Any, x_SMOR: Tensor, y_SMOR: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count, S, M]: what ``kernel`` sums."""
    S, M, size = *x_SMOR.shape[:2], x_SMOR.shape[2] * x_SMOR.shape[3]
    out = torch.empty(count, S, M, _pieces(size), dtype=dtype, device=x_SMOR.device)
    if out.numel():
        kernel[S * M, _pieces(size)](x_SMOR.contiguous(), y_SMOR.contiguous(), out, size, **_piece())
    return out.sum(-1)


def _pieces(size: int) -> int:
    return -(-size // PIECE)


def _piece() -> dict[str, Any]:
    return {"BLOCK": PIECE, "num_warps": 8}
