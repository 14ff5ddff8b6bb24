"""Removes sessions that nobody has used for ``sessions.ttl``, and nobody else where the clock is set."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.storage import records
from vllm_ttt.engine.storage.store import Change, Store, Write
from vllm_ttt.log import logger_of
from vllm_ttt.types import SessionKey

logger = logger_of(__name__)

#: Seconds between two looks.
SWEEP = 60.0
#: Sessions on disk that go at once, and seconds to the next look where there are more: no step is held up by many.
_AT_ONCE, _SOON = 32, 1.0
#: Seconds by which the clock may differ from the time that has passed before somebody must have set it.
_JUMP = 5.0


class Expiry:
    def __init__(self, ledger: Ledger, store: Store | None, ttl: float, remove: Callable[[Session], Any]):
        """``ttl`` in seconds, or infinite. ``remove`` forgets a session that nobody needs in memory."""
        self.ledger, self.store, self.ttl, self.remove = ledger, store, ttl, remove
        #: calls what is to be done with a session that is on disk, if this server may have it
        self.have: Callable[[SessionKey, Callable[[], None]], None] = lambda key, do: do()
        self.next_look = time.monotonic()
        #: the clock less the time that has passed: it changes where somebody sets the clock
        self.skew = time.time() - time.monotonic()
        #: seconds by which the clock was set ahead (0: back) and which the state dir does not know of yet; None: it knows
        self.unwritten: float | None = None
        #: resolves to sessions of the state dir that nobody uses
        self.found: Future | None = None

    @property
    def due(self) -> bool:
        return self.found is not None or time.monotonic() >= self.next_look

    def step(self) -> None:
        """Look, if it is time."""
        if self.found is not None and self.found.done():
            found, self.found = self.found, None
            if found.exception() is None:
                self.unwritten = None
                self._expire(found.result())
        if self.found is not None or not self.due:
            return
        self.next_look = time.monotonic() + min(SWEEP, self.ttl)
        self._follow_clock()
        oldest = time.time() - self.ttl
        for session in [s for s in self.ledger.sessions.values() if s.last_used < oldest and s.idle]:
            self.remove(session)
        if self.store is not None and (self.unwritten is not None or self.ttl < math.inf):
            # The clocks of servers that share the dir are not set together: its times follow none of them.
            self.found = self.store.write(self._look(self.unwritten if self.store.leases is None else None, oldest))

    @staticmethod
    def _look(ahead: float | None, oldest: float) -> Write:
        """In one transaction: nobody is found by the new clock where the times of the state dir could not follow it."""

        def look(db: sqlite3.Connection) -> Change:
            if ahead is not None:
                records.follow_clock(db, ahead, time.time())
            return Change(records.unused_since(db, oldest, _AT_ONCE))

        return look

    def _follow_clock(self) -> None:
        """Where the clock was set, sessions stay as old as they are: a jump of years must not remove them all."""
        now = time.time()
        jump, self.skew = now - time.monotonic() - self.skew, now - time.monotonic()
        if abs(jump) < _JUMP:
            return
        logger.warning("vllm-ttt: the clock was set by %+.0f s; the times at which sessions were last used follow it", jump)
        ahead = max(jump, 0.0)  # after a step back, what lies in the future was used just now
        for session in self.ledger.sessions.values():
            session.last_used = min(session.last_used + ahead, now)
        self.unwritten = (self.unwritten or 0.0) + ahead

    def _expire(self, keys: list[SessionKey]) -> None:
        if len(keys) == _AT_ONCE:
            self.next_look = min(self.next_look, time.monotonic() + _SOON)
        for key in keys:
            if key not in self.ledger.sessions:
                self.have(key, partial(self._expire_one, key))

    def _expire_one(self, key: SessionKey) -> None:
        if key in self.ledger.sessions or (session := self.ledger.peek(key)) is None:
            return
        if session.last_used < time.time() - self.ttl and (session := self.ledger.find(key)) is not None:
            self.remove(session)  # else it was used, and put away, since it was found
