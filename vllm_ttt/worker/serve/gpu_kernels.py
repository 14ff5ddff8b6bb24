"""Triton kernels of the deltas that are served on CUDA: y += x A^T B^T, B of each row's session, from 8 bits.

B lies in a slot as int8 [out, R] with a float32 scale for each row, which makes the row's largest number 127. In a batch that
decodes each row has another B: two kernels that read it once, and are busier with making floats of it than with reading
(loadtests/bench_slots.py). In a prompt many rows have one: a kernel that multiplies tiles of them. Either way the order of a
row's sums does not depend on the other rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Batches of up to so many rows, decodes for the most part, take the kernels that read a B for each row.
ROWS = 128
#: Rows of x, and columns of it at a time, that a program of `_shrink` has, these as far as so many bytes of A go: what it reads
#: ahead must fit into shared memory. Into how many parts it cuts the columns at most, and how often a program reads at least:
#: the parts are read once more, by each program of `_expand`.
BLOCK_M, BLOCK_K, A_BYTES, SPLITS, PER = 64, 128, 2**15, 32, 2
#: Rows of B that a program of `_expand` reads at a time, how often, and its warps; and the bytes that may be under way at a
#: time, so that a higher rank has fewer rows.
BLOCK_N, TIMES, WARPS, BYTES = 64, 4, 4, 2**14
#: Rows of one session and outputs of a tile of `_expand_many`, columns of r at a time, tiles of a program, and its warps: the
#: fastest of those tried on an H200 (loadtests/bench_slots.py --sweep), as are the sizes of `_expand`.
MANY_M, MANY_N, MANY_R, MANY_TIMES, MANY_WARPS = 64, 64, 64, 4, 4
#: Numbers of a row that a program of `_add` has.
BLOCK_ADD = 1024
#: Numbers that a program of `_round` has.
BLOCK_ROUND = 4096


# No annotation but constexpr: Triton looks any other name up among the globals of the kernel, and does not compile.
@triton.jit
def _shrink(x, a, parts, N, K, x_stride, R: tl.constexpr, PER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """parts[s] = x A^T over the s-th part of the columns, float32. Grid: (parts, N / BLOCK_M)."""
    rows, r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    found = tl.zeros((BLOCK_M, R), tl.float32)
    for i in range(PER):
        k = (tl.program_id(0) * PER + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        columns = tl.load(a + r[None, :] * K + k[:, None], k[:, None] < K, 0.0)
        given = tl.load(x + rows[:, None].to(tl.int64) * x_stride + k[None, :], (rows[:, None] < N) & (k[None, :] < K), 0.0)
        found = tl.dot(given, columns, found, input_precision="ieee")
    tl.store(parts + (tl.program_id(0) * N + rows[:, None]) * R + r[None, :], found, rows[:, None] < N)


@triton.jit
def _expand(parts, b, scales, d, slots, N, OUT, d_stride, b_stride, scales_stride, SPLITS: tl.constexpr, PADDED: tl.constexpr,
            R: tl.constexpr, BLOCK_N: tl.constexpr, TIMES: tl.constexpr):  # fmt: skip
    """d[t, n] = scales[slots[t], n] sum_k r[t, k] b[slots[t], n, k], r being the sum of the parts; rows of slot -1 stay. Grid:
    (out, N)."""
    row = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    first, k = tl.program_id(0) * TIMES * BLOCK_N, tl.arange(0, R)
    at, n = b + slot.to(tl.int64) * b_stride + k[None, :], first + tl.arange(0, BLOCK_N)
    scales += slot.to(tl.int64) * scales_stride
    weights = tl.load(at + n[:, None] * R, n[:, None] < OUT, 0)  # on their way while r is summed
    scale = tl.load(scales + n, n < OUT, 0.0)
    s = tl.arange(0, PADDED)
    r = tl.sum(tl.load(parts + (s[:, None] * N + row) * R + k[None, :], s[:, None] < SPLITS, 0.0), 0)
    for i in tl.static_range(TIMES):
        if i > 0:
            n = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = tl.load(at + n[:, None] * R, n[:, None] < OUT, 0)
            scale = tl.load(scales + n, n < OUT, 0.0)
        tl.store(d + row.to(tl.int64) * d_stride + n, tl.sum(weights.to(tl.float32) * r[None, :], 1) * scale, n < OUT)


@triton.jit
def _expand_many(r, b, scales, y, by_slot, counts, starts, active, ENTRIES, OUT, y_stride, b_stride, scales_stride,
                 R: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
                 TIMES: tl.constexpr):  # fmt: skip
    """y[t] += r[t] b[slot of t]^T, rows sorted by slot. Grid: (out / (BLOCK_N TIMES), at least as many as there are tiles of
    BLOCK_M rows of one slot): the device alone knows how many these are."""
    i, mine = tl.arange(0, PADDED), tl.program_id(1)
    slots = tl.load(active + i, i < ENTRIES, -1)
    sizes = tl.where(slots < 0, 0, tl.load(counts + i, i < ENTRIES, 0))
    tiles = (sizes + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(tiles, 0) - tiles
    if mine >= tl.sum(tiles, 0):
        return
    own = (before <= mine) & (mine < before + tiles)
    slot = tl.sum(tl.where(own, slots, 0), 0).to(tl.int64)
    size, start = tl.sum(tl.where(own, sizes, 0), 0), tl.sum(tl.where(own, tl.load(starts + i, i < ENTRIES, 0), 0), 0)
    m = (mine - tl.sum(tl.where(own, before, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, k = tl.load(by_slot + start + m, m < size, 0).to(tl.int64), tl.arange(0, BLOCK_R)
    b += slot * b_stride
    scales += slot * scales_stride
    given = tl.load(r + rows[:, None] * R + k[None, :], (m[:, None] < size) & (k[None, :] < R), 0.0)
    for block in range(TIMES):
        n = (tl.program_id(0) * TIMES + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        weights = tl.load(b + n[None, :] * R + k[:, None], (n[None, :] < OUT) & (k[:, None] < R), 0)
        found = tl.dot(given, weights.to(given.dtype), input_precision="ieee")  # integers up to 127 are exact in 16 bits
        for first in tl.static_range(BLOCK_R, R, BLOCK_R):
            c = first + k
            more = tl.load(r + rows[:, None] * R + c[None, :], (m[:, None] < size) & (c[None, :] < R), 0.0)
            weights = tl.load(b + n[None, :] * R + c[:, None], (n[None, :] < OUT) & (c[:, None] < R), 0)
            found = tl.dot(more, weights.to(given.dtype), found, input_precision="ieee")
        inside, out = (m[:, None] < size) & (n[None, :] < OUT), y + rows[:, None] * y_stride + n[None, :]
        found = found * tl.load(scales + n, n < OUT, 0.0)[None, :] + tl.load(out, inside, 0.0).to(tl.float32)
        tl.store(out, found, inside)


@triton.jit
def _add(y, d, slots, OUT, y_stride, BLOCK: tl.constexpr):
    """y += d, float32, in rows that have a slot. Grid: (OUT / BLOCK, N)."""
    row = tl.program_id(1)
    if tl.load(slots + row) < 0:
        return
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = y + row.to(tl.int64) * y_stride + n
    tl.store(out, tl.load(out, n < OUT, 0.0).to(tl.float32) + tl.load(d + row * OUT + n, n < OUT, 0.0), n < OUT)


@triton.jit
def _round(b, b8, scales, N, K, b_stride, R, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Rows [N, K] as int8 [N, R], zeros in what is beyond K, and their scales. Grid: N / BLOCK."""
    n, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    row = n[:, None].to(tl.int64)
    given = tl.load(b + row * b_stride + k[None, :], (n[:, None] < N) & (k[None, :] < K), 0.0).to(tl.float32)
    most = tl.max(tl.abs(given), 1)
    some = most > 1e-30  # below that 127 / most is not a number
    codes = tl.floor(given * tl.where(some, 127.0 / most, 0.0)[:, None] + 0.5)
    tl.store(b8 + row * R + k[None, :], codes.to(tl.int8), (n[:, None] < N) & (k[None, :] < R))
    tl.store(scales + n, tl.where(some, most / 127.0, 0.0), n < N)


def decodes(x: Tensor, b: list[Tensor]) -> bool:
    """Whether the kernels for few rows with a B each take ``x``."""
    rank = b[0].shape[3]
    return x.shape[0] <= ROWS and rank >= 16 and rank & (rank - 1) == 0


def parts_of(x: Tensor, a_RI: Tensor) -> Tensor:
    """Room for x A^T in parts that are to be added up, float32 [parts, N, R]."""
    blocks = -(-x.shape[1] // shrinking(a_RI)["BLOCK_K"])
    per = max(PER, -(-blocks // SPLITS))
    return torch.empty(-(-blocks // per), x.shape[0], a_RI.shape[0], device=x.device)


def shrinking(a_RI: Tensor) -> dict[str, Any]:
    """Sizes of `_shrink`, but for PER."""
    R, size = a_RI.shape[0], a_RI.element_size()
    columns = min(2 * BLOCK_K // size, A_BYTES // (size * R))
    return {"R": R, "BLOCK_M": BLOCK_M, "BLOCK_K": columns, "num_warps": 4 if R <= 128 else 8}


def by_rows(d: Tensor, x: Tensor, a_RI: Tensor, b: list[Tensor], scales: list[Tensor], slots: Tensor, parts: Tensor) -> None:
    """d = x A^T B^T, in rows that have a slot, where few rows have a B each, which is read once. `add_rows` adds it.

    Args:
        d: [N, out] float32, the slices of ``b`` beside each other. x: [N, in]. b: per slice, int8 [slots, 1, out of it, R].
        scales: of each, float32 [slots, 1, out of it]. slots: [N] int32, slot of each row, or -1. parts: of `parts_of`.
    """
    (N, K), (splits, _, R) = x.shape, parts.shape
    sizes = shrinking(a_RI)
    sizes["PER"] = -(-K // (sizes["BLOCK_K"] * splits))
    _shrink[(splits, -(-N // BLOCK_M))](x, a_RI, parts, N, K, x.stride(0), **sizes)
    sizes = {"R": R, "SPLITS": splits, "PADDED": triton.next_power_of_2(splits), "TIMES": TIMES}
    sizes |= {"BLOCK_N": (at_once := min(BLOCK_N, BYTES // R)), "num_warps": WARPS}
    offset = 0
    for b8, scale in zip(b, scales, strict=True):
        out, to = b8.shape[2], d[:, offset:]
        strides = d.stride(0), b8.stride(0), scale.stride(0)
        grid = -(-out // (at_once * TIMES)), N
        _expand[grid](parts, b8, scale, to, slots, N, out, *strides, **sizes)
        offset += out


def by_slots(
    y: Tensor, r_NR: Tensor, b: list[Tensor], scales: list[Tensor], by_slot: Tensor, counts: Tensor, starts: Tensor,
    active: Tensor,
) -> None:  # fmt: skip
    """y += r B^T where many rows have one B. Of any rank.

    Args:
        y: [N, out]. b, scales: as for `by_rows`. r_NR: x A^T in the model's dtype.
        by_slot: [N] int32, rows sorted by slot. active, counts, starts: [slots + 1] int32 or longer, slots of the batch and -1,
            rows of each, and where in ``by_slot`` they begin.
    """
    (N, R), entries = r_NR.shape, active.shape[0]
    sizes: dict[str, Any] = {"R": R, "PADDED": triton.next_power_of_2(entries), "BLOCK_M": MANY_M, "BLOCK_N": MANY_N}
    sizes |= {"BLOCK_R": max(16, min(MANY_R, triton.next_power_of_2(R))), "TIMES": MANY_TIMES}
    # Of a high rank, what a program prefetches of its next tiles would not fit into shared memory.
    sizes |= {"num_warps": MANY_WARPS, "num_stages": 3 if R <= 2 * MANY_R else 1}
    tiles, offset = min(N, N // MANY_M + entries), 0
    for b8, scale in zip(b, scales, strict=True):
        out, to = b8.shape[2], y[:, offset:]
        strides = y.stride(0), b8.stride(0), scale.stride(0)
        grid = -(-out // (MANY_N * MANY_TIMES)), tiles
        _expand_many[grid](r_NR, b8, scale, to, by_slot, counts, starts, active, entries, out, *strides, **sizes)
        offset += out


def add_rows(y: Tensor, d: Tensor, slots: Tensor) -> None:
    """y += d, [N, out] float32, in rows that have a slot."""
    N, out = d.shape
    sizes: dict[str, Any] = {"BLOCK": BLOCK_ADD}
    _add[(-(-out // BLOCK_ADD), N)](y, d, slots, out, y.stride(0), **sizes)


def round_into(b8_NR: Tensor, scale_N: Tensor, b_NK: Tensor) -> None:
    """Make ``b_NK``, of any float dtype and of rank R or a smaller one, int8 with a float32 scale for each row."""
    (N, K), R = b_NK.shape, b8_NR.shape[1]
    assert b_NK.stride(1) == 1
    assert b8_NR.is_contiguous()
    assert K <= R
    padded = triton.next_power_of_2(R)
    block = max(1, BLOCK_ROUND // padded)
    sizes: dict[str, Any] = {"BLOCK": block, "PADDED": padded}
    if N:
        _round[(-(-N // block),)](b_NK, b8_NR, scale_N, N, K, b_NK.stride(0), R, **sizes)


def rounded(b: Tensor) -> tuple[Tensor, Tensor]:
    """[..., out, R], contiguous, as int8 of that shape and float32 scales [..., out]."""
    b8, scale = torch.empty_like(b, dtype=torch.int8), torch.empty(b.shape[:-1], device=b.device)
    round_into(b8.flatten(0, -2), scale.flatten(), b.flatten(0, -2))
    return b8, scale
