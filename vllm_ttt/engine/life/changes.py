"""What an owner asks for: delete, reset, roll back, fork. Each is one operation, and one transaction of the state dir.

It is written first, and what is in memory follows: what is answered is on disk, and what cannot be written has not happened. In
between the session is changing: its requests wait, and meet what it is afterwards.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.operations import Steps
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.storage.records import Row
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import RequestError
from vllm_ttt.types import SessionKey

if TYPE_CHECKING:
    from vllm_ttt.engine.life.tiers import Tiers

#: Calls a method of the worker and waits for it.
Worker = Callable[..., Any]


class Changes:
    """Each resolves to the session as it is then, or fails with RequestError: 409, a request of it is in the engine."""

    def __init__(self, tiers: Tiers):
        self.tiers, self.ledger, self.store = tiers, tiers.ledger, tiers.store

    def remove(self, session: Session) -> Future:
        """Forget the session everywhere."""
        return self.tiers.run(session, self._remove(session))

    def reset(self, session: Session, keep: Callable[[], dict[str, Any]]) -> Future:
        """Make a fresh session of it, but for the state that ``keep`` returns when its turn comes."""
        return self.tiers.run(session, self._reset(session, keep))

    def go_back(self, session: Session, version: int, worker: Worker) -> Future:
        """Make an earlier version what the session is, on disk or in memory; later ones are no more."""
        return self.tiers.run(session, self._go_back(session, version, worker))

    def fork(self, source: Session, key: SessionKey, worker: Worker) -> Future:
        """Make a session ``key``, which there is not yet, of what ``source`` is. Raises RequestError where none may be made."""
        target, done = self.ledger.open(key), Future()
        self.tiers.move(target, State.CHANGING)
        self.tiers.run(target, _until(done))  # whatever is asked of it meanwhile comes after
        copied = self.tiers.run(source, self._copy(source, target, worker))
        copied.add_done_callback(lambda _: done.set_result(None))
        return copied

    def _remove(self, session: Session) -> Steps:
        yield from self._write(session, lambda store: store.replace(session.uid))
        if session.requests:  # it was named again meanwhile: they meet another one
            session.uid, session.created = secrets.token_hex(16), time.time()
            self.tiers.become(session, {}, None)
            session.life.begin_again()
        else:
            self.tiers.forget(session, gone=True)
        return session

    def _reset(self, session: Session, keep: Callable[[], dict[str, Any]]) -> Steps:
        _need_idle(session)
        self.ledger.claim(session)  # it gets a row
        uid, state = secrets.token_hex(16), keep()
        row = Row(uid, session.key, session.created, time.time(), state)
        yield from self._write(session, lambda store: store.replace(session.uid, row))
        session.uid = uid
        self.tiers.become(session, state, None)
        return session

    def _go_back(self, session: Session, version: int, worker: Worker) -> Steps:
        if session.open:
            raise RequestError(f"session {session.key.name!r} is still learning what it was sent; try again in a moment", 409)
        _need_idle(session)
        self.ledger.claim(session)
        write: Callable[[Store], Future] = lambda store: store.back_to(session.row(), version, session.standing())  # noqa: E731
        found = yield from self._write(session, write)
        if found is not None:
            self.tiers.become(session, {**found.state, **session.standing()}, found)
            return session
        if not session.life.in_memory:
            self._unchanged(session)
            yield from self.tiers.bring_in(session)
        try:  # nothing has run since it was idle
            kept = worker("ttt_roll_back", session.adapter, version)
            if kept is not None:
                listed = ", ".join(map(str, self.tiers.versions(session, kept))) or "none"
                raise RequestError(f"session {session.key.name!r} has no version {version}; kept are: {listed}", 409, "version")
            session.back_to(version)
            self.tiers.changes(session)
        finally:
            self._unchanged(session)
        if self.tiers.saves is not None:
            yield from self.tiers.saves.asked(session)
        return session

    def _copy(self, source: Session, target: Session, worker: Worker) -> Steps:
        try:
            _need_idle(source)
            for session in (source, target):
                yield from self.tiers.bring_in(session)
            if source.open or source.requests:
                raise RequestError(f"session {source.key.name!r} has been sent something meanwhile; try again", 409)
            if worker("ttt_copy", source.adapter, target.adapter) != source.version:
                raise RequestError(f"session {source.key.name!r} is going back to an earlier version; try again", 409)
        except BaseException:
            if target.requests:
                self.tiers.become(target, {}, None)
            else:
                self.tiers.forget(target, gone=True)
            raise
        target.copy(source)
        self.tiers.changes(target)
        self._unchanged(target)
        return target

    def _write(self, session: Session, write: Callable[[Store], Future]) -> Steps:
        """The session is changing from here on; returns what was written. Where it cannot be, the session is as it was."""
        _need_idle(session)
        self.tiers.move(session, State.CHANGING_IN_MEMORY if session.life.in_memory else State.CHANGING)
        if self.store is None:
            return None
        try:
            return (yield write(self.store))
        except BaseException as error:
            self._unchanged(session)
            if not isinstance(error, RequestError):
                raise
            message = f"session {session.key.name!r} stays as it was: the state dir cannot be written: {error}"
            raise RequestError(message, 507) from None

    def _unchanged(self, session: Session) -> None:
        """It is not changing any more, and where it was before."""
        if session.life.state is State.CHANGING_IN_MEMORY:
            self.tiers.move(session, State.IN_MEMORY)
        elif session.life.state is State.CHANGING:
            self.tiers.move(session, session.home)


def _need_idle(session: Session) -> None:
    if session.requests:
        count, name = len(session.requests), session.key.name
        raise RequestError(f"session {name!r} has {count} requests in the engine; wait for them, or abort them", 409)


def _until(done: Future) -> Steps:
    yield done
