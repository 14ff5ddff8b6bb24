"""What a session's cache remembers, as one array of int32: learned tokens in their order, and where the text was cut.

BREAK stands between texts that do not go on from each other. A token that is only context (history, the first of a prompt) is
there as ``-token - 2``: it can come before another, and was not learned itself.
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
    """As `extend`, without a limit."""
    tail = shown(stream[-LONGEST:])
    if len(before) == LONGEST and np.array_equal(tail, before):
        parts = stream, learned  # it goes on
    else:
        parts = stream, np.array([BREAK], np.int32), -before - 2, learned
    return np.concatenate(parts).astype(np.int32)


def trim(stream: Tokens, limit: int) -> Tokens:
    """The last ``limit`` learned tokens, and the context of the first of them."""
    learned = np.flatnonzero(stream >= 0)
    if len(learned) <= limit:
        return stream
    first = learned[-limit] if limit else len(stream)
    context = stream[max(0, first - LONGEST) : first]
    cut = np.flatnonzero(context == BREAK)
    context = shown(context[cut[-1] + 1 :] if len(cut) else context)
    return np.concatenate((np.array([BREAK], np.int32), -context - 2, stream[first:])).astype(np.int32)


def valid(stream: Tokens, vocabulary: int) -> bool:
    """Whether it could be a stream of a model with so many tokens."""
    tokens = shown(stream)
    return bool(((tokens >= BREAK) & (tokens < vocabulary)).all())
