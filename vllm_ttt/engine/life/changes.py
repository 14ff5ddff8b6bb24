"""What an owner asks for: delete, reset, roll back, fork, freeze. Each is an operation, and one transaction of the state dir.

It is written first, and what is in memory follows: what is answered is on disk, and what cannot be written has not happened. In
between the session is changing: its requests wait, and meet what it is afterwards. One that is being frozen is not: what its
requests learn until then, it has learned.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.operations import Steps
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.storage.failures import StoreError, answer_of
from vllm_ttt.engine.storage.records import Row
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import RequestError
from vllm_ttt.types import FileOrder, FileReport, SessionKey

if TYPE_CHECKING:
    from vllm_ttt.engine.life.tiers import Tiers

#: Calls a method of the worker and waits for it.
Worker = Callable[..., Any]


class Changes:
    """Each resolves to the session as it is then, a removal to its receipt; or fails with RequestError: 409, a request of it
    is in the engine."""

    def __init__(self, tiers: Tiers):
        self.tiers, self.ledger, self.store, self.audit = tiers, tiers.ledger, tiers.store, tiers.audit

    def remove(self, session: Session) -> Future:
        """Forget the session everywhere."""
        return self.tiers.run(session, self._remove(session, "delete"))

    def expire(self, session: Session) -> Future:
        """The same, where nobody has used it for so long."""
        return self.tiers.run(session, self._remove(session, "expire"))

    def reset(self, session: Session, keep: Callable[[], dict[str, Any]]) -> Future:
        """Make a fresh session of it, but for the state that ``keep`` returns when its turn comes."""
        return self.tiers.run(session, self._reset(session, keep))

    def go_back(self, session: Session, version: int, worker: Worker) -> Future:
        """Make an earlier version what the session is, on disk or in memory; later ones are no more."""
        return self.tiers.run(session, self._go_back(session, version, worker))

    def fork(self, source: Session, key: SessionKey, worker: Worker) -> Future:
        """Make a session ``key``, which there is not yet, of what ``source`` is. Raises RequestError where none may be made."""
        target, copied = self.ledger.open(key), Future()
        self.tiers.move(target, State.CHANGING)
        # Whatever is asked of the target meanwhile comes after.
        answer = self.tiers.run(target, self._be_a_copy(source, target, _wait(copied)))
        copying = self.tiers.run(source, self._copy(source, target, worker))
        copying.add_done_callback(lambda done: _pass_on(done, copied))
        copied.add_done_callback(lambda _: self.tiers.operations.go_on(target))
        return answer

    def depart(self, source: Session, path: str) -> Future:
        """Have a copy of ``source`` written to ``path``, for `adopt` of another engine. Resolves to what that is told."""
        return self.tiers.run(source, self._depart(source, path))

    def adopt(self, key: SessionKey, written: dict[str, Any]) -> Future:
        """Make a session ``key``, which there is not yet, of the copy that another engine has written; `fork` does it in one.

        Raises RequestError where none may be made. The file is removed, whatever becomes of it.
        """
        try:
            target = self.ledger.open(key)
        except Exception:
            Path(written["path"]).unlink(missing_ok=True)
            raise
        self.tiers.move(target, State.CHANGING)
        source = Session(SessionKey(key.tenant, written["source"]), 0, 0, uid=written["uid"])  # for the audit log
        return self.tiers.run(target, self._be_a_copy(source, target, self._read_copy(target, written)))

    def freeze(self, session: Session, why: str | None) -> Future:
        """Let it learn no request that has not begun, or, with None, learn again."""
        return self.tiers.run(session, self._freeze(session, why))

    def _remove(self, session: Session, event: str) -> Steps:
        found = yield from self._write(session, lambda store: _wait(store.replace(session.key, session.uid)))
        try:
            receipt = yield from self._receipt(session, found or {"files": [], "files_left": [], "database_wiped": True})
            yield from self.audit.durable(event, session, **receipt)
        finally:  # it has been written
            if session.requests:  # it was named again meanwhile: they meet another one
                session.uid, session.created = secrets.token_hex(16), time.time()
                self.tiers.become(session, {}, None)
                session.life.begin_again()
                self.audit.created(session)
            else:
                self.tiers.forget(session, gone=True)
        return receipt

    def _receipt(self, session: Session, found: dict[str, Any]) -> Steps:
        """What is removed with the session; ``found``: in the state dir."""
        digest, counts = None, {"version": session.version, "tokens_learned": session.tokens_learned}
        if session.version and session.life.in_memory:

            def taken(report: FileReport) -> None:  # what it was sent may still be being learned
                counts.update(version=report.version, tokens_learned=session.tokens_learned)

            report = yield self.tiers.orders.ask(FileOrder("digest", session.adapter), taken)
            digest = report.digest or None
        elif session.version and found["files"]:
            digest = found["files"][-1]["digest"]
        return {**counts, "digest": digest, "bytes": sum(file["bytes"] for file in found["files"]), **found}

    def _reset(self, session: Session, keep: Callable[[], dict[str, Any]]) -> Steps:
        _need_idle(session)
        self.ledger.claim(session)  # it gets a row
        uid, state = secrets.token_hex(16), keep()
        row = Row(uid, session.key, session.created, time.time(), state)
        yield from self._write(session, lambda store: _wait(store.replace(session.key, session.uid, row)))
        try:
            yield from self.audit.durable("reset", session, version=session.version, new_uid=uid)
        finally:
            session.uid = session.noted = uid
            self.tiers.become(session, state, None)
        return session

    def _go_back(self, session: Session, version: int, worker: Worker) -> Steps:
        if session.open:
            raise RequestError(f"session {session.key.name!r} is still learning what it was sent; try again in a moment", 409)
        _need_idle(session)
        self.ledger.claim(session)
        if self.store is None:
            yield from self.tiers.bring_in(session)
        found = yield from self._write(session, lambda store: self._back_to(store, session, version))
        before = session.version
        if found is not None:
            self.tiers.become(session, {**found.state, **session.standing()}, found)
            yield from self.audit.durable("rollback", session, version=before, to_version=version)
            return session
        try:
            kept = worker("ttt_session", session.adapter)["versions"]
            if version not in kept:
                listed = ", ".join(map(str, self.tiers.versions(session, kept))) or "none"
                raise RequestError(f"session {session.key.name!r} has no version {version}; kept are: {listed}", 409, "version")
            newest = None
            if self.tiers.saves is not None:
                newest = yield from self._written(session, self.tiers.saves.earlier(session, version))
        except Exception:
            self._unchanged(session)
            raise
        here = False
        try:
            here = session.life.in_memory and worker("ttt_roll_back", session.adapter, version) is None
        finally:
            if here:
                session.back_to(version, newest)
                self.tiers.changes(session)
            if here or newest is None:
                self._unchanged(session)
            else:  # it was not in memory; or the guard has returned it further, or the worker has given that version up
                self.tiers.become(session, {**newest.state, **session.standing()}, newest)
        if not here and newest is None:
            raise RequestError(f"session {session.key.name!r} has just been returned further; look at it, and try again", 409)
        yield from self.audit.durable("rollback", session, version=before, to_version=version)
        return session

    def _back_to(self, store: Store, session: Session, version: int) -> Steps:
        """Make a recorded version the newest, if its file is whole: afterwards it is all that there is. Returns it, or None
        where it is not recorded."""
        if (recorded := store.version(session.uid, version)) is not None:
            path = str(store.folder.path(recorded.file))
            report: FileReport = yield self.tiers.orders.ask(FileOrder("check", session.adapter, path, recorded.checksum))
            why = report.error if report.outcome != "done" else ""
            if why or report.version != version:
                why = why or f"it holds version {report.version}"
                message = f"session {session.key.name!r} stays as it was: version {version} could not be read: {why}"
                raise RequestError(message, 507)
        return (yield store.back_to(session.row(), version, session.standing()))

    def _copy(self, source: Session, target: Session, worker: Worker) -> Steps:
        _need_idle(source)
        for session in (source, target):
            yield from self.tiers.bring_in(session)
        if source.open or source.requests:
            raise RequestError(f"session {source.key.name!r} has been sent something meanwhile; try again", 409)
        if worker("ttt_copy", source.adapter, target.adapter) != source.version:
            raise RequestError(f"session {source.key.name!r} is going back to an earlier version; try again", 409)
        target.copy(source)

    def _depart(self, source: Session, path: str) -> Steps:
        _need_idle(source)
        yield from self.tiers.bring_in(source)
        yield from self.tiers.exports.turn()
        try:
            if source.open or source.requests:
                raise RequestError(f"session {source.key.name!r} has been sent something meanwhile; try again", 409)
            taken: list[dict[str, Any]] = []
            # One that has learned nothing may be a name alone, which the worker does not know.
            order = FileOrder("save", source.adapter, path, version=None if source.version else 0)
            report: FileReport = yield self.tiers.orders.ask(order, lambda _: taken.append(source.to_state()))
        finally:
            self.tiers.exports.end_turn()
        if report.outcome != "done":
            raise RequestError(f"session {source.key.name!r} could not be copied: {report.error}", 507)
        if report.version != taken[0]["version"]:
            Path(path).unlink(missing_ok=True)
            raise RequestError(f"session {source.key.name!r} is going back to an earlier version; try again", 409)
        return {
            "source": source.key.name, "uid": source.uid, "path": path, "checksum": report.checksum, "state": taken[0],
        }  # fmt: skip

    def _read_copy(self, target: Session, written: dict[str, Any]) -> Steps:
        try:
            yield from self.tiers.bring_in(target)
            order = FileOrder("load", target.adapter, written["path"], written["checksum"])
            report: FileReport = yield self.tiers.orders.ask(order)
            if report.outcome != "done":
                raise RequestError(f"the copy of session {written['source']!r} could not be read: {report.error}", 507)
            target.from_state(written["state"])
            target.life.learned()
        finally:
            Path(written["path"]).unlink(missing_ok=True)

    def _be_a_copy(self, source: Session, target: Session, copied: Steps) -> Steps:
        try:
            yield from copied
            if self.tiers.saves is not None:
                yield from self.tiers.saves.asked(target)
        except Exception:
            if target.requests:
                self.tiers.become(target, {}, None)
            else:
                self.audit.note("delete", target, why="the fork failed")
                self.tiers.forget(target, gone=True)
            raise
        self._unchanged(target)
        name, uid = target.key.name, target.uid
        yield from self.audit.durable("fork", source, version=target.version, to_session=name, to_uid=uid)
        return target

    def _freeze(self, session: Session, why: str | None) -> Steps:
        self.ledger.claim(session)
        before = session.frozen
        if why == before:
            return session
        if self.store is not None:
            row, now = session.row(), session.life.generation
            yield from self._written(session, _wait(self.store.record(replace(row, state={**row.state, "frozen": why}))))
            session.life.recorded_at = max(session.life.recorded_at, now)
        if session.frozen == before:  # else the guard has frozen it meanwhile
            session.frozen = why
        yield from self.audit.durable("freeze" if why else "unfreeze", session, version=session.version)
        return session

    def _write(self, session: Session, write: Callable[[Store], Steps]) -> Steps:
        """The session is changing from here on; returns what was written. Where it cannot be, the session is as it was."""
        _need_idle(session)
        self.tiers.move(session, State.CHANGING_IN_MEMORY if session.life.in_memory else State.CHANGING)
        if self.store is None:
            return None
        try:
            return (yield from self._written(session, write(self.store)))
        except Exception:
            self._unchanged(session)
            raise

    @staticmethod
    def _written(session: Session, steps: Steps) -> Steps:
        """What ``steps`` return; what they cannot write is the answer."""
        try:
            return (yield from steps)
        except StoreError as error:
            how = "is here as it was, and may have changed on disk" if error.in_doubt else "stays as it was"
            message = f"session {session.key.name!r} {how}: the state dir cannot be written: {error}"
            raise answer_of(error, message) from None

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


def _wait(future: Future) -> Steps:
    return (yield future)


def _pass_on(done: Future, to: Future) -> None:
    if (error := done.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(None)
