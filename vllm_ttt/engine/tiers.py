"""Where each session is: new, on disk, on its way, in the worker's memory. Decides who comes back, and who is put away.

Only the engine's thread runs this. Orders leave with a step, reports come back with one; nothing here waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.logger import init_logger

from vllm_ttt.config import SessionsConfig
from vllm_ttt.engine import records
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.meters import Meters
from vllm_ttt.engine.records import Version
from vllm_ttt.engine.saves import AT_ONCE, Saves
from vllm_ttt.engine.store import Change, Store
from vllm_ttt.errors import RequestError
from vllm_ttt.types import FileOrder, FileReport

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Above this share of the limit, sessions are saved before their place is needed.
_HIGH_WATER = 0.75
#: Seconds between two looks for sessions that nobody has used for ``ttl``.
_SWEEP = 60.0
#: Seconds by which the clock may differ from the time that has passed before somebody must have set it.
_JUMP = 5.0


class Tiers:
    def __init__(
        self,
        ledger: Ledger,
        config: SessionsConfig,
        store: Store | None,
        give_up: Callable[[Session, RequestError], None],
        meters: Meters | None = None,
    ):
        """``give_up`` refuses the waiting requests of a session that cannot be brought back; ``meters`` count."""
        self.ledger, self.config, self.store, self.give_up = ledger, config, store, give_up
        self.meters = meters or Meters()
        self.orders: list[FileOrder] = []
        self.saves = Saves(ledger, store, config.autosave, self.orders.append, self.meters) if store is not None else None
        #: sessions that have a place in memory, or are on their way there
        self.placed = 0
        #: by the path of the file
        self.loading: dict[str, Session] = {}
        self.exporting: dict[str, tuple[Session, Future]] = {}
        #: who waits for a session to be in memory, by adapter id
        self.waking: dict[int, list[Future]] = {}
        self.next_sweep = time.monotonic()
        #: the clock less the time that has passed: it changes where somebody sets the clock
        self.skew = time.time() - time.monotonic()
        self.closing = False

    # What the scheduler asks.

    def ready(self, session: Session) -> bool:
        """Whether the session is in memory; if not, it is on its way, or waits for room."""
        if session.place in ("new", "disk"):
            self._admit(session)
        return session.place == "memory"

    def changes(self, session: Session) -> None:
        """The session was used, or has learned."""
        if self.saves is not None:
            self.saves.changes(session)

    def left(self, session: Session) -> None:
        """A request of the session has left the engine, or somebody else is done with it."""
        here = self.ledger.by_adapter.get(session.adapter) is session
        if self.saves is not None and here and session.idle and session.place in ("new", "disk"):
            self.saves.record(session)
            self._forget(session)

    def take_orders(self) -> list[FileOrder]:
        """What the worker is to do, with the step that is being scheduled."""
        self._sweep()
        if self.store is not None and self.saves is not None:
            self.store.poll()
            for adapter in list(self.waking):
                self.ready(self.ledger.by_adapter[adapter])
            if self.placed > _HIGH_WATER * self.ledger.limit and not self.saves.busy:
                self.saves.make_clean(1)
            self.saves.step()
        orders = self.orders.copy()
        self.orders.clear()
        return orders

    def read(self, report: FileReport) -> None:
        """Take in what the worker has done. For a snapshot, the ledger must have counted what it holds, and no more."""
        if report.action == "save":
            assert self.saves is not None
            self.saves.read(report)
        elif report.action == "load":
            self._read_load(report)
        elif report.action == "export" and report.outcome != "taken":
            self._read_export(report)

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping although nobody is served."""
        if self.orders or self.loading or self.exporting or self.waking:
            return True
        if self.store is None or self.saves is None:
            return False
        return self.store.busy or self.saves.busy or (time.monotonic() >= self.next_sweep and not self.closing)

    @property
    def stuck(self) -> bool:
        """Whether there is no room, and none can be made because saves fail."""
        if self.store is None or not self.store.full or self.placed < self.ledger.limit:
            return False
        return not any(s.place == "memory" and s.idle and not s.unsaved for s in self.ledger.sessions.values())

    # What the admin operations ask.

    def wake(self, session: Session) -> Future:
        """Resolves, to nothing, when the session is in memory. It stays there until it is unpinned."""
        future: Future = Future()
        session.pins += 1
        if self.ready(session):
            future.set_result(None)
        else:
            self.waking.setdefault(session.adapter, []).append(future)
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
        self._drop(session)
        self._forget(session, gone=True)
        if self.store is not None:
            self.store.remove(session.key, session.uid)
            self.store.full = ""

    def go_back(self, session: Session, version: Version) -> Future:
        """Make the saved ``version`` what the session is; later ones are no more. Resolves to the session as it is then."""
        assert self.store is not None
        future: Future = Future()
        self._drop(session)
        self._forget(session)
        state = {**version.state, **session.standing()}
        row = records.Row(session.uid, session.key, session.created, session.last_used, state, version)

        def done(_: Any, error: Exception | None) -> None:
            if error is not None:
                future.set_exception(RequestError(f"the session could not go back: {error}", 507))
            else:
                future.set_result(self.ledger.peek(session.key))

        self.store.back_to(row, done)
        return future

    def close(self) -> None:
        """The server is about to end: save everything now, and what is still learned when it has been."""
        self.closing = True
        if self.saves is not None:
            self.saves.close()

    # Room.

    def _admit(self, session: Session) -> None:
        """Give the session a place in memory, if there is one or one can be made."""
        if self.placed >= self.ledger.limit and not self._evict():
            return
        self.placed += 1
        if session.saved is None:
            session.place = "memory"
            self._woken(session)
        else:
            self._load(session)

    def _evict(self) -> bool:
        """Put the session away that was used longest ago, of those that are idle and saved; False where there is none."""
        assert self.saves is not None
        for session in self.ledger.sessions.values():
            if session.place == "memory" and session.idle and not session.unsaved:
                self.meters.add("evictions_total", 1, "memory")
                self._drop(session)
                self.saves.record(session)
                self._forget(session)
                return True
        self.saves.make_clean(AT_ONCE)
        return False

    def _drop(self, session: Session) -> None:
        if session.place in ("memory", "loading"):
            self.orders.append(FileOrder("drop", session.adapter))

    def _forget(self, session: Session, gone: bool = False) -> None:
        if session.place in ("memory", "loading") and self.store is not None:
            self.placed -= 1
        session.place = "disk"
        if self.saves is not None:
            self.saves.forget(session)
        self._woken(session, RequestError(f"session {session.key.name!r} was removed meanwhile", 409))
        (self.ledger.remove if gone else self.ledger.forget)(session)

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
        self.meters.add("loads_total", 1, report.outcome)
        if self.ledger.by_adapter.get(report.session) is not session:
            self.orders.append(FileOrder("drop", report.session))  # it was removed meanwhile
        elif report.outcome == "done":
            session.place = "memory"
            self._woken(session)
        elif report.outcome == "damaged":
            self._fall_back(session, report.error)
        else:
            self._cannot_read(session, report.error)

    def _cannot_read(self, session: Session, why: str) -> None:
        """The file may be good: the session stays what it is, and who asks again may have more luck."""
        self.placed -= 1
        session.place, session.error = "disk", why
        error = RequestError(f"session {session.key.name!r} could not be read: {why}", 507)
        logger.error("vllm-ttt: a session could not be read: %s", why)
        self._woken(session, error)
        self.give_up(session, error)

    def _fall_back(self, session: Session, why: str) -> None:
        """The newest version is damaged: set it aside, and go on with the one before, or with none."""
        assert self.store is not None
        assert session.saved is not None
        store, file, version = self.store, session.saved.file, session.saved.version

        def write(db: Any) -> Change:
            row = records.without(db, session.uid, file, {})
            store.folder.set_aside(file)
            return Change(row, gone=[file])

        def done(row: records.Row | None, error: Exception | None) -> None:
            if self.ledger.by_adapter.get(session.adapter) is not session:
                return
            if row is None or error is not None:
                self._cannot_read(session, str(error or why))
                return
            session.from_state({**row.state, **session.standing()})
            session.saved = row.newest
            session.error = f"version {version} was damaged ({why}) and set aside; this is the version before"
            logger.error(
                "vllm-ttt: %s is damaged (%s) and was set aside; its session falls back from version %d to %d",
                file, why, version, session.version,
            )  # fmt: skip
            if session.saved is None:
                session.place = "memory"
                self._woken(session)
            else:
                self._load(session)

        store.write(write, done)

    def _woken(self, session: Session, error: Exception | None = None) -> None:
        for future in self.waking.pop(session.adapter, ()):
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _read_export(self, report: FileReport) -> None:
        session, future = self.exporting.pop(report.path)
        if report.outcome == "done":
            future.set_result(report)
        else:
            future.set_exception(RequestError(f"session {session.key.name!r} could not be written: {report.error}", 507))

    # Ends.

    def _sweep(self) -> None:
        """Remove sessions that nobody has used for ``ttl``."""
        now, ttl = time.monotonic(), self.config.ttl_seconds
        if now < self.next_sweep or self.closing:
            return
        self.next_sweep = now + min(_SWEEP, ttl)
        self._follow_clock()
        if ttl == math.inf:
            return
        oldest = time.time() - ttl
        for session in [s for s in self.ledger.sessions.values() if s.last_used < oldest and s.idle]:
            self.remove(session)
        if self.store is not None:
            self.store.write(lambda db: Change(records.unused_since(db, oldest)), self._expire)

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
        if self.store is not None:
            self.store.write(lambda db: Change(records.follow_clock(db, ahead, now)))

    def _expire(self, rows: list[records.Row] | None, error: Exception | None) -> None:
        for row in rows or ():
            if row.key not in self.ledger.sessions and (session := self.ledger.find(row.key)) is not None:
                self.remove(session)
