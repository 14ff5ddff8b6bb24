"""Triton kernels of the deltas that are served on CUDA: y += x A^T B^T, B of each row's session, from 8 bits.

B lies in a slot as int8 [out, R] with a float32 scale for each row, which makes the row's largest number 127. In a batch that
decodes each row has another B, which is read once and multiplied as it lies, four numbers an instruction: x A^T is rounded to
16 bits for that, and sums are exact. In a prompt many rows have one B: a kernel that multiplies tiles of them. Either way a
row's sums do not depend on the other rows.
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
#: the parts are read once more.
BLOCK_M, BLOCK_K, A_BYTES, SPLITS, PER = 64, 128, 2**15, 32, 4
#: Bytes of B that a program of `_expand` reads, and its warps.
BYTES, WARPS = 2**12, 1
#: Rows of one session and outputs of a tile of `_expand_many`, columns of r at a time, tiles of a program, and its warps: the
#: fastest of those tried on an H200 (loadtests/bench_slots.py --sweep), as are the sizes of `_expand`.
MANY_M, MANY_N, MANY_R, MANY_TIMES, MANY_WARPS = 64, 64, 64, 4, 4
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
def _add_up(parts, digits, steps, N, SPLITS: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr):
    """The sum of the parts as whole numbers of 16 bits, as digits [N, 2, R] of 8: steps[t] (256 high + low). Grid: N."""
    row, k, s = tl.program_id(0), tl.arange(0, R), tl.arange(0, PADDED)
    r = tl.sum(tl.load(parts + (s[:, None] * N + row) * R + k[None, :], s[:, None] < SPLITS, 0.0), 0)
    most = tl.max(tl.abs(r), 0)
    whole = tl.floor(r * tl.where(most > 1e-30, 32512.0 / most, 0.0) + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    tl.store(digits + row * 2 * R + k, high.to(tl.int8))
    tl.store(digits + (row * 2 + 1) * R + k, (whole - (high << 8)).to(tl.int8))
    tl.store(steps + row, most / 32512.0)


@triton.jit
def _products(b, high, low, PLAIN: tl.constexpr):
    """Of the four numbers in each word of ``b`` with those that 256 high + low has there, the sum. PLAIN: without instructions
    of a GPU."""
    if PLAIN:
        found = tl.zeros(b.shape, tl.int32)
        for shift in tl.static_range(0, 32, 8):
            r = ((high << (24 - shift)) >> 24) * 256 + ((low << (24 - shift)) >> 24)
            found += ((b << (24 - shift)) >> 24) * r
        return found
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; dp4a.s32.s32 t, $1, $2, 0; shl.b32 t, t, 8; dp4a.s32.s32 $0, $1, $3, t; }", "=r,r,r,r",
        [b, high, low], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _expand(digits, steps, b, scales, y, slots, OUT, y_stride, b_stride, scales_stride, WORDS: tl.constexpr,
            BLOCK: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """y[t, n] += scales[slots[t], n] sum_k r[t, k] b[slots[t], n, k], r as `_add_up` leaves it; rows of slot -1 stay. Words are
    of 32 bits, four numbers of B. Grid: (out / BLOCK, N)."""
    row, n, w = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WORDS)
    slot = tl.load(slots + row)
    high, low = tl.load(digits + row * 2 * WORDS + w), tl.load(digits + (row * 2 + 1) * WORDS + w)
    step = tl.load(steps + row)
    if slot < 0:
        return
    slot, out = slot.to(tl.int64), y + row.to(tl.int64) * y_stride + n
    words = tl.load(b + slot * b_stride + n[:, None] * WORDS + w[None, :], n[:, None] < OUT, 0)
    scale, before = tl.load(scales + slot * scales_stride + n, n < OUT, 0.0), tl.load(out, n < OUT, 0.0).to(tl.float32)
    found = tl.sum(_products(words, high[None, :], low[None, :], PLAIN), 1).to(tl.float32)
    tl.store(out, found * (step * scale) + before, n < OUT)


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


def shrinking(a_RI: Tensor) -> dict[str, Any]:
    """Sizes of `_shrink`, but for PER."""
    R, size = a_RI.shape[0], a_RI.element_size()
    columns = min(2 * BLOCK_K // size, A_BYTES // (size * R))
    return {"R": R, "BLOCK_M": BLOCK_M, "BLOCK_K": columns, "num_warps": 4 if R <= 128 else 8}


def shrink(x: Tensor, a_RI: Tensor) -> tuple[Tensor, Tensor]:
    """x A^T of [N, in], to 16 bits: steps [N] and digits int8 [N, 2, R], steps (256 digits[:, 0] + digits[:, 1])."""
    (N, K), R, sizes = x.shape, a_RI.shape[0], shrinking(a_RI)
    blocks = -(-K // sizes["BLOCK_K"])
    sizes["PER"] = max(PER, -(-blocks // SPLITS))
    splits = -(-blocks // sizes["PER"])
    parts = torch.empty(splits, N, R, device=x.device)
    _shrink[(splits, -(-N // BLOCK_M))](x, a_RI, parts, N, K, x.stride(0), **sizes)
    digits, steps = torch.empty(N, 2, R, dtype=torch.int8, device=x.device), torch.empty(N, device=x.device)
    more: dict[str, Any] = {"SPLITS": splits, "PADDED": triton.next_power_of_2(splits), "R": R, "num_warps": -(-R // 64)}
    _add_up[(N,)](parts, digits, steps, N, **more)
    return steps, digits


def expand(y: Tensor, steps: Tensor, digits: Tensor, b: list[Tensor], scales: list[Tensor], slots: Tensor) -> None:
    """y += x A^T B^T, in rows that have a slot, where few rows have a B each, which is read once.

    Args:
        y: [N, out], the slices of ``b`` beside each other. steps, digits: of `shrink`.
        b: per slice, int8 [slots, 1, out of it, R]. scales: of each, float32 [slots, 1, out of it].
        slots: [N] int32, slot of each row, or -1.
    """
    N, _, R = digits.shape
    sizes: dict[str, Any] = {"WORDS": R // 4, "BLOCK": BYTES // R, "PLAIN": not y.is_cuda, "num_warps": WARPS}
    digits, offset = digits.view(torch.int32), 0
    for b8, scale in zip(b, scales, strict=True):
        words, out, to = b8.view(torch.int32), b8.shape[2], y[:, offset:]
        strides = y.stride(0), words.stride(0), scale.stride(0)
        _expand[(-(-out // sizes["BLOCK"]), N)](digits, steps, words, scale, to, slots, out, *strides, **sizes)
        offset += out


def by_slots(
    y: Tensor, r_NR: Tensor, b: list[Tensor], scales: list[Tensor], by_slot: Tensor, counts: Tensor, starts: Tensor,
    active: Tensor,
) -> None:  # fmt: skip
    """y += r B^T where many rows have one B. Of any rank.

    Args:
        y: [N, out]. b, scales: as for `expand`. r_NR: x A^T in the model's dtype.
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
