"""Who comes into the worker's memory, and who is put away; and the one place where a session changes its state.

Only the engine's thread runs this. Orders leave with a step, reports come back with one; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import chain
from typing import Any

from vllm_ttt.config import SessionsConfig
from vllm_ttt.engine.counts import EngineCounts
from vllm_ttt.engine.guarded import Guarded
from vllm_ttt.engine.hold.line import Places, Turn
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.life.changes import Changes
from vllm_ttt.engine.life.expiry import Expiry
from vllm_ttt.engine.life.exports import Exports
from vllm_ttt.engine.life.operations import ROOM, Operations, Steps
from vllm_ttt.engine.life.orders import Orders
from vllm_ttt.engine.life.saves import AT_ONCE, Saves
from vllm_ttt.engine.life.sharing import Sharing
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.storage import records
from vllm_ttt.engine.storage.audit import open_audit
from vllm_ttt.engine.storage.lists import Lists
from vllm_ttt.engine.storage.records import Version
from vllm_ttt.engine.storage.store import Change, Store
from vllm_ttt.errors import RequestError
from vllm_ttt.log import logger_of
from vllm_ttt.types import FileOrder, FileReport

logger = logger_of(__name__)

#: Above this share of the limit, sessions are saved before their place is needed.
_HIGH_WATER = 0.75


class Tiers:
    def __init__(
        self,
        ledger: Ledger,
        config: SessionsConfig,
        store: Store | None,
        give_up: Callable[[Session, RequestError], None],
        counts: EngineCounts | None = None,
        guard: Guarded | None = None,
    ):
        """``give_up`` refuses the waiting requests of a session that cannot be brought back; ``counts`` count; ``guard``
        calls what must not end serving. Raises ConfigError where the audit log cannot be written."""
        self.ledger, self.store, self.give_up = ledger, store, give_up
        self.counts, self.guard = counts or EngineCounts(), guard or Guarded()
        self.audit = ledger.audit = open_audit(config)
        self.orders = Orders()
        self.operations = Operations(self.guard, self._settled)
        #: runs an operation on a session, in its turn
        self.run = self.operations.run
        tools = self.orders, self.operations, self.counts
        self.saves = Saves(ledger, store, config.autosave, *tools) if store is not None else None
        self.exports, self.lists, self.owner = Exports(self.orders), Lists(ledger, store), Changes(self)
        self.expiry = Expiry(ledger, store, config.ttl_seconds, self.owner.expire)
        self.sharing = Sharing(self, store) if store is not None and store.watch is not None else None
        #: sessions that have a place in memory, or are on their way there
        self.placed = 0
        #: who waits for one
        self.places = Places()
        #: sessions whose requests are to be refused, and why
        self.broken: list[tuple[Session, RequestError]] = []
        #: whether the first of those has looked for room, and nothing has happened since that could have made some: it need not
        #: look again in this step, nor need there be another step for it
        self.crowded = False
        self.closing = False
        #: called with a session that has come into memory, or for which nothing is left to do
        self.on_ready: Callable[[Session], None] = lambda session: None

    # What the scheduler asks.

    def ready(self, session: Session) -> bool:
        """Whether the session is in memory, and as its owner wants it; if not, it is on its way, or waits for room.

        Never raises: a session that cannot be brought in has its requests refused in the next `take_orders`.
        """
        if self.homeless(session) and self.guard(self._admit, session) is None:
            message = f"session {session.key.name!r} could not be brought in; the server's log says why"
            self.broken.append((session, RequestError(message, 503)))
        return session.life.state is State.IN_MEMORY

    def no_room(self, session: Session) -> RequestError:
        """What is said where there is no room for the session and none can come (`stuck`)."""
        why = session.error or "saves fail, or all that have a place wait for another"
        return RequestError(f"there is no room to bring session {session.key.name!r} in: {why}; try later", 503)

    def homeless(self, session: Session) -> bool:
        """Whether the session, which is not ready, waits for room in memory; otherwise it is on its way, or being changed."""
        return session.life.state in (State.NEW, State.ON_DISK) and not session.life.queue

    def changes(self, session: Session) -> None:
        """The session was used, or has learned."""
        if self.saves is not None:
            self.saves.changes(session)

    def left(self, session: Session) -> None:
        """A request of the session has left the engine, or has been learned."""
        self.crowded = False
        if self.sharing is not None and self.sharing.drops(session):
            return
        if session.idle and session.blank and self.ledger.sessions.get(session.key) is session:
            self._remember(session)
        else:
            self._rest(session)

    def check(self) -> None:
        """Before anything is scheduled or answered: see which sessions this server has. Never raises."""
        if self.sharing is not None:
            self.guard(self.sharing.step)

    def take_orders(self) -> list[FileOrder]:
        """What the worker is to do, with the step that is being scheduled. Never raises."""
        self.crowded = False
        if not self.closing:
            self.guard(self.expiry.step)
        if self.store is not None and self.saves is not None:
            for part in (self.store.poll, self._make_clean, self.saves.step):
                self.guard(part)
        for part in (self.exports.step, self.operations.step, self.lists.step):
            self.guard(part)
        broken, self.broken = self.broken, []
        for session, error in broken:
            if session.life.state is not State.IN_MEMORY:  # else it came in after all, and its requests may run
                self.guard(self.give_up, session, error)
        return self.orders.take()

    def read(self, report: FileReport) -> None:
        """Take in what the worker has done. For a snapshot, the ledger must have counted what it holds, and no more."""
        self.orders.read(report)

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping although nobody is served."""
        if self.orders.busy or self.exports.busy or self.lists.busy or self.audit.busy or self.broken:
            return True
        if self.operations.can_go_on(self.crowded or not isinstance(self.places.first(), Turn)):
            return True
        if self.store is None or self.saves is None:
            return False
        if self.sharing is not None and self.sharing.due:
            return True
        return self.store.busy or self.saves.busy or (self.expiry.due and not self.closing)

    @property
    def stuck(self) -> bool:
        """Whether there is no room and none can come: saves fail, or all that have a place wait for another one."""
        if self.store is None or self.saves is None or self.placed < self.ledger.limit:
            return False
        placed = [s for s in self.ledger.sessions.values() if s.life.placed]
        if all(s.life.queue and s.life.queue[0].waits is ROOM for s in placed):
            return True
        resting = [s for s in placed if s.resting]
        failing = bool(resting) and all(s.key in self.saves.failing for s in resting)
        return all(s.unsaved for s in resting) and (bool(self.store.full) or failing)

    def close(self) -> None:
        """The server is about to end: save everything now, and what is still learned when it has been."""
        self.closing = True
        if self.saves is not None:
            self.saves.close()

    def end(self) -> None:
        """Nothing will be asked any more."""
        if self.store is not None:
            self.guard(self.store.close)
        self.audit.close()

    # What the admin operations ask, and parts of operations.

    def save(self, session: Session) -> Future:
        """Resolves to the session's `Version` on disk, None for one that learned nothing; or fails with RequestError."""
        assert self.saves is not None
        return self.run(session, self.saves.asked(session))

    def versions(self, session: Session, in_memory: Iterable[int]) -> list[int]:
        """Those that the session can return to."""
        on_disk = self.store.versions(session.uid) if self.store is not None else []
        return sorted({*in_memory, *on_disk})

    def bring_in(self, session: Session) -> Steps:
        """Part of an operation: the session is in memory when it goes on, and stays there until the operation ends."""
        if not session.life.in_memory:
            yield from self._wait_for_room(session)
            yield from self._enter(session)

    def move(self, session: Session, to: State) -> None:
        """The one place where a session changes its state. What leaves memory is dropped there."""
        before = session.life.placed
        session.life.move(to)
        self.placed += session.life.placed - before
        if to is State.IN_MEMORY:
            self.on_ready(session)
        if before and not session.life.placed:
            self.crowded = False
            self.orders.drop(session.adapter)

    def become(self, session: Session, state: dict[str, Any], saved: Version | None) -> None:
        """The session is what the state dir has of it now, and not in memory any more."""
        session.become(state, saved)
        self.move(session, session.home)
        self.ledger.renew(session)
        if self.store is None:
            self.move(session, State.IN_MEMORY)  # there is no other place

    def forget(self, session: Session, gone: bool = False) -> None:
        """Nobody needs it here. ``gone``: nor anywhere else."""
        self.move(session, State.GONE)
        if self.saves is not None:
            self.saves.forget(session)
        (self.ledger.remove if gone else self.ledger.forget)(session)

    # Room.

    def _make_clean(self) -> None:
        assert self.saves is not None
        if self.placed > _HIGH_WATER * self.ledger.limit and not self.saves.busy:
            self.saves.make_clean(1)

    def _admit(self, session: Session) -> bool:
        """Give the session a place in memory, if there is one or one can be made; whether there is."""
        if not self._has_room():
            return False
        self.run(session, self._enter(session))
        return True

    def _wait_for_room(self, session: Session) -> Steps:
        """Part of an operation: it waits for its turn, and for a place."""
        turn = self.places.turn()
        try:
            while True:
                if self.places.first() in (None, turn):
                    if self._has_room():
                        return
                    if self.stuck:
                        raise self.no_room(session)
                    self.crowded = True
                if turn.line is None:  # that it waits, from now on, may be why there can be no room: look once more
                    self.places.push(turn.order, turn)
                    self.crowded = False
                yield ROOM
        finally:
            if turn.line is not None:
                self.places.remove(turn)
                self.crowded = False

    def _has_room(self) -> bool:
        # Without a state dir, so many sessions alone may learn something. Others are names, which need no room.
        return self.store is None or self.placed < self.ledger.limit or self._evict()

    def _evict(self) -> bool:
        """Put a session away that is saved: of those that are idle, who was used longest ago; else of those whose requests all
        wait behind others, who was used last. False where there is none."""
        if self.saves is None:
            return False
        sessions = self.ledger.sessions.values()
        for session in chain((s for s in sessions if s.idle), (s for s in reversed(sessions) if s.resting)):
            if session.life.state is State.IN_MEMORY and not session.unsaved:
                self.counts.add("evictions_total", 1, "memory")
                self.saves.record(session)
                if session.idle and not session.blank:
                    self.put_away(session)
                    return True
                self.move(session, session.home)
                self.ledger.renew(session)
                if session.idle:  # it needs no place to be a name
                    self._remember(session)
                return True
        self.saves.make_clean(AT_ONCE)
        return False

    def _remember(self, session: Session) -> None:
        """It is only a name."""
        for oldest in self.ledger.is_a_name(session):
            self.put_away(oldest)

    def put_away(self, session: Session) -> None:
        """Nobody needs the session here: the state dir has what there is to be known of it, or another server has it."""
        if session.life.placed:
            self.move(session, session.home)
        self.forget(session)

    def _settled(self, session: Session) -> None:
        """Nothing is left to do for the session."""
        self.crowded = False
        self.on_ready(session)
        self._rest(session)

    def _rest(self, session: Session) -> None:
        """Where nobody needs the session, and it is not in memory, the state dir alone knows it."""
        if self.sharing is not None and self.sharing.drops(session):
            return
        here = self.ledger.sessions.get(session.key) is session
        if self.saves is not None and here and session.idle and not session.life.placed:
            self.saves.record(session)
            self.forget(session)

    # Coming in.

    def _enter(self, session: Session) -> Steps:
        """Part of an operation: the session takes a place, and its delta is read, where it has one."""
        if session.saved is None:
            changing = session.life.state is State.CHANGING
            self.move(session, State.CHANGING_IN_MEMORY if changing else State.IN_MEMORY)
            return
        self.move(session, State.LOADING)
        try:
            while session.saved is not None and (why := (yield from self._load(session, session.saved))):
                yield from self._fall_back(session, session.saved, why)
        except Exception as error:
            # The file may be good: the session stays what it is, and who asks again may have more luck.
            self.move(session, State.ON_DISK)
            session.error = str(error)
            refusal = RequestError(f"session {session.key.name!r} could not be read: {error}", 507)
            logger.error("vllm-ttt: a session could not be read: %s", error)
            self.broken.append((session, refusal))
            raise (refusal if isinstance(error, OSError | RequestError) else error) from None
        self.move(session, State.IN_MEMORY)

    def _load(self, session: Session, saved: Version) -> Steps:
        """Have the newest version read. Returns how it is damaged, "" where it is not; raises OSError."""
        assert self.store is not None
        path = str(self.store.folder.path(saved.file))
        good = saved.state.get("good")
        order = FileOrder("load", session.adapter, path, saved.checksum)
        if good is not None:
            order.good = str(self.store.folder.path(good[1])), good[2]
        report: FileReport = yield self.orders.ask(order)
        self.counts.add("loads_total", 1, report.outcome)
        if report.outcome == "done" and report.version != saved.version:
            return f"it holds version {report.version}; recorded is version {saved.version}"
        if report.outcome == "failed":
            raise OSError(report.error)
        return report.error or "it cannot be read" if report.outcome == "damaged" else ""

    def _fall_back(self, session: Session, saved: Version, why: str) -> Steps:
        """The newest version is damaged: set it aside, and go on with the one before, or with none."""
        assert self.store is not None
        folder = self.store.folder

        def write(db: Any) -> Change:
            row = records.without(db, session.uid, saved.file)
            folder.set_aside(saved.file)
            return Change(row, gone=[saved.file])

        row = yield self.store.write(write, whose=session.key)
        if row is None:
            raise OSError(why)
        session.become({**row.state, **session.standing()}, row.newest)
        session.error = f"version {saved.version} was damaged ({why}) and set aside; this is the version before"
        logger.error(
            "vllm-ttt: %s is damaged (%s) and was set aside; its session falls back from version %d to %d",
            saved.file, why, saved.version, session.version,
        )  # fmt: skip
