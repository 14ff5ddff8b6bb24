"""How many sessions the server has room for, and how many of them one API key may have."""

from __future__ import annotations

from collections import Counter

from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import RequestError


class Quotas:
    def __init__(self, places: int, per_key: int | None = None, share: float = 1.0, store: Store | None = None):
        """
        Args:
            places: sessions that there is room for: in the state dir, or in memory where there is none.
            per_key: sessions of one key; None: as many as fit.
            share: of what a key has and what is free, taken together, what it may have at most.
        """
        self.places, self.per_key, self.share, self.store = places, per_key, share, store
        #: sessions of all keys
        self.total = store.count() if store is not None else 0
        self._counts: Counter[str] = Counter()

    def of(self, tenant: str) -> int:
        """Sessions of one key, wherever they are."""
        if tenant not in self._counts and self.store is not None:
            self._counts[tenant] = self.store.count(tenant)
        return self._counts[tenant]

    def add(self, tenant: str, sessions: int = 1) -> None:
        """The key has a session more, or with -1 one less."""
        self._counts[tenant] = self.of(tenant) + sessions
        self.total += sessions

    def recount(self, unrecorded: Counter[str]) -> None:
        """Other servers make and remove sessions too: count anew. ``unrecorded``: what the state dir does not know yet."""
        assert self.store is not None
        counts = {tenant: self.store.count(tenant) + unrecorded[tenant] for tenant in self._counts}
        self.total, self._counts = self.store.count() + unrecorded.total(), Counter(counts)

    def check(self, tenant: str) -> None:
        """Raise RequestError (429) where the key may not have another session."""
        mine, free = self.of(tenant), max(0, self.places - self.total)
        if self.store is None and not free:
            raise RequestError(f"this server keeps at most {self.places} sessions (sessions.host_gib); delete one first", 429)
        if self.store is not None and self.store.full:
            raise RequestError(f"no room for another session: {self.store.full}", 429)
        if self.per_key is not None and mine >= self.per_key:
            raise RequestError(f"a key has at most {self.per_key} sessions (sessions.per_key); delete one first", 429)
        # Each key that comes finds some of what is left; all are never taken, however many there are.
        if mine and self.share < 1 and mine + 1 > self.share * (mine + free):
            raise RequestError(
                f"this key has {mine} sessions and there is room for {free} more, which others may need: a key may have "
                f"{100 * self.share:g} % of both together (sessions.key_share); delete one first",
                429,
            )
