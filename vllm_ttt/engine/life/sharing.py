"""Several servers, one state dir: a session is in one of them at a time (storage/leases.py).

Before a request or a call comes to the engine, the front end asks it to `claim` the session. What the engine then has it keeps
until nobody has used the session for some seconds and it is not in memory, or another server wants it and it is idle: then it
is saved, put away and released. What it has lost it drops, and whoever waits for it is told to ask again.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.storage import leases
from vllm_ttt.engine.storage.failures import Locked, Moved, StoreError
from vllm_ttt.engine.storage.store import Change, Store
from vllm_ttt.errors import RequestError
from vllm_ttt.types import SessionKey

if TYPE_CHECKING:
    from vllm_ttt.engine.life.tiers import Tiers

#: Seconds from a claim until its request must have come, where another server wants the session, and where none does.
GRACE, LINGER = 1.0, 5.0
#: Seconds between two looks for sessions to be released, and between two counts of those of all servers.
_LOOK, _COUNT = 1.0, 10.0


class Sharing:
    def __init__(self, tiers: Tiers, store: Store):
        assert store.watch is not None
        self.tiers, self.store, self.watch, self.leases = tiers, store, store.watch, store.watch.leases
        #: sessions that another server may have, until nothing is under way for them here
        self.lost: set[SessionKey] = set()
        #: claims that are to be answered, and epochs whose release could not be written
        self.asked, self.unreleased = set[Future](), set[int]()
        self.next_look = self.next_count = 0.0
        self.watch.due = lambda: self.due
        tiers.expiry.have = self._have

    def claim(self, key: SessionKey) -> Future:
        """Resolves to whether this server has the session now. If not, it has asked for it. Fails with RequestError."""
        if self.tiers.closing:
            raise RequestError("the server is shutting down; send the request to another, or again later", 503)
        answer: Future = Future()
        if key in self.lost or not self.leases.alive():
            answer.set_result(False)
        elif (lease := self.leases.held.get(key)) is not None:
            lease.asked = time.monotonic()
            answer.set_result(True)
        elif self.store.contention.locked:
            answer.set_exception(Locked())
        else:
            session, member = self.leases.session(key), self.watch.member
            self.asked.add(answer)
            claimed = self.store.write(lambda db: Change(leases.claim(db, member.id, session)), waits=False)
            claimed.add_done_callback(lambda done: self._claimed(key, done, answer))
        return answer

    def _claimed(self, key: SessionKey, done: Future, answer: Future) -> None:
        held, error = False, done.exception()
        if error is None and (epoch := done.result()) is not None and self.leases.granted(key, epoch):
            held = True
            self.unreleased.discard(epoch)
        if answer not in self.asked:  # it was told meanwhile that the database is locked
            return
        self.asked.discard(answer)
        if error is None or isinstance(error, Moved):
            answer.set_result(held)
        else:
            answer.set_exception(error)

    @property
    def due(self) -> bool:
        """Whether `step` has something to do."""
        unused = self.unreleased or len(self.leases.held) + len(self.lost) > len(self.tiers.ledger.sessions)
        told = self.watch.kept or self.watch.wanted or self.leases.refused
        return bool(told or (unused and time.monotonic() >= self.next_look))

    def step(self) -> None:
        while self.leases.refused:
            key, epoch = self.leases.refused.popleft()
            if (lease := self.leases.held.get(key)) is not None and lease.epoch == epoch:
                self._lose(key)
        while self.watch.kept:
            event = self.watch.kept.popleft()
            for key in self.leases.went_on(event.last, event.sessions):
                self._lose(key)
        while self.watch.wanted:
            self._hand_over(set(self.watch.wanted.popleft()))
        if not self.leases.alive():
            self._stop()
        if self.store.contention.locked:  # a claim may have its turn behind many writes, each of which waits
            asked, self.asked = self.asked, set()
            for answer in asked:
                answer.set_exception(Locked())
        if (now := time.monotonic()) >= self.next_look:
            self.next_look = now + _LOOK
            known = self.tiers.ledger.sessions
            self._release([k for k, lease in self.leases.held.items() if k not in known and now - lease.asked >= LINGER])
        if now >= self.next_count:
            unrecorded = Counter(
                s.key.tenant for s in self.tiers.ledger.sessions.values() if s.claimed and s.life.recorded_at < 0
            )
            with contextlib.suppress(StoreError):  # as it was counted before
                self.tiers.ledger.quotas.recount(unrecorded)
            self.next_count = time.monotonic() + _COUNT  # it may have waited

    def _stop(self) -> None:
        """This server may not answer for its sessions any more: their requests are refused."""
        for session in [s for s in self.tiers.ledger.sessions.values() if s.requests]:
            self.tiers.give_up(session, Moved("this server may have been taken for dead; ask again"))

    def drops(self, session: Session) -> bool:
        """Whether the session is lost. It is dropped as soon as nothing is under way for it."""
        if session.key not in self.lost:
            return False
        if self.tiers.ledger.sessions.get(session.key) is not session:  # what was under way has ended it
            self.lost.discard(session.key)
        elif session.idle:
            self.lost.discard(session.key)
            self.tiers.put_away(session)
        return True

    def _lose(self, key: SessionKey) -> None:
        self.leases.held.pop(key, None)
        if (session := self.tiers.ledger.sessions.get(key)) is not None:
            self.lost.add(key)
            self.tiers.give_up(session, Moved())
            self.drops(session)

    def _hand_over(self, sessions: set[str]) -> None:
        """Release what is idle and saved, and save what is idle; another look follows in a second."""
        now, released = time.monotonic(), []
        for key, lease in self.leases.held.items():
            if lease.session not in sessions or now - lease.asked < GRACE:
                continue
            session = self.tiers.ledger.sessions.get(key)
            if session is None or self._put_away(session):
                released.append(key)
        self._release(released)

    def _put_away(self, session: Session) -> bool:
        """Whether the session, if it is here, is not needed here any more."""
        saves = self.tiers.saves
        assert saves is not None
        if not session.idle:
            return False
        if session.unsaved:
            self.tiers.save(session)
            return False
        saves.record(session)
        self.tiers.put_away(session)
        return True

    def _release(self, keys: list[SessionKey]) -> None:
        """And what could not be released before, however often: no other server can have that while this one lives."""
        epochs, self.unreleased = self.unreleased | {self.leases.held.pop(key).epoch for key in keys}, set()
        if not epochs:
            return

        def done(written: Future) -> None:
            self.leases.leaving -= epochs
            if written.exception() is not None:
                self.unreleased |= epochs

        self.leases.leaving |= epochs
        self.store.write(lambda db: _released(leases.release(db, epochs)), frees=True, waits=False).add_done_callback(done)

    def _have(self, key: SessionKey, do: Callable[[], None]) -> None:
        self.claim(key).add_done_callback(lambda done: do() if done.exception() is None and done.result() else None)


def _released(_: Any) -> Change:
    return Change()
