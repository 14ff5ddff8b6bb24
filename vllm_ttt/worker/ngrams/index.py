"""What followed each context of a stream, sorted: all lengths of a context are looked up by one binary search.

A context and a token that followed it are one number of 64 bits: the context's length above, then its hash, the token below.
Contexts of one and two tokens are their own hash; of longer ones two might share 40 bits, and then share what followed them.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_ttt.worker.ngrams.stream import BREAK, Tokens, shown

#: Bits of a token's id, and of a context's hash.
BITS, HASH_BITS = 20, 40
_ALL = 2**64 - 1
_MASK, _SHIFT, _ONE = np.uint64(2**BITS - 1), np.uint64(BITS), np.uint64(1)
_LENGTH = np.uint64(BITS + HASH_BITS)
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
    """Of one stream; never changes.

    Attributes:
        keys: ascending; those of one context are neighbours. counts: how often each occurs.
    """

    def __init__(self, stream: Tokens, orders: int):
        self.orders = orders
        self.keys, self.counts = _counted(stream, np.flatnonzero(stream >= 0), orders)

    def moved(self, stream: Tokens, added: NDArray[np.int64], removed: NDArray[np.int64]) -> Index:
        """That of a stream that has some tokens more, and some fewer: the same arrays as if it were made anew, in less time.

        Args:
            stream: with all of them. added, removed: their places in it.
        """
        moved = copy(self)
        more, counts = _counted(stream, added, self.orders)
        at = self.keys.searchsorted(more)
        there = self.keys.take(at, mode="clip") == more if len(self.keys) else np.zeros(len(more), np.bool_)
        moved.counts = self.counts.copy()
        moved.counts[at[there]] += counts[there]
        moved.keys = np.insert(self.keys, at[~there], more[~there])
        moved.counts = np.insert(moved.counts, at[~there], counts[~there])
        if len(removed):
            fewer, counts = _counted(stream, removed, self.orders)
            moved.counts[moved.keys.searchsorted(fewer)] -= counts
            left = moved.counts > 0
            moved.keys, moved.counts = moved.keys[left], moved.counts[left]
        return moved

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.counts.nbytes

    def followers(self, before: Tokens) -> Followers:
        """What comes after the tokens ``before``, of which the last ones count."""
        needles, hashed = [], 0
        for length, token in enumerate(before[: -self.orders - 1 : -1].tolist(), 1):
            hashed = _grow_one(hashed, token, length)
            low = (length << HASH_BITS | hashed) << BITS
            needles += (low, low + (1 << BITS))
        places = self.keys.searchsorted(np.array(needles, np.uint64)).tolist()
        found = []
        for first, end in zip(places[::2], places[1::2], strict=True):
            if first == end:
                break
            found.append(slice(first, end))
        while found:
            tokens = self.keys[found[0]] & _MASK  # whatever followed a longer context followed the shortest
            seen = np.concatenate([self.keys[part] for part in found]) & _MASK
            counts = np.concatenate([self.counts[part] for part in found])
            at = tokens.searchsorted(seen)
            strange = tokens.take(at, mode="clip") != seen
            if strange.any():  # two contexts that share a hash
                kinds = [part.stop - part.start for part in found]
                found = found[: int(np.repeat(np.arange(len(found)), kinds)[strange][0])]
                continue
            return self._shared(found, tokens, at, counts)
        return _NONE

    def _shared(self, found: list[slice], tokens: Keys, at: NDArray[np.int64], counts: NDArray[np.int32]) -> Followers:
        """PPM's shares of ``tokens``. ``at``, ``counts``: of the followers of each context, the shortest first, their places in
        ``tokens`` and how often each was seen."""
        kinds = [part.stop - part.start for part in found]
        totals = np.add.reduceat(counts, np.cumsum([0, *kinds[:-1]])).tolist()
        factors, left = [0.0] * len(found), 1.0
        for number in range(len(found) - 1, -1, -1):
            whole = totals[number] + kinds[number]
            factors[number] = left / whole
            left *= kinds[number] / whole
        shares = np.asarray(np.bincount(at, np.repeat(factors, kinds) * counts, len(tokens)), np.float64)
        return Followers(len(found), tokens.astype(np.int64), shares, left)

    def parts(self, before: Tokens, token: Tokens) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Of many tokens at once: length of the longest context that is known, PPM's share, and what is left to the model.

        Args:
            before: [N, LONGEST] tokens before each, the last one last; BREAK where there is none. token: [N].
        """
        count, sums = len(token), np.concatenate(([0], np.cumsum(self.counts, dtype=np.int64)))
        length, share, left = np.zeros(count, np.int64), np.zeros(count), np.ones(count)
        at, hashed = np.arange(count), np.zeros(count, np.uint64)
        for number in range(1, self.orders + 1):
            column = before[at, -number]
            at, hashed, column = at[column != BREAK], hashed[column != BREAK], column[column != BREAK]
            hashed = _grow(hashed, column.astype(np.uint64), number)
            low = _low(hashed, number)
            first, end = self.keys.searchsorted(low), self.keys.searchsorted(low + (_ONE << _SHIFT))
            some = end > first
            at, first, end, hashed, low = at[some], first[some], end[some], hashed[some], low[some]
            if not len(at):
                break
            kinds = end - first
            total = sums[end] - sums[first] + kinds
            wanted = low | token[at].astype(np.uint64)
            place = np.minimum(self.keys.searchsorted(wanted), len(self.keys) - 1)
            hits = np.where(self.keys[place] == wanted, self.counts[place], 0)
            share[at] = (hits + kinds * share[at]) / total
            left[at] *= kinds / total
            length[at] = number
        return length, share, left


def _counted(stream: Tokens, at: NDArray[np.int64], orders: int) -> tuple[Keys, NDArray[np.int32]]:
    """The keys of the tokens at some places of a stream, ascending, and how often each occurs."""
    tokens = shown(stream)
    known, hashed = tokens.astype(np.uint64), np.zeros(len(at), np.uint64)
    parts = list[tuple[Keys, NDArray[np.int32]]]()
    for length in range(1, orders + 1):
        at, hashed = at[at >= length], hashed[at >= length]
        whole = tokens[at - length] != BREAK
        at, hashed = at[whole], hashed[whole]
        hashed = _grow(hashed, known[at - length], length)
        keys = np.sort(_low(hashed, length) | known[at])
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, np.int64)
        parts.append((keys[first], np.diff(first, append=len(keys)).astype(np.int32)))
    keys, counts = (np.concatenate(x) for x in zip(*parts, strict=True))
    return keys, counts


def _low(hashed: Keys, length: int) -> Keys:
    """The key of contexts of one length, before any token."""
    return np.uint64(length) << _LENGTH | hashed << _SHIFT


def _grow(hashed: Keys, token: Keys, length: int) -> Keys:
    """The hash of a context that has one token more in front."""
    if length <= 2:
        return hashed | token << np.uint64(BITS * (length - 1))
    mixed = (hashed + (token + _ONE) * _SPREAD) * _FACTOR
    mixed ^= mixed >> np.uint64(29)
    return (mixed * _FACTOR) >> np.uint64(64 - HASH_BITS)


def _grow_one(hashed: int, token: int, length: int) -> int:
    """The same of one context."""
    if length <= 2:
        return hashed | token << BITS * (length - 1)
    mixed = (hashed + (token + 1) * int(_SPREAD)) * int(_FACTOR) & _ALL
    mixed ^= mixed >> 29
    return (mixed * int(_FACTOR) & _ALL) >> 64 - HASH_BITS
