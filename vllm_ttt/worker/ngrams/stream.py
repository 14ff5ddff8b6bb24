"""What a session's cache remembers, as one array of int32: learned tokens in their order, and where the text was cut.

BREAK stands between texts that do not go on from each other, and for tokens in a row that are not learned. A token that is
only context (history, the first of a prompt) is there as ``-token - 2``: it can come before another, and was not learned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

BREAK = -1
#: Tokens of the longest context that any configuration remembers.
LONGEST = 8
EMPTY: Tokens = np.zeros(0, np.int32)


def shown(stream: Tokens) -> Tokens:
    """The tokens as they were sent; BREAK stays."""
    return np.where(stream < BREAK, -stream - 2, stream)


def count(stream: Tokens) -> int:
    """Learned tokens."""
    return int(np.count_nonzero(stream >= 0))


def extend(stream: Tokens, before: Tokens, learned: Tokens, limit: int) -> Tokens:
    """``stream`` with the learned tokens, which follow on ``before``: at most LONGEST tokens; and its last ``limit`` alone."""
    return trim(join(stream, before, learned), limit)


def join(stream: Tokens, before: Tokens, learned: Tokens) -> Tokens:
    """As `extend`, without a limit. One BREAK stands for all tokens in a row that are not learned, however many they are."""
    context, parts = _uncut(before), [learned]
    if not len(stream) or not np.array_equal(_uncut(stream[-LONGEST:]), context):
        parts = [np.array([BREAK], np.int32), -context - 2, learned]  # else it goes on
    more = np.concatenate(parts)
    cut = np.concatenate(([len(stream) > 0 and stream[-1] == BREAK], more == BREAK))
    return np.concatenate((stream, more[~(cut[1:] & cut[:-1])])).astype(np.int32)


def _uncut(tokens: Tokens) -> Tokens:
    """What of some tokens is context of the next one: those after the last cut."""
    cut = np.flatnonzero(tokens == BREAK)
    return shown(tokens[cut[-1] + 1 :] if len(cut) else tokens)


def trim(stream: Tokens, limit: int) -> Tokens:
    """The last ``limit`` learned tokens, and the context of the first of them."""
    learned = np.flatnonzero(stream >= 0)
    if len(learned) <= limit:
        return stream
    first = learned[-limit] if limit else len(stream)
    context = _uncut(stream[max(0, first - LONGEST) : first])
    return np.concatenate((np.array([BREAK], np.int32), -context - 2, stream[first:])).astype(np.int32)


def valid(stream: Tokens, vocabulary: int) -> bool:
    """Whether it could be a stream of a model with so many tokens."""
    tokens = shown(stream)
    return bool(((tokens >= BREAK) & (tokens < vocabulary)).all())
