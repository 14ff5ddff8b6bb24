"""Where each session is: new, on disk, on its way, in the worker's memory. Decides what is saved, brought back and put away.

Only the engine's thread runs this. Orders leave with a step, reports come back with one; nothing here waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from vllm_ttt.config import SessionsConfig
from vllm_ttt.engine import records
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.records import Version
from vllm_ttt.engine.store import Change, Store
from vllm_ttt.errors import RequestError
from vllm_ttt.types import FileOrder, FileReport

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Saves that are under way at once: each holds a copy of its session.
_AT_ONCE = 4
#: Above this share of the limit, sessions are saved before their place is needed.
_HIGH_WATER = 0.75
#: Seconds between two looks for sessions that nobody has used for ``ttl``.
_SWEEP = 60.0


@dataclass(slots=True)
class Save:
    """A save that is under way. ``file`` is its name in the state dir; ``version`` what it holds, once that is known."""

    session: Session
    file: str
    version: Version | None = None


@dataclass(slots=True)
class Waiting:
    """Who waits for a session."""

    loaded: list[Future] = field(default_factory=list)
    #: with the version that must be on disk
    saved: list[tuple[int, Future]] = field(default_factory=list)


class Tiers:
    def __init__(
        self, ledger: Ledger, config: SessionsConfig, store: Store | None, give_up: Callable[[Session, RequestError], None]
    ):
        """``give_up`` refuses the waiting requests of a session that cannot be brought back."""
        self.ledger, self.config, self.store, self.give_up = ledger, config, store, give_up
        #: sessions that have a place in memory, or are on their way there
        self.placed = 0
        self.orders: list[FileOrder] = []
        #: sessions to be saved, in order; those that are not unsaved any more are passed over
        self.due: dict[int, Session] = {}
        self.saving: dict[str, Save] = {}
        self.loading: dict[str, Session] = {}
        self.exporting: dict[str, tuple[Session, Future]] = {}
        self.waiting: dict[int, Waiting] = {}
        #: sessions that have changed since the last round of saves
        self.changed: dict[int, Session] = {}
        self.next_save = time.monotonic() + config.autosave
        self.next_sweep = time.monotonic()
        self.closing = False

    # What the scheduler asks.

    def ready(self, session: Session) -> bool:
        """Whether the session is in memory; if not, it is on its way, or waits for room."""
        if session.place in ("new", "disk"):
            self._admit(session)
        return session.place == "memory"

    def changes(self, session: Session) -> None:
        """The session was used, or has learned."""
        if self.store is not None:
            session.touched = True
            self.changed[session.adapter] = session

    def left(self, session: Session) -> None:
        """A request of the session has left the engine, or somebody else is done with it."""
        here = self.ledger.by_adapter.get(session.adapter) is session
        if self.store is not None and here and session.idle and session.place in ("new", "disk"):
            self._record(session)
            self._forget(session)

    def take_orders(self) -> list[FileOrder]:
        """What the worker is to do, with the step that is being scheduled."""
        self._sweep()
        if self.store is not None:
            self.store.poll()
            for adapter, waiting in list(self.waiting.items()):
                if waiting.loaded:
                    self.ready(self.ledger.by_adapter[adapter])
            self._save_what_is_due(self.store)
        orders, self.orders = self.orders, []
        return orders

    def read(self, report: FileReport) -> None:
        """Take in what the worker has done. For a snapshot, the ledger must have counted what it holds, and no more."""
        if report.action == "save":
            self._read_save(report)
        elif report.action == "load":
            self._read_load(report)
        elif report.action == "export" and report.outcome != "taken":
            self._read_export(report)

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping although nobody is served."""
        if self.orders or self.loading or self.exporting:
            return True
        if self.store is None:
            return False
        if self.saving or self.due or self.store.busy or self.waiting:
            return True
        now = time.monotonic()
        return (bool(self.changed) and (self.closing or now >= self.next_save)) or (now >= self.next_sweep and not self.closing)

    @property
    def stuck(self) -> bool:
        """Whether there is no room, and none can be made because saves fail."""
        if self.store is None or not self.store.full or self.placed < self.ledger.limit:
            return False
        return not any(s.place == "memory" and s.idle and not s.unsaved for s in self.ledger.sessions.values())

    # What the admin operations ask.

    def save(self, session: Session) -> Future:
        """Resolves to the session's `Version` on disk, None for one that learned nothing; or fails with RequestError."""
        future: Future = Future()
        if not session.unsaved and session.adapter not in {s.session.adapter for s in self.saving.values()}:
            self._record(session)
            future.set_result(session.saved)
            return future
        self.waiting.setdefault(session.adapter, Waiting()).saved.append((session.version, future))
        session.unsavable = False
        self.due[session.adapter] = session
        return future

    def wake(self, session: Session) -> Future:
        """Resolves, to nothing, when the session is in memory. It stays there until it is unpinned."""
        future: Future = Future()
        session.pins += 1
        if self.ready(session):
            future.set_result(None)
        else:
            self.waiting.setdefault(session.adapter, Waiting()).loaded.append(future)
        return future

    def unpin(self, session: Session) -> None:
        session.pins -= 1
        self.left(session)

    def export(self, session: Session, path: str) -> Future:
        """Resolves to the FileReport of an adapter at ``path``, of a session that is in memory and pinned."""
        future: Future = Future()
        self.exporting[path] = (session, future)
        self.orders.append(FileOrder("export", session.adapter, path, metadata={"session_id": session.key.name}))
        return future

    def remove(self, session: Session) -> None:
        """Forget the session everywhere. It has no request in the engine."""
        if session.place in ("memory", "loading"):
            self.orders.append(FileOrder("drop", session.adapter))
        self._forget(session, gone=True)
        if self.store is not None:
            self.store.remove(session.key, session.uid)
            self.store.full = ""

    def go_back(self, session: Session, version: Version) -> Future:
        """Make the saved ``version`` what the session is; later ones are no more. Resolves to the session as it is then."""
        assert self.store is not None
        future: Future = Future()
        if session.place in ("memory", "loading"):
            self.orders.append(FileOrder("drop", session.adapter))
        if session.key in self.ledger.sessions:
            self._forget(session)
        state = {**version.state, "frozen": session.frozen}
        row = records.Row(session.uid, session.key, session.created, session.last_used, state, version)

        def done(_: Any, error: Exception | None) -> None:
            if error is not None:
                future.set_exception(_failed(f"the session could not go back: {error}"))
            else:
                future.set_result(self.ledger.peek(session.key))

        self.store.back_to(row, done)
        return future

    def close(self) -> None:
        """The server is about to end: save everything now, and what is still learned when it has been."""
        if not self.closing and self.store is not None:
            self.closing = True
            self.next_save = 0.0
            logger.info("vllm-ttt: saving %d sessions before the end", sum(s.unsaved for s in self.changed.values()))

    # Room.

    def _admit(self, session: Session) -> None:
        """Give the session a place in memory, if there is one or one can be made."""
        if self.placed >= self.ledger.limit and not self._evict():
            return
        self.placed += 1
        if session.saved is None:
            session.place = "memory"
            self._resolve_loaded(session)
        else:
            self._load(session)

    def _evict(self) -> bool:
        """Put the session away that was used longest ago, of those that are idle and saved; False where there is none."""
        for session in self.ledger.sessions.values():
            if session.place == "memory" and session.idle and not session.unsaved:
                self.orders.append(FileOrder("drop", session.adapter))
                self._record(session)
                self._forget(session)
                return True
        self._save_the_oldest(_AT_ONCE)
        return False

    def _forget(self, session: Session, gone: bool = False) -> None:
        if session.place in ("memory", "loading"):
            self.placed -= 1
        session.place = "disk"
        self.changed.pop(session.adapter, None)
        self.due.pop(session.adapter, None)
        if (waiting := self.waiting.pop(session.adapter, None)) is not None:
            for future in (*waiting.loaded, *(future for _, future in waiting.saved)):
                future.set_exception(RequestError(f"session {session.key.name!r} was removed meanwhile", 409))
        (self.ledger.remove if gone else self.ledger.forget)(session)

    # Saving.

    def _save_what_is_due(self, store: Store) -> None:
        now = time.monotonic()
        if self.changed and now >= self.next_save:
            # Before the end, a session that is being used is saved once, and again when it is idle.
            first, self.next_save = self.next_save == 0.0, now + self.config.autosave
            for session in list(self.changed.values()):
                if self.closing and not first and not session.idle:
                    self.next_save = now
                    continue
                del self.changed[session.adapter]
                session.unsavable = False
                self.due.setdefault(session.adapter, session)
            if self.closing:
                self.next_save = now
        elif self.placed > _HIGH_WATER * self.ledger.limit and not self.due and len(self.saving) < _AT_ONCE:
            self._save_the_oldest(1)
        again = {}
        while self.due and len(self.saving) < _AT_ONCE:
            session = self.due.pop(next(iter(self.due)))
            if any(save.session is session for save in self.saving.values()):
                again[session.adapter] = session
            elif session.unsaved and session.place == "memory":
                self._save(store, session)
            else:
                self._record(session)
                self._resolve_saved(session)
        self.due |= again

    def _save_the_oldest(self, count: int) -> None:
        """Up to ``count`` of those whose place may be needed soon; what could not be saved lately waits for its round."""
        for session in list(self.changed.values()):
            if len(self.due) >= count:
                return
            if session.place == "memory" and session.idle and session.unsaved and not session.unsavable:
                self.due[session.adapter] = session

    def _save(self, store: Store, session: Session) -> None:
        try:
            file = store.folder.new_file(session.uid)
        except OSError as error:
            self._save_failed(session, error.strerror or str(error))
            return
        metadata = {"uid": session.uid, "tenant": session.key.tenant, "session_id": session.key.name}
        path = str(store.folder.path(file))
        self.saving[path] = Save(session, file)
        self.orders.append(FileOrder("save", session.adapter, path, metadata=metadata))

    def _read_save(self, report: FileReport) -> None:
        assert self.store is not None
        save = self.saving[report.path]
        session, current = save.session, self.ledger.by_adapter.get(report.session) is save.session
        if report.outcome == "taken":
            # The ledger has counted what the delta holds, and nothing that came later.
            save.version = Version(report.version, save.file, 0, "", time.time(), session.to_state())
            return
        if report.outcome != "done" or not current or save.version is None:
            del self.saving[report.path]
            if report.outcome == "done":
                self.store.discard(save.file)
            elif current:
                self._save_failed(session, report.error)
            return
        taken = save.version
        version = Version(taken.version, taken.file, report.bytes, report.checksum, taken.saved, taken.state)

        def recorded(_: Any, error: Exception | None) -> None:
            del self.saving[report.path]
            if error is not None:
                assert self.store is not None
                self.store.discard(version.file)
                self._save_failed(session, str(error))
            elif self.ledger.by_adapter.get(report.session) is session:
                self._saved(session, version)

        session.touched = False
        self.store.put(session.row(version), recorded)

    def _saved(self, session: Session, version: Version) -> None:
        assert self.store is not None
        session.saved, session.error, self.store.full = version, None, ""
        if session.unsaved or session.touched:
            self.changed[session.adapter] = session
        else:
            self.changed.pop(session.adapter, None)
        self._resolve_saved(session)

    def _save_failed(self, session: Session, why: str) -> None:
        """The session stays as it is, in memory; the next round tries again."""
        assert self.store is not None
        if session.error != why:
            logger.error("vllm-ttt: a session could not be saved and stays in memory: %s", why)
        session.error = self.store.full = why
        session.unsavable = session.touched = True
        if not self.closing:
            self.changed[session.adapter] = session
        self._resolve_saved(session, _failed(f"session {session.key.name!r} could not be saved: {why}"))

    def _record(self, session: Session) -> None:
        """What the state dir says of the session, its delta apart."""
        if self.store is not None and session.touched:
            session.touched = False
            self.store.put(session.row())

    # Coming back.

    def _load(self, session: Session) -> None:
        assert self.store is not None
        assert session.saved is not None
        path = str(self.store.folder.path(session.saved.file))
        session.place = "loading"
        self.loading[path] = session
        self.orders.append(FileOrder("load", session.adapter, path, session.saved.checksum))

    def _read_load(self, report: FileReport) -> None:
        session = self.loading.pop(report.path)
        if self.ledger.by_adapter.get(report.session) is not session:
            self.orders.append(FileOrder("drop", report.session))  # it was removed meanwhile
        elif report.outcome == "done":
            session.place, session.error = "memory", None
            self._resolve_loaded(session)
        elif report.outcome == "damaged":
            self._fall_back(session, report.error)
        else:
            self.placed -= 1
            session.place, session.error = "disk", report.error
            error = _failed(f"session {session.key.name!r} could not be read: {report.error}")
            logger.error("vllm-ttt: %s", error)
            self._resolve_loaded(session, error)
            self.give_up(session, error)

    def _fall_back(self, session: Session, why: str) -> None:
        """The newest version is damaged: set it aside, and go on with the one before, or with none."""
        assert self.store is not None
        assert session.saved is not None
        store, file, version = self.store, session.saved.file, session.saved.version
        frozen = session.frozen

        def done(row: records.Row | None, error: Exception | None) -> None:
            if self.ledger.by_adapter.get(session.adapter) is not session:
                return
            if row is None or error is not None:
                self.placed -= 1
                session.place = "disk"
                self.give_up(session, _failed(f"session {session.key.name!r} could not be read: {error or why}"))
                return
            session.from_state(row.state)
            session.saved, session.frozen = row.newest, frozen
            session.error = f"version {version} was damaged ({why}); this is the version before"
            logger.error(
                "vllm-ttt: %s is damaged (%s) and was set aside; its session falls back from version %d to %d",
                file, why, version, session.version,
            )  # fmt: skip
            if session.saved is None:
                session.place = "memory"
                self._resolve_loaded(session)
            else:
                self._load(session)

        def write(db: Any) -> Change:
            row = records.without(db, session.uid, file, {})
            store.folder.set_aside(file)
            return Change(row, gone=[file])

        store.write(write, done)

    def _read_export(self, report: FileReport) -> None:
        session, future = self.exporting.pop(report.path)
        if report.outcome == "done":
            future.set_result(report)
        else:
            future.set_exception(_failed(f"session {session.key.name!r} could not be written: {report.error}"))

    # Ends.

    def _sweep(self) -> None:
        """Remove sessions that nobody has used for ``ttl``."""
        now = time.monotonic()
        if now < self.next_sweep or self.closing:
            return
        self.next_sweep, oldest = now + min(_SWEEP, self.config.ttl_seconds), time.time() - self.config.ttl_seconds
        for session in [s for s in self.ledger.sessions.values() if s.last_used < oldest and s.idle]:
            self.remove(session)
        if self.store is not None and self.config.ttl_seconds != float("inf"):
            self.store.write(lambda db: Change(records.unused_since(db, oldest)), self._expire)

    def _expire(self, rows: list[records.Row] | None, error: Exception | None) -> None:
        for row in rows or ():
            if row.key not in self.ledger.sessions and (session := self.ledger.find(row.key)) is not None:
                self.remove(session)

    def _resolve_loaded(self, session: Session, error: Exception | None = None) -> None:
        if (waiting := self.waiting.get(session.adapter)) is not None:
            futures, waiting.loaded = waiting.loaded, []
            self._settle(session, waiting, futures, None, error)

    def _resolve_saved(self, session: Session, error: Exception | None = None) -> None:
        """Answer those who wait for the version that is on disk now, or for an earlier one; with an error, all."""
        if (waiting := self.waiting.get(session.adapter)) is not None:
            have = session.saved.version if session.saved else 0
            futures = [future for version, future in waiting.saved if error is not None or version <= have]
            waiting.saved = [] if error is not None else [(v, future) for v, future in waiting.saved if v > have]
            self._settle(session, waiting, futures, session.saved, error)

    def _settle(self, session: Session, waiting: Waiting, futures: list[Future], result: Any, error: Exception | None) -> None:
        if not (waiting.loaded or waiting.saved):
            self.waiting.pop(session.adapter, None)
        for future in futures:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)


def _failed(message: str) -> RequestError:
    return RequestError(message, 507)
