"""`mixing.mix` where the logits are, for sessions and tokens that the host does not know yet: two kernels, and nobody waits.

The first adds up each row of logits in pieces. In the second a program looks up the contexts of its row, all lengths at once by
binary search, and then writes the logits of its part of the followers of the last token, which are all that can move. Their
number is not bounded: many take more turns.

Of two contexts of three tokens and more that share a hash (index.py), the followers count that the next shorter one has.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ttt.worker.ngrams.index import BITS, HASH_BITS
from vllm_ttt.worker.ngrams.tables import Tables

#: Parts of a row of logits that are added up at once, and columns that one takes at a time.
PIECES, COLUMNS = 8, 2048
#: Programs that share the followers of one row, and followers that one takes at a time.
SHARES, FOLLOWERS = 4, 256
#: Lengths of a context, as a power of two.
LENGTHS = 8


# No annotation but constexpr in a kernel: Triton looks any other name up among the globals, and does not compile.
@triton.jit
def _add_up(logits, stride, places, peaks, totals, V, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """Of each piece of a row its highest logit, and the sum of exp(logit - highest). Grid: (rows, PIECES)."""
    row, piece = tl.program_id(0), tl.program_id(1)
    if tl.load(places + 2 * row) < 0:
        return
    logits += row.to(tl.int64) * stride
    width = (V + PIECES - 1) // PIECES
    end = tl.minimum((piece + 1) * width, V)
    most, total = tl.full((BLOCK,), -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(piece * width, end, BLOCK):  # each column of the block keeps a maximum and a sum of its own
        n = first + tl.arange(0, BLOCK)
        x = tl.load(logits + n, n < end, -float("inf")).to(tl.float32)
        more = tl.maximum(most, x)
        total = tl.where(more == -float("inf"), 0.0, total * tl.exp(most - more) + tl.exp(x - more))
        most = more
    peak = tl.max(most, 0)
    tl.store(peaks + row * PIECES + piece, peak)
    tl.store(totals + row * PIECES + piece, tl.sum(tl.where(most == -float("inf"), 0.0, total * tl.exp(most - peak)), 0))


@triton.jit
def _search(keys, low, high, needle, left):
    """The first of the places from ``low`` to ``high`` whose key is not below ``needle``; tensors of one shape. ``left``: the
    most places that there are."""
    while left > 0:
        middle = (low + high) // 2
        open_ = low < high
        key = tl.load(keys + middle, open_, 0).to(tl.uint64, bitcast=True)
        below = open_ & (key < needle)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open_ & (key >= needle), middle, high)
        left = left // 2
    return low


@triton.jit
def _mix(
    logits, stride, places, indices, positions, tokens, tokens_stride, peaks, totals, keys, keys_stride, sums, sums_stride,
    sizes, shares, steps, V, ORDERS: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, HASH_BITS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, SHARES). A lane of the vectors of LENGTHS is a length of the context, from 1."""
    row = tl.program_id(0)
    slot = tl.load(places + 2 * row)
    if slot < 0:
        return
    logits += row.to(tl.int64) * stride
    tokens += tl.load(places + 2 * row + 1).to(tl.int64) * tokens_stride
    keys += slot.to(tl.int64) * keys_stride
    sums += slot.to(tl.int64) * sums_stride
    size, position = tl.load(sizes + slot), tl.load(positions + tl.load(indices + row)).to(tl.int32)

    # The hashes of the contexts, as index.py makes them: of each length the key before any token.
    lane = tl.arange(0, LENGTHS)
    one = tl.full((), 1, tl.uint64)
    hashed, needle = one - one, tl.zeros((LENGTHS,), tl.uint64)
    for length in tl.static_range(1, ORDERS + 1):
        token = tl.load(tokens + position - (length - 1), position >= length - 1, 0).to(tl.uint64)
        if length <= 2:
            hashed = hashed | (token << (BITS * (length - 1)))
        else:
            mixed = (hashed + (token + one) * 0x6A09E667F3BCC909) * 0x9E3779B97F4A7C15
            mixed = mixed ^ (mixed >> 29)
            hashed = (mixed * 0x9E3779B97F4A7C15) >> (64 - HASH_BITS)
        low = (one * length << (BITS + HASH_BITS)) | (hashed << BITS)
        needle = tl.where(lane == length - 1, low, needle)

    side, none = tl.arange(0, 2)[:, None], tl.zeros((2, LENGTHS), tl.int32)  # where its followers begin, and where they end
    found = _search(keys, none, none + size, needle[None, :] + (side.to(tl.uint64) << BITS), size)
    first, end = tl.sum(tl.where(side == 0, found, 0), 0), tl.sum(tl.where(side == 1, found, 0), 0)
    some = (end > first) & (lane <= position) & (lane < ORDERS)
    known = tl.min(tl.where(some, LENGTHS, lane), 0)  # lengths before the first of which nothing is known
    if known == 0:
        return

    # PPM: of each length the factor that its counts are multiplied with, and what is left to the model.
    inside = lane < known
    kinds = tl.where(inside, end - first, 0)
    total = tl.load(sums + end, inside, 0) - tl.load(sums + first, inside, 0)
    whole = (total + kinds).to(tl.float32)
    factor, left = tl.zeros((LENGTHS,), tl.float32), 1.0
    for back in tl.static_range(0, ORDERS):
        here = inside & (lane == ORDERS - 1 - back)
        factor = tl.where(here, left / whole, factor)
        left *= tl.sum(tl.where(here, kinds / whole, 0.0), 0) + tl.where(ORDERS - 1 - back < known, 0.0, 1.0)

    piece = tl.arange(0, PIECES)
    peaks_of, sums_of = tl.load(peaks + row * PIECES + piece), tl.load(totals + row * PIECES + piece)
    peak = tl.max(peaks_of, 0)
    unsure = tl.log(tl.sum(tl.where(sums_of > 0, sums_of * tl.exp(peaks_of - peak), 0.0), 0))  # the loss of the first choice
    step = tl.sum((tl.load(steps + tl.arange(0, STEPS)) < unsure).to(tl.int32), 0)
    share = tl.load(shares + (slot * ORDERS + known - 1) * (STEPS + 1) + step)
    model = 1.0 - share * (1.0 - left)

    begin, stop = tl.sum(tl.where(lane == 0, first, 0), 0), tl.sum(tl.where(lane == 0, end, 0), 0)
    for at in range(begin + tl.program_id(1) * BLOCK, stop, tl.num_programs(1) * BLOCK):
        n = at + tl.arange(0, BLOCK)
        there = n < stop
        follower = tl.load(keys + n, there, 0) & ((1 << BITS) - 1)
        part = tl.sum(tl.where(lane == 0, factor, 0.0), 0) * (tl.load(sums + n + 1, there, 0) - tl.load(sums + n, there, 0))
        for other in tl.static_range(1, ORDERS):
            if other < known:
                its = lane == other
                low_, high_ = tl.sum(tl.where(its, first, 0), 0), tl.sum(tl.where(its, end, 0), 0)
                wanted = tl.sum(tl.where(its, needle, one - one), 0) | follower.to(tl.uint64)
                at_ = _search(keys, tl.zeros_like(n) + low_, tl.where(there, high_, low_), wanted, high_ - low_)
                same = there & (at_ < high_)
                same = same & (tl.load(keys + at_, same, 0).to(tl.uint64, bitcast=True) == wanted)
                part += tl.sum(tl.where(its, factor, 0.0), 0) * (
                    tl.load(sums + at_ + 1, same, 0) - tl.load(sums + at_, same, 0)
                )
        there = there & (follower < V)
        x = tl.load(logits + follower, there, 0.0).to(tl.float32)
        p = tl.exp(x - peak - unsure) * model + share * part
        tl.store(logits + follower, tl.log(p) + (peak + unsure - tl.log(model)), there)


def mix(logits_NV: Tensor, places_N2: Tensor, indices_N: Tensor, positions: Tensor, tokens: Tensor, tables: Tables) -> None:
    """Mix the caches of sessions into the rows of logits that are theirs, in place and in their dtype; others keep their bits.

    Args:
        places_N2: as `tables.places` gives them.
        indices_N: of each row, where in ``positions`` that of the token is which came last before it.
        tokens: [requests, positions], int32: what was sent and sampled.
    """
    N, V = logits_NV.shape
    peaks, totals = torch.empty(2, N, PIECES, dtype=torch.float32, device=logits_NV.device)
    stride, sizes = logits_NV.stride(0), dict[str, Any](PIECES=PIECES, BLOCK=COLUMNS)
    _add_up[(N, PIECES)](logits_NV, stride, places_N2, peaks, totals, V, **sizes)
    shape = dict[str, Any](ORDERS=tables.orders, STEPS=len(tables.steps), BITS=BITS, HASH_BITS=HASH_BITS)
    shape |= {"PIECES": PIECES, "LENGTHS": LENGTHS, "BLOCK": FOLLOWERS}
    _mix[(N, SHARES)](
        logits_NV, stride, places_N2, indices_N, positions, tokens, tokens.stride(0), peaks, totals, tables.keys,
        tables.keys.stride(0), tables.sums, tables.sums.stride(0), tables.sizes, tables.shares, tables.steps, V, **shape,
    )  # fmt: skip
