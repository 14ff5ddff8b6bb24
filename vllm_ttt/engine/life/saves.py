"""Which sessions are written to the state dir, and when: every ``autosave`` seconds, when asked, for room, at the end.

A save is an order to the worker, which takes a snapshot and writes the file; then the version is recorded. Only then it exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from vllm_ttt.engine.counts import EngineCounts
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.life.operations import Operations, Steps
from vllm_ttt.engine.life.orders import Orders
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.storage.failures import Moved, StoreError, answer_of, store_error
from vllm_ttt.engine.storage.records import Row, Version
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import RequestError
from vllm_ttt.log import logger_of
from vllm_ttt.types import FileOrder, FileReport, SessionKey

logger = logger_of(__name__)

#: Saves that are under way at once: each holds a copy of its session.
AT_ONCE = 4
#: Snapshots of one save: the guard may take a session back while one is written.
_TRIES = 8


class Saves:
    def __init__(
        self, ledger: Ledger, store: Store, autosave: float, orders: Orders, operations: Operations, counts: EngineCounts
    ):
        self.ledger, self.store, self.autosave = ledger, store, autosave
        self.orders, self.operations, self.counts = orders, operations, counts
        #: sessions that have changed since the last round; who changed first comes first
        self.changed: dict[SessionKey, Session] = {}
        #: sessions to be saved, in order, and the operation that waits for its turn, where there is one
        self.due: dict[SessionKey, tuple[Session, Future | None]] = {}
        #: sessions whose last save failed, until the next round
        self.failing: set[SessionKey] = set()
        self.under_way = 0
        self.next_round = time.monotonic() + autosave
        self.closing = False

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping although nobody is served."""
        if self.under_way or any(turn is not None or not session.life.queue for session, turn in self.due.values()):
            return True
        if self.closing:  # one in use is saved when it is idle, and its requests see to it that the engine steps until then
            return any(session.idle for session in self.changed.values())
        return self._round_is_due

    @property
    def _round_is_due(self) -> bool:
        return bool(self.changed or self.store.full) and time.monotonic() >= self.next_round

    def changes(self, session: Session) -> None:
        """The session was used, or has learned."""
        session.life.touch()
        self.changed[session.key] = session

    def asked(self, session: Session) -> Steps:
        """An operation: save what the session is now. Returns its `Version` on disk, None for one that learned nothing."""
        if not session.unsaved and session.life.unrecorded and not session.blank:
            now = session.life.generation
            try:
                yield self.store.record(session.row())
            except StoreError as error:
                raise answer_of(error, f"session {session.key.name!r} could not be saved: {error}") from None
            session.life.recorded_at = now
        if not session.unsaved:  # nor has the guard returned it meanwhile
            return session.saved
        turn: Future = Future()
        self.due[session.key] = session, turn
        yield turn
        return (yield from self._save(session))

    def earlier(self, session: Session, version: int) -> Steps:
        """Part of an operation: have a version written that the worker keeps, and make it the newest of an idle session.

        Returns it. Raises StoreError, or RequestError (409) where the worker has given that version up meanwhile: the session
        is, in memory and on disk, what it was.
        """
        turn: Future = Future()
        self.due[session.key] = session, turn
        yield turn
        written = False
        try:
            file = self.store.folder.new_file(session.uid)
            report = yield from self._file(session, file, version=version)
            state = {**session.state_at(version), **session.standing()}
            known, good = yield from self._good(session, report)
            newest = _version(report, file, state, known)
            yield from self._put(replace(session.row(newest), state=state, good=good))
            written = True
        except (StoreError, OSError) as error:
            raise self._counted(store_error(error)) from None
        finally:
            self.under_way -= 1
            if not written and session.unsaved:  # what it is, and stays, may have been due: its turn went to this
                self.due.setdefault(session.key, (session, None))
        self.counts.add("saves_total", 1, "done")
        return newest

    def record(self, session: Session) -> None:
        """Bring what the state dir says of the session, its delta apart, up to date."""
        if session.life.unrecorded and not session.blank:
            self.store.note(session.row(session.saved))
            session.life.recorded_at = session.life.generation

    def forget(self, session: Session) -> None:
        """The session leaves memory, or is no more."""
        self.changed.pop(session.key, None)
        self.due.pop(session.key, None)
        self.failing.discard(session.key)

    def close(self) -> None:
        """The server is about to end: save what has changed at once; what is in use, again when it is idle."""
        if not self.closing:
            self.closing = True
            self._round()
            logger.info("vllm-ttt: saving %d sessions before the end", sum(s.unsaved for s, _ in self.due.values()))

    def step(self) -> None:
        """Begin what is due."""
        if self._round_is_due or (self.closing and self.changed):
            self._round(idle_only=self.closing)
        for session, turn in list(self.due.values()):
            if self.under_way == AT_ONCE:
                return
            if turn is not None:
                del self.due[session.key]
                self.under_way += 1
                turn.set_result(None)
            elif not session.life.queue:
                del self.due[session.key]
                self._begin(session)

    def make_clean(self, count: int) -> None:
        """Save up to ``count`` resting sessions whose place may be needed soon; what failed lately waits for its round."""
        for session in list(self.changed.values()):
            if len(self.due) >= count:
                return
            if session.resting and session.unsaved and session.key not in self.failing:
                self.due.setdefault(session.key, (session, None))

    def _round(self, idle_only: bool = False) -> None:
        self.next_round = time.monotonic() + self.autosave
        if not any(session.unsaved for session in self.ledger.sessions.values()):
            self.store.full = ""  # no save is going to find out whether there is room again: the next one does
        for session in list(self.changed.values()):
            if session.idle or not idle_only:
                del self.changed[session.key]
                self.failing.discard(session.key)
                self.due.setdefault(session.key, (session, None))

    def _begin(self, session: Session) -> None:
        """Its turn has come, and nobody waits for it."""
        if session.unsaved and session.life.state is State.IN_MEMORY:
            self.under_way += 1
            self.operations.run(session, self._save(session))
        else:
            self.record(session)

    def _save(self, session: Session) -> Steps:
        """One of those that are under way, until it is recorded. Whatever of it fails is an answer, and a line of the log."""
        began = time.monotonic()
        try:
            for _ in range(_TRIES):
                if (yield from self._write(session)):
                    break
            else:
                raise StoreError("it went back to an earlier version again and again", 507)
        except (StoreError, OSError) as error:
            raise self._failed(session, store_error(error)) from None
        finally:
            self.under_way -= 1
        self.counts.add("saves_total", 1, "done")
        self.counts.observe("save_seconds", time.monotonic() - began)
        self.failing.discard(session.key)
        if session.unsaved or session.life.unrecorded:
            self.changed[session.key] = session
        else:
            self.changed.pop(session.key, None)
        return session.saved

    def _write(self, session: Session) -> Steps:
        """Write a snapshot, and record it. Returns whether it is still a version of the session: else another is needed."""
        life, taken = session.life, []
        file = self.store.folder.new_file(session.uid)

        def take(report: FileReport) -> None:
            # The ledger has counted what the delta holds, and nothing that came later. But for a rollback of the guard's.
            if report.version == session.version:
                taken.append((life.generation, session.to_state()))

        report = yield from self._file(session, file, take)
        known, good = None, None
        try:
            known, good = yield from self._good(session, report)
        except RequestError:  # a later one is good, too
            taken.clear()
        except (StoreError, OSError):
            self.store.discard(file)
            raise
        if not taken or taken[0][0] < life.returned_at:
            for unused in [file] if good is None else [file, good.file]:
                self.store.discard(unused)
            return False
        generation, state = taken[0]
        version, recorded = _version(report, file, state, known), life.generation
        yield from self._put(replace(session.row(version), good=good))
        session.saved, session.error = version, None
        life.saved_at, life.recorded_at = generation, recorded
        return generation >= life.returned_at

    def _file(
        self,
        session: Session,
        file: str,
        taken: Callable[[FileReport], None] | None = None,
        version: int | None = None,
    ) -> Steps:
        """Have the session, or an earlier version of it, written to a file; returns the FileReport. Raises OSError, or
        RequestError (409) where that version is not kept any more."""
        metadata = {"uid": session.uid, "tenant": session.key.tenant, "session_id": session.key.name}
        path = str(self.store.folder.path(file))
        report = yield self.orders.ask(FileOrder("save", session.adapter, path, metadata=metadata, version=version), taken)
        if report.outcome == "gone":
            raise RequestError(f"session {session.key.name!r} has no version {version} any more", 409, "version")
        if report.outcome != "done":
            raise OSError(report.errno, report.error)
        return report

    def _good(self, session: Session, report: FileReport) -> Steps:
        """What a version that has been written says of the last one before it that the guard found good, and that one, where
        it has been written just now; None where there is none. Raises as `_file` does."""
        saved, life = session.saved, session.life
        if report.good in (0, report.version):
            return None, None
        if saved is not None and life.saved_at >= life.returned_at:
            for known in [saved.version, saved.file, saved.checksum], saved.state.get("good", [0]):
                if known[0] == report.good:
                    return known, None
        file = self.store.folder.new_file(session.uid)
        written = yield from self._file(session, file, version=report.good)
        good = _version(written, file, session.state_at(report.good), None)
        return [good.version, good.file, good.checksum], good

    def _put(self, row: Row) -> Steps:
        """Record the newest version of a session, whose file is there. Raises StoreError: then the file is not, unless it may
        have been recorded."""
        try:
            yield self.store.put(row)
        except StoreError as error:
            for version in (row.newest, row.good):
                if version is not None and not error.in_doubt:
                    self.store.discard(version.file)
            raise

    def _failed(self, session: Session, error: StoreError) -> RequestError:
        """The session stays as it is, in memory; the next round tries again."""
        self._counted(error)
        session.error = why = error.message
        self.failing.add(session.key)
        if not self.closing:
            self.changed[session.key] = session
        return answer_of(error, f"session {session.key.name!r} could not be saved: {why}")

    def _counted(self, error: StoreError) -> StoreError:
        self.counts.add("saves_total", 1, "failed")
        if not isinstance(error, Moved):  # that says nothing of the disk
            self.store.failed(error)
        return error


def _version(report: FileReport, file: str, state: dict[str, Any], good: list[Any] | None) -> Version:
    """What was written just now; ``state``: the ledger's as of that version."""
    state = {**state, "digest": report.digest, **({} if good is None else {"good": good})}
    return Version(report.version, file, report.bytes, report.checksum, time.time(), state)
