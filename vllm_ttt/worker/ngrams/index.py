"""What followed each context of a stream, sorted: looking a context up is a binary search for each length.

A context and a token that followed it are one number of 64 bits: the context's hash above, the token below. Contexts of one
and two tokens are their own hash; of longer ones two might share 44 bits, and then share what followed them.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_ttt.worker.ngrams.stream import BREAK, Tokens, shown

#: Bits of a token's id.
BITS = 20
_MASK = np.uint64(2**BITS - 1)
_SHIFT = np.uint64(BITS)
_ONE = np.uint64(1)
_ALL = 2**64 - 1
#: Odd, and of no simple form: the fractional parts of the golden ratio and of the root of two.
_FACTOR, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x6A09E667F3BCC909)

Keys = NDArray[np.uint64]


class Followers(NamedTuple):
    """What comes after one context: tokens, ascending, and what PPM gives to each; the rest is the model's."""

    #: of the longest context that is known; 0: none is
    length: int
    tokens: NDArray[np.int64]
    shares: NDArray[np.float64]
    #: what is left to the model
    rest: float


_NONE = Followers(0, np.zeros(0, np.int64), np.zeros(0), 1.0)


class Index:
    """Of one stream; never changes."""

    def __init__(self, stream: Tokens, orders: int):
        #: by length of the context, from 1: keys, ascending, and how often each occurs
        self.orders: list[tuple[Keys, NDArray[np.int32]]] = []
        tokens, learned = shown(stream), np.flatnonzero(stream >= 0)
        known, hashed = tokens.astype(np.uint64), np.zeros(len(learned), np.uint64)
        at = learned
        for length in range(1, orders + 1):
            at, hashed = at[at >= length], hashed[at >= length]
            whole = tokens[at - length] != BREAK
            at, hashed = at[whole], hashed[whole]
            hashed = _grow(hashed, known[at - length], length)
            keys = np.sort(hashed << _SHIFT | known[at])
            first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, np.int64)
            counts = np.diff(np.concatenate((first, [len(keys)]))).astype(np.int32)
            self.orders.append((keys[first], counts))

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + counts.nbytes for keys, counts in self.orders)

    def followers(self, before: Tokens) -> Followers:
        """What comes after the tokens ``before``, of which the last ones count."""
        found, hashed = [], 0
        for length, token in enumerate(before[: -len(self.orders) - 1 : -1].tolist(), 1):
            keys, counts = self.orders[length - 1]
            hashed = _grow_one(hashed, token, length)
            first, end = keys.searchsorted(np.array((hashed << BITS, (hashed + 1 << BITS) - 1), np.uint64)).tolist()
            if first == end:
                break
            found.append((keys[first:end] & _MASK, counts[first:end]))
        if not found:
            return _NONE
        tokens = found[0][0]  # whatever followed a longer context followed the shortest
        shares, left = np.zeros(len(tokens)), 1.0
        for seen, counts in reversed(found):
            kinds, total = len(counts), int(counts.sum()) + len(counts)
            at = tokens.searchsorted(seen)
            if kinds > len(tokens) or at[-1] == len(tokens) or (tokens[at] != seen).any():
                continue  # two contexts that share a hash
            shares[at] += left / total * counts
            left *= kinds / total
        return Followers(len(found), tokens.astype(np.int64), shares, left)

    def parts(self, before: Tokens, token: Tokens) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Of many tokens at once: length of the longest context that is known, PPM's share, and what is left to the model.

        Args:
            before: [N, LONGEST] tokens before each, the last one last; BREAK where there is none. token: [N].
        """
        count = len(token)
        length, share, left = np.zeros(count, np.int64), np.zeros(count), np.ones(count)
        at, hashed = np.arange(count), np.zeros(count, np.uint64)
        for number, (keys, counts) in enumerate(self.orders, 1):
            column = before[at, -number]
            at, hashed, column = at[column != BREAK], hashed[column != BREAK], column[column != BREAK]
            hashed = _grow(hashed, column.astype(np.uint64), number)
            low = hashed << _SHIFT
            first, end = np.searchsorted(keys, low), np.searchsorted(keys, low | _MASK, side="right")
            some = end > first
            at, first, end = at[some], first[some], end[some]
            hashed, low = hashed[some], low[some]
            if not len(at):
                break
            sums, kinds = self._sums[number - 1], end - first
            total = sums[end] - sums[first] + kinds
            wanted = low | token[at].astype(np.uint64)
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            hits = np.where(keys[place] == wanted, counts[place], 0)
            share[at] = (hits + kinds * share[at]) / total
            left[at] *= kinds / total
            length[at] = number
        return length, share, left

    @cached_property
    def _sums(self) -> list[NDArray[np.int64]]:
        """Of each order: the sum of the counts before each key."""
        return [np.concatenate(([0], np.cumsum(counts, dtype=np.int64))) for _, counts in self.orders]


def _grow(hashed: Keys, token: Keys, length: int) -> Keys:
    """The hash of a context that has one token more in front: 44 bits."""
    if length <= 2:
        return hashed | token << np.uint64(BITS * (length - 1))
    mixed = (hashed + (token + _ONE) * _SPREAD) * _FACTOR
    mixed ^= mixed >> np.uint64(29)
    return (mixed * _FACTOR) >> _SHIFT


def _grow_one(hashed: int, token: int, length: int) -> int:
    """The same of one context."""
    if length <= 2:
        return hashed | token << BITS * (length - 1)
    mixed = (hashed + (token + 1) * int(_SPREAD)) * int(_FACTOR) & _ALL
    mixed ^= mixed >> 29
    return (mixed * int(_FACTOR) & _ALL) >> BITS
