"""What a session may have learned: no text that repeats itself, and not more than so much an hour."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

HOUR = 3600.0


def repetitive(ids: Sequence[int], start: int, chunk: int, min_rows: int, min_ratio: float) -> list[tuple[int, int]]:
    """Ranges (first, end) of pairs of a prompt whose tokens zlib makes smaller than ``min_ratio`` of their 4 bytes each.

    Args:
        ids: the prompt. start: the first pair to look at.
        chunk: pairs that are looked at together; fewer than a quarter of that, or than ``min_rows``, at its end never are.
        min_ratio: 0 finds none.
    """
    if min_ratio == 0:
        return []
    tokens, found = np.asarray(ids[1:], "<u4"), []
    for first in range(start, len(tokens), chunk):
        part = tokens[first : first + chunk]
        if len(part) >= max(chunk / 4, min_rows) and len(zlib.compress(part.tobytes())) < min_ratio * part.nbytes:
            found.append((first, first + len(part)))
    return found


class Allowance:
    """Tokens that one session, or one key, may still have learned; it fills up within an hour."""

    __slots__ = ("at", "tokens")

    def __init__(self) -> None:
        self.tokens: float | None = None  # not used yet: full
        self.at = 0.0

    def take(self, tokens: int, hourly: int, now: float | None = None) -> bool:
        """Whether ``tokens`` more may be learned, which are taken off then; ``hourly`` 0: always.

        A request larger than a whole hour's allowance is never learned.
        """
        if hourly == 0:
            return True
        now = time.time() if now is None else now
        full, since = float(hourly), max(0.0, now - self.at)  # a clock that was set back gives nothing
        self.tokens = full if self.tokens is None else min(full, self.tokens + since * full / HOUR)
        self.at = now
        if tokens > self.tokens:
            return False
        self.tokens -= tokens
        return True

    def to_state(self) -> list[Any]:
        """What is kept with the session, for JSON; seconds since 1970, so that a restart gives nothing back."""
        return [self.tokens, self.at]

    @classmethod
    def from_state(cls, state: list[Any]) -> Allowance:
        allowance = cls()
        allowance.tokens, allowance.at = state
        return allowance

    def spend(self, tokens: int) -> None:
        """Take off what could not be known before: generated tokens."""
        if self.tokens is not None:
            self.tokens -= tokens
