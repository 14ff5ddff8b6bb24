"""Where each session is: new, on disk, on its way, in the worker's memory. Decides who comes back, and who is put away.

Only the engine's thread runs this. Orders leave with a step, reports come back with one; nothing here waits.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.logger import init_logger

from vllm_ttt.config import SessionsConfig
from vllm_ttt.engine import records
from vllm_ttt.engine.expiry import Expiry
from vllm_ttt.engine.exports import Exports
from vllm_ttt.engine.guarded import Guarded
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.lists import Lists
from vllm_ttt.engine.meters import Meters
from vllm_ttt.engine.records import Row, Version
from vllm_ttt.engine.saves import AT_ONCE, Saves
from vllm_ttt.engine.store import Change, Store, Then
from vllm_ttt.errors import RequestError
from vllm_ttt.types import FileOrder, FileReport, SessionKey

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Above this share of the limit, sessions are saved before their place is needed.
_HIGH_WATER = 0.75


class Tiers:
    def __init__(
        self,
        ledger: Ledger,
        config: SessionsConfig,
        store: Store | None,
        give_up: Callable[[Session, RequestError], None],
        meters: Meters | None = None,
        guard: Callable[..., Any] | None = None,
    ):
        """``give_up`` refuses the waiting requests of a session that cannot be brought back; ``meters`` count; ``guard``
        calls what must not end serving."""
        self.ledger, self.config, self.store, self.give_up = ledger, config, store, give_up
        self.meters, self.guard = meters or Meters(), guard or Guarded()
        self.orders: list[FileOrder] = []
        self.saves = Saves(ledger, store, config.autosave, self.orders.append, self.meters) if store is not None else None
        #: sessions that have a place in memory, or are on their way there
        self.placed = 0
        #: by adapter id: two sessions may read one file, of which one is no more
        self.loading: dict[int, Session] = {}
        self.exports = Exports(self.orders.append)
        self.lists = Lists(ledger, store)
        #: who waits for a session to be in memory, and whether also while it is being changed
        self.waking: dict[SessionKey, list[tuple[Future, bool]]] = {}
        #: sessions whose requests are to be refused, and why
        self.broken: list[tuple[Session, RequestError]] = []
        self.expiry = Expiry(ledger, store, config.ttl_seconds, self.remove)
        self.closing = False
        #: called with a session that has come into memory, or is not being changed any more
        self.on_ready: Callable[[Session], None] = lambda session: None

    # What the scheduler asks.

    def ready(self, session: Session) -> bool:
        """Whether the session is in memory, and as its owner wants it; if not, it is on its way, or waits for room.

        Never raises: a session that cannot be brought in has its requests refused in the next `take_orders`.
        """
        if session.place in ("new", "disk") and self.guard(self._admit, session) is None:
            message = f"session {session.key.name!r} could not be brought in; the server's log says why"
            self.broken.append((session, RequestError(message, 503)))
        return session.place == "memory" and not session.changing

    def homeless(self, session: Session) -> bool:
        """Whether the session, which is not ready, waits for room in memory; otherwise it is on its way, or being changed."""
        return session.place in ("new", "disk")

    def changes(self, session: Session) -> None:
        """The session was used, or has learned."""
        if self.saves is not None:
            self.saves.changes(session)

    def left(self, session: Session) -> None:
        """A request of the session has left the engine, or somebody else is done with it."""
        here = self.ledger.by_adapter.get(session.adapter) is session
        if here and session.idle and session.blank:
            for oldest in self.ledger.is_a_name(session):
                self._drop(oldest)
                self._forget(oldest)
            return
        if self.saves is not None and here and session.idle and session.place in ("new", "disk"):
            self.saves.record(session)
            self._forget(session)

    def take_orders(self) -> list[FileOrder]:
        """What the worker is to do, with the step that is being scheduled. Never raises."""
        broken, self.broken = self.broken, []
        for session, error in broken:
            if session.place != "memory":  # else it came in after all, and its requests may run
                self.guard(self.give_up, session, error)
        if not self.closing:
            self.guard(self.expiry.step)
        if self.store is not None and self.saves is not None:
            for part in (self.store.poll, self._wake, self._make_clean, self.saves.step):
                self.guard(part)
        self.guard(self.exports.step)
        self.guard(self.lists.step)
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
        elif report.action == "export":
            self.exports.read(report)

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping although nobody is served."""
        if self.orders or self.loading or self.exports.busy or self.lists.busy or self.waking or self.broken:
            return True
        if self.store is None or self.saves is None:
            return False
        return self.store.busy or self.saves.busy or (self.expiry.due and not self.closing)

    @property
    def stuck(self) -> bool:
        """Whether there is no room, and none can be made because saves fail."""
        if self.store is None or self.placed < self.ledger.limit:
            return False
        idle = [s for s in self.ledger.sessions.values() if s.place == "memory" and s.idle]
        return all(s.unsaved for s in idle) and (bool(self.store.full) or (bool(idle) and all(s.unsavable for s in idle)))

    # What the admin operations ask.

    def wake(self, session: Session, changing: bool = False) -> Future:
        """Resolves, to nothing, when the session is in memory. It stays there until it is unpinned.

        Args:
            changing: the caller is the one who is changing it. All others wait until it has been.
        """
        future: Future = Future()
        session.pins += 1
        if self.ready(session) or (changing and session.place == "memory"):
            future.set_result(None)
        else:
            self.waking.setdefault(session.key, []).append((future, changing))
        return future

    def unpin(self, session: Session) -> None:
        session.pins -= 1
        self.left(session)

    def remove(self, session: Session) -> Future:
        """Forget the session everywhere. It has no request in the engine. Resolves to it when it is gone from the state dir."""

        def gone(_: Any) -> None:
            error = RequestError(f"session {session.key.name!r} was removed meanwhile", 409)
            self._woken(session, error)
            if session.requests:  # it was named again meanwhile: they meet another one
                session.uid, session.created, session.touched = secrets.token_hex(16), time.time(), True
                if self.saves is not None:
                    self.saves.forget(session)
                self._become(session, {}, None)
            else:
                self._drop(session)
                self._forget(session, gone=True)

        return self._change(session, lambda store, then: store.replace(session.uid, None, then), gone)

    def reset(self, session: Session, state: dict[str, Any]) -> Future:
        """Make a fresh session of it, but for ``state``. It has no request in the engine. Resolves to it as `remove`."""
        uid, now = secrets.token_hex(16), time.time()
        row = Row(uid, session.key, session.created, now, state)

        def gone(_: Any) -> None:
            session.uid = uid
            self._become(session, state, None)

        return self._change(session, lambda store, then: store.replace(session.uid, row, then), gone)

    def go_back(self, session: Session, version: int) -> Future:
        """Make a saved version what the session is; later ones are no more. Resolves to the session as it is then.

        Fails with RequestError (409) where the state dir does not have that version any more when it comes to it.
        """
        row, standing = session.row(), session.standing()

        def back(found: Version) -> None:
            self._become(session, {**found.state, **session.standing()}, found)

        return self._change(session, lambda store, then: store.back_to(row, version, standing, then), back)

    def close(self) -> None:
        """The server is about to end: save everything now, and what is still learned when it has been."""
        self.closing = True
        if self.saves is not None:
            self.saves.close()

    # Changes that somebody asks for.

    def _change(self, session: Session, write: Callable[[Store, Then], None], change: Callable[[Any], None]) -> Future:
        """First write it, then do it: what is answered is on disk, and what cannot be written has not happened.

        In between, requests of the session wait, and so does whoever wants to change it, too. A save of it that has been
        written by then comes first; one that has not comes to nothing.
        """
        future: Future = Future()
        if self.store is None or self.saves is None:
            change(None)
            future.set_result(session)
            return future
        store, saves = self.store, self.saves
        session.changing = True
        saves.hold(session)

        def written(result: Any, error: RequestError | None) -> None:
            try:
                if error is None:
                    change(result)
                    store.full = ""
            except Exception as bug:
                future.set_exception(bug)
                raise
            finally:
                session.changing = False
            if error is None:
                future.set_result(session)
            elif error.status == 409:
                future.set_exception(error)
            else:
                message = f"session {session.key.name!r} stays as it was: the state dir cannot be written: {error}"
                future.set_exception(RequestError(message, 507))
            saves.release(session)
            self.on_ready(session)
            self.left(session)

        write(store, written)
        return future

    def _become(self, session: Session, state: dict[str, Any], saved: Version | None) -> None:
        """The session is what the state dir has of it now, and not in memory any more."""
        self._drop(session)
        self._unplace(session)
        self.ledger.renew(session)
        session.become(state, saved)
        if saved is None:
            session.place = "memory" if self.store is None else "new"

    # Room.

    def _make_clean(self) -> None:
        assert self.saves is not None
        if self.placed > _HIGH_WATER * self.ledger.limit and not self.saves.busy:
            self.saves.make_clean(1)

    def _admit(self, session: Session) -> bool:
        """Give the session a place in memory, if there is one or one can be made; whether there is."""
        if self.placed >= self.ledger.limit and not self._evict():
            return False
        self.placed += 1
        if session.saved is None:
            session.place = "memory"
            self._woken(session)
        else:
            self._load(session)
        return True

    def _evict(self) -> bool:
        """Put the session away that was used longest ago, of those that are idle and saved; False where there is none."""
        assert self.saves is not None
        for session in self.ledger.sessions.values():
            if session.place == "memory" and session.idle and not session.unsaved:
                self.meters.add("evictions_total", 1, "memory")
                self.saves.record(session)
                self._drop(session)
                self._forget(session)
                return True
        self.saves.make_clean(AT_ONCE)
        return False

    def _drop(self, session: Session) -> None:
        if session.place in ("memory", "loading"):
            self.orders.append(FileOrder("drop", session.adapter))

    def _unplace(self, session: Session) -> None:
        if session.place in ("memory", "loading") and self.store is not None:
            self.placed -= 1
        session.place = "disk"

    def _forget(self, session: Session, gone: bool = False) -> None:
        self._unplace(session)
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
        self.loading[session.adapter] = session
        self.orders.append(FileOrder("load", session.adapter, path, session.saved.checksum))

    def _read_load(self, report: FileReport) -> None:
        session = self.loading.pop(report.session)
        self.meters.add("loads_total", 1, report.outcome)
        if self.ledger.by_adapter.get(report.session) is not session:
            self.orders.append(FileOrder("drop", report.session))  # it was removed meanwhile
        elif report.outcome == "done" and report.version != session.version:
            self._fall_back(session, f"it holds version {report.version}; recorded is version {session.version}")
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
        store, file, version, adapter = self.store, session.saved.file, session.saved.version, session.adapter

        def write(db: Any) -> Change:
            row = records.without(db, session.uid, file)
            store.folder.set_aside(file)
            return Change(row, gone=[file])

        def done(row: Row | None, error: RequestError | None) -> None:
            if self.ledger.by_adapter.get(adapter) is not session:
                return
            if row is None or error is not None:
                self._cannot_read(session, str(error or why))
                return
            session.from_state({**row.state, **session.standing()})
            session.saved, session.saved_mark = row.newest, session.mark
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

    def _wake(self) -> None:
        """Bring in whom somebody waits for."""
        for key in list(self.waking):
            if self.ready(self.ledger.sessions[key]):
                self._woken(self.ledger.sessions[key])

    def _woken(self, session: Session, error: Exception | None = None) -> None:
        """Tell those who wait for the session to be in memory. While it is being changed, only its changer is told."""
        waiting = self.waking.pop(session.key, [])
        if error is None:
            self.on_ready(session)
        if error is None and session.changing and (others := [w for w in waiting if not w[1]]):
            self.waking[session.key] = others
        for future, changing in waiting:
            if error is not None:
                future.set_exception(error)
            elif changing or not session.changing:
                future.set_result(None)
