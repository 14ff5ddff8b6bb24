"""Whose turn it is to learn: sessions that a held request waits for, or all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Shares:
    """Half of learning for each side, trials by the guard included: nobody waits for the work of all others, and whoever
    manages a session is not kept waiting by those who chat."""

    def __init__(self, most: int):
        """``most``: tokens that one side may be ahead of the other; what it could not use beyond that is forgotten."""
        self.most = most
        #: sessions that a held request waits for
        self.awaited: frozenset[int] = frozenset()
        #: how many more tokens they have had lately than all others
        self.ahead = 0

    def first(self, waiting: Callable[[], Iterable[int]]) -> frozenset[int]:
        """The side that comes first; empty where it has nobody. ``waiting``: all sessions that have something to be done."""
        return self.awaited if self.ahead <= 0 or not self.awaited else frozenset(waiting()) - self.awaited

    def had(self, key: int | None, tokens: int) -> None:
        """A session has had so many; None: the base model."""
        most = self.most if self.awaited else 0
        self.ahead = max(-most, min(self.ahead + (tokens if key in self.awaited else -tokens), most))
