"""Which sessions are written to the state dir, and when: every ``autosave`` seconds, when asked, for room, at the end.

A save is an order to the worker, which takes a snapshot and writes the file; then the version is recorded. Only then it exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from vllm.logger import init_logger

from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.meters import Meters
from vllm_ttt.engine.records import Version
from vllm_ttt.engine.store import Store, StoreError, store_error
from vllm_ttt.errors import RequestError
from vllm_ttt.types import FileOrder, FileReport, SessionKey

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Saves that are under way at once: each holds a copy of its session.
AT_ONCE = 4


@dataclass(slots=True)
class Save:
    """A save that is under way. ``file`` is its name in the state dir; ``version`` what it holds, once that is known."""

    session: Session
    file: str
    version: Version | None = None
    #: when it was ordered, time.monotonic()
    began: float = field(default_factory=time.monotonic)
    #: `Session.mark` of what it holds
    mark: tuple[int, int] = (0, 0)
    #: what it holds may not become a version: the session is being changed, or the ledger does not know what it holds
    void: bool = False


class Saves:
    def __init__(self, ledger: Ledger, store: Store, autosave: float, order: Callable[[FileOrder], None], meters: Meters):
        """``order`` sends an order to the worker with the next step; ``meters`` count what becomes of saves."""
        self.ledger, self.store, self.autosave, self.order, self.meters = ledger, store, autosave, order, meters
        #: sessions that have changed since the last round; who changed first comes first
        self.changed: dict[SessionKey, Session] = {}
        #: sessions to be saved, in order; those that are not unsaved any more are passed over
        self.due: dict[SessionKey, Session] = {}
        #: by the path of the file
        self.under_way: dict[str, Save] = {}
        #: who waits for a session to be on disk, with its `mark` then: what has that mark, or a later one, will do
        self.asked: dict[SessionKey, list[tuple[tuple[int, int], Future]]] = {}
        self.next_round = time.monotonic() + autosave
        self.closing = False

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping although nobody is served."""
        if self.under_way or self.due or self.asked:
            return True
        return bool(self.changed) and (self.closing or time.monotonic() >= self.next_round)

    def changes(self, session: Session) -> None:
        """The session was used, or has learned."""
        session.touched = True
        self.changed[session.key] = session

    def save(self, session: Session) -> Future:
        """Resolves to the session's `Version` on disk, None for one that learned nothing; or fails with RequestError.

        Where the session goes back meanwhile, to the version that it has then.
        """
        future: Future = Future()
        if not session.unsaved and not session.changing:
            self.record(session)
            future.set_result(session.saved)
            return future
        self.asked.setdefault(session.key, []).append((session.mark, future))
        session.unsavable = False
        self.due[session.key] = session
        return future

    def record(self, session: Session) -> None:
        """Bring what the state dir says of the session, its delta apart, up to date."""
        if session.touched and not session.blank:
            self.store.note(session.row(session.saved))
            session.touched, session.recorded = False, True

    def hold(self, session: Session) -> None:
        """The session is about to be changed on disk: what is under way for it, and not recorded yet, will not be."""
        for save in self.under_way.values():
            save.void = save.void or save.session is session

    def release(self, session: Session) -> None:
        """It has been changed, or not: who has asked for a save of it meanwhile is answered, or its turn comes."""
        if not session.unsaved:
            self._resolve(session)

    def forget(self, session: Session) -> None:
        """The session leaves memory, or is no more: what is under way for it will not be recorded."""
        self.changed.pop(session.key, None)
        self.due.pop(session.key, None)
        for _, future in self.asked.pop(session.key, ()):
            future.set_exception(RequestError(f"session {session.key.name!r} was removed meanwhile", 409))

    def close(self) -> None:
        """The server is about to end: save what has changed at once; what is in use, again when it is idle."""
        if not self.closing:
            self.closing = True
            self._round()
            logger.info("vllm-ttt: saving %d sessions before the end", sum(s.unsaved for s in self.due.values()))

    def step(self) -> None:
        """Begin what is due."""
        if self.changed and (self.closing or time.monotonic() >= self.next_round):
            self._round(idle_only=self.closing)
        again = {}
        while self.due and len(self.under_way) < AT_ONCE:
            session = self.due.pop(next(iter(self.due)))
            if session.changing or any(save.session is session for save in self.under_way.values()):
                again[session.key] = session
            elif session.unsaved and session.place == "memory":
                self._begin(session)
            else:
                self.record(session)
                self._resolve(session)
                if session.key in self.asked:
                    self._resolve(session, RequestError(f"session {session.key.name!r} is not in memory", 409))
        self.due |= again

    def make_clean(self, count: int) -> None:
        """Save up to ``count`` idle sessions whose place may be needed soon; what failed lately waits for its round."""
        for session in list(self.changed.values()):
            if len(self.due) >= count:
                return
            if session.place == "memory" and session.idle and session.unsaved and not session.unsavable:
                self.due[session.key] = session

    def read(self, report: FileReport) -> None:
        """Take in how far a save has come."""
        save = self.under_way[report.path]
        session, current = save.session, self.ledger.by_adapter.get(report.session) is save.session
        if report.outcome == "taken":
            # The ledger has counted what the delta holds, and nothing that came later. But for a rollback of the guard's.
            save.version = Version(report.version, save.file, 0, "", time.time(), session.to_state())
            save.mark, save.void = session.mark, save.void or report.version != session.version
        elif report.outcome == "done" and current and save.version is not None and not save.void:
            version = replace(save.version, bytes=report.bytes, checksum=report.checksum)
            session.touched = False
            self.store.put(session.row(version), lambda _, error: self._recorded(report, save, version, error))
        else:
            del self.under_way[report.path]
            if report.outcome == "done":
                self.store.discard(save.file)
            if not current:
                return
            if save.void:
                self._again(session)
            else:
                self._failed(session, store_error(OSError(report.errno, report.error)))

    def _round(self, idle_only: bool = False) -> None:
        self.next_round = time.monotonic() + self.autosave
        for session in list(self.changed.values()):
            if session.idle or not idle_only:
                del self.changed[session.key]
                session.unsavable = False
                self.due.setdefault(session.key, session)

    def _begin(self, session: Session) -> None:
        try:
            file = self.store.folder.new_file(session.uid)
        except OSError as error:
            self._failed(session, store_error(error))
            return
        key = session.key
        metadata = {"uid": session.uid, "tenant": key.tenant, "session_id": key.name}
        path = str(self.store.folder.path(file))
        self.under_way[path] = Save(session, file)
        self.order(FileOrder("save", session.adapter, path, metadata=metadata))

    def _again(self, session: Session) -> None:
        """What was under way for the session came to nothing, for no fault of its own."""
        self.changed[session.key] = session
        if session.key in self.asked:
            self.due[session.key] = session

    def _recorded(self, report: FileReport, save: Save, version: Version, error: RequestError | None) -> None:
        del self.under_way[report.path]
        session, current = save.session, self.ledger.by_adapter.get(report.session) is save.session
        if error is not None:
            assert isinstance(error, StoreError)
            self.store.discard(version.file)
            if current:
                self._failed(session, error)
        elif current:
            session.saved, session.saved_mark, session.error, self.store.full = version, save.mark, None, ""
            self.meters.add("saves_total", 1, "done")
            self.meters.observe("save_seconds", time.monotonic() - save.began)
            if session.unsaved or session.touched:
                self.changed[session.key] = session
            else:
                self.changed.pop(session.key, None)
            self._resolve(session)
            if session.key in self.asked:
                self.due.setdefault(session.key, session)

    def _failed(self, session: Session, error: StoreError) -> None:
        """The session stays as it is, in memory; the next round tries again."""
        self.meters.add("saves_total", 1, "failed")
        self.store.failed(error)
        session.error = why = error.message
        session.unsavable = session.touched = True
        if not self.closing:
            self.changed[session.key] = session
        self._resolve(session, RequestError(f"session {session.key.name!r} could not be saved: {why}", 507))

    def _resolve(self, session: Session, error: RequestError | None = None) -> None:
        """Answer those who wait for what is on disk now, or for something earlier; with an error, all."""
        if (asked := self.asked.pop(session.key, None)) is None:
            return
        if error is None and (later := [(mark, future) for mark, future in asked if mark > session.saved_mark]):
            self.asked[session.key] = later
        for mark, future in asked:
            if error is not None:
                future.set_exception(error)
            elif mark <= session.saved_mark:
                future.set_result(session.saved)
