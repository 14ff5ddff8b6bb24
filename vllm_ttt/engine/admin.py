"""The admin operations, run by the engine core between two steps. Answers are plain dicts, for msgpack.

What needs a file or a session that is on disk is a Future, which vLLM answers when it resolves: decoding goes on meanwhile.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vllm_ttt import plugin
from vllm_ttt.engine import counts
from vllm_ttt.engine.ledger import ASKED_FOR, Ledger, Session
from vllm_ttt.engine.life.operations import Steps
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.storage import lists
from vllm_ttt.engine.storage.identity import identity
from vllm_ttt.errors import RequestError
from vllm_ttt.types import SessionKey, check_session_id
from vllm_ttt.vault import KEY


def admin(engine: Any, op: str, tenant: str, name: str, argument: Any = None) -> Any:
    """Answer one call of the front end.

    Args:
        engine: vLLM's EngineCore.
        op: a key of ``OPERATIONS``.
        tenant, name: the session's key; ``name`` is "" for list, list_all, config and metrics.
        argument: rollback: the version; fork: the new name; list, list_all: ``{"limit": int, "after": str or None}``, or None;
            adopt: what depart has answered.
    Returns:
        ``{"ok": True, "result": ...}`` or ``{"ok": False, "status": 4xx or 5xx, "message": ...}``, or a Future of it.
    """
    try:
        if op in _AUDITED:
            engine.scheduler.ttt_tiers.audit.check()
        answer = OPERATIONS[op](Admin(engine), SessionKey(tenant, name), argument)
    except RequestError as error:
        return _refusal(error)
    if not isinstance(answer, Future):
        return {"ok": True, "result": answer}
    return _then(answer, lambda result: {"ok": True, "result": result}, catch=True)


class Admin:
    """One operation; each method raises RequestError, or returns what the route answers, or a Future of that."""

    def __init__(self, engine: Any):
        self.scheduler = engine.scheduler
        self.rpc: Callable[..., list[Any]] = engine.model_executor.collective_rpc
        #: all ranks are asked, and answer; this one's answer counts. vLLM's executor of one process has no number for it
        self.leader: int = getattr(engine.model_executor, "output_rank", None) or 0
        self.ledger: Ledger = self.scheduler.ttt_ledger
        self.tiers: Tiers = self.scheduler.ttt_tiers
        self.store = self.ledger.store

    def config(self, *_: Any) -> dict[str, Any]:
        config = plugin.config_of(self.scheduler.vllm_config)  # the server's, not this engine's part of it
        assert config is not None
        return config.model_dump(mode="json")

    def metrics(self, *_: Any) -> dict[str, Any]:
        return counts.snapshot(self.scheduler, self._worker("ttt_metrics"))

    def list(self, key: SessionKey, page: Any) -> Any:
        return self._list(key.tenant, page)

    def list_all(self, _: SessionKey, page: Any) -> Any:
        return self._list(None, page)

    def get(self, key: SessionKey, _: Any) -> dict[str, Any]:
        return self._detail(self._find(key, self.ledger.peek))

    def reset(self, key: SessionKey, _: Any) -> Future:
        session = self._find(key)

        def keep() -> dict[str, Any]:
            state: dict[str, Any] = {"allowance": session.allowance.to_state()}
            return {**state, "frozen": ASKED_FOR} if session.frozen == ASKED_FOR else state  # the guard's goes with the delta

        return _then(self.tiers.owner.reset(session, keep), self._detail)

    def delete(self, key: SessionKey, _: Any) -> Future:
        removed = self.tiers.owner.remove(self._find(key))
        return _then(removed, lambda receipt: {"session_id": key.name, "deleted": True, **receipt, "time": time.time()})

    def freeze(self, key: SessionKey, _: Any) -> Future:
        return self._set_frozen(key, ASKED_FOR)

    def unfreeze(self, key: SessionKey, _: Any) -> Future:
        return self._set_frozen(key, None)

    def save(self, key: SessionKey, _: Any) -> Future:
        if self.tiers.saves is None:
            raise RequestError("save needs a state dir; start the server with --ttt-state-dir", 409)
        session = self._find(key)
        return _then(self.tiers.save(session), lambda _: self._detail(session))

    def rollback(self, key: SessionKey, version: Any) -> Future:
        return _then(self.tiers.owner.go_back(self._find(key), version, self._worker), self._returned)

    def fork(self, key: SessionKey, to: Any) -> Future:
        source, target = self._find(key), SessionKey(key.tenant, check_session_id(to, "to"))
        if self.ledger.peek(target) is not None:
            raise RequestError(f"there is a session {to!r} already; delete it first", 409, "to")
        return _then(self.tiers.owner.fork(source, target, self._worker), self._detail)

    def depart(self, key: SessionKey, _: Any) -> Future:
        return self.tiers.owner.depart(self._find(key), self._passing())

    def adopt(self, key: SessionKey, written: Any) -> Future:
        try:
            if self.ledger.peek(key) is not None:
                raise RequestError(f"there is a session {key.name!r} already; delete it first", 409, "to")
        except Exception:
            Path(written["path"]).unlink(missing_ok=True)
            raise
        return _then(self.tiers.owner.adopt(key, written), self._detail)

    def claim(self, key: SessionKey, _: Any) -> Any:
        """Whether this server has the session now, of those that share the state dir; it has where there is but one."""
        sharing = self.tiers.sharing
        return {"held": True} if sharing is None else _then(sharing.claim(key), lambda held: {"held": held})

    def _passing(self) -> str:
        """A name for a file on its way to a client or to another engine."""
        folder = self.store.folder.exports if self.store is not None else Path(tempfile.gettempdir())
        return str(folder / f"vllm-ttt-{secrets.token_hex(16)}.safetensors")

    def export(self, key: SessionKey, _: Any) -> Future:
        session, exports = self._find(key), self.tiers.exports
        exports.admit(key.tenant)
        path = self._passing()
        seal = secrets.token_hex(KEY) if self.store is not None and self.store.vault.on else ""

        def write() -> Steps:
            yield from self.tiers.bring_in(session)
            written = yield from exports.write(session, path, self._identity, seal)
            told = {key: written[key] for key in ("version", "bytes")}
            try:
                yield from self.tiers.audit.durable("export", session, **told, digest=written["provenance"]["digest_sha256"])
            except Exception:  # nobody comes for it
                Path(path).unlink(missing_ok=True)
                raise
            return written

        answer = self.tiers.run(session, write())
        answer.add_done_callback(lambda _: exports.answered(key.tenant))
        return answer

    def _identity(self) -> dict[str, Any]:
        """In a thread."""
        if self.store is not None:
            return self.store.identity
        return identity(self.scheduler.vllm_config, self.scheduler.ttt_config)

    def _worker(self, method: str, *args: Any) -> Any:
        return self.rpc(method, args=args)[self.leader]

    def _list(self, tenant: str | None, asked: dict[str, Any] | None) -> Future:
        asked = asked or {}
        limit, after = asked.get("limit", lists.DEFAULT), asked.get("after")
        return self.tiers.lists.ask(tenant, limit, after, self._here, self._describe, bool(asked.get("places")))

    def _here(self, sessions: Iterable[Session]) -> Any:
        adapters = [s.adapter for s in sessions if s.life.in_memory]
        found = self._worker("ttt_sessions", adapters) if adapters else []
        workers = dict(zip(adapters, found, strict=True))
        return [self._describe(s, workers.get(s.adapter)) for s in sessions]

    def _describe(self, session: Session, worker: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._summary(session), **(worker or self._away(session)), "tenant": session.key.tenant}

    def _returned(self, session: Session) -> dict[str, Any]:
        self.tiers.counts.add("rollbacks_total", 1, "request")
        return self._detail(session)

    def _set_frozen(self, key: SessionKey, frozen: str | None) -> Future:
        return _then(self.tiers.owner.freeze(self._find(key), frozen), self._detail)

    def _find(self, key: SessionKey, look: Callable[[SessionKey], Session | None] | None = None) -> Session:
        session = (look or self.ledger.find)(key)
        if session is None:
            raise RequestError(f"there is no session {key.name!r}; a request that names it makes it", 404)
        return session

    def _detail(self, session: Session) -> dict[str, Any]:
        worker = self._worker("ttt_session", session.adapter) if session.life.in_memory else self._away(session)
        versions = self.tiers.versions(session, worker.get("versions", ()))
        return {**self._summary(session), **worker, "losses": list(session.losses), "versions": versions}

    def _summary(self, session: Session) -> dict[str, Any]:
        saved = session.saved
        return {
            **session.summary(),
            "saved_version": saved.version if saved else None,
            "saved": saved.saved if saved else None,
            "error": session.error,
        }

    def _away(self, session: Session) -> dict[str, Any]:
        """What the worker would say of a session that it does not have."""
        size = session.saved.bytes if session.saved else 0
        return {"tier": "disk" if session.saved else "new", "bytes": size, "tokens_pending": 0, "norm": {}}


OPERATIONS: dict[str, Callable[[Admin, SessionKey, Any], Any]] = {
    "config": Admin.config,
    "metrics": Admin.metrics,
    "list": Admin.list,
    "list_all": Admin.list_all,
    "get": Admin.get,
    "reset": Admin.reset,
    "delete": Admin.delete,
    "freeze": Admin.freeze,
    "unfreeze": Admin.unfreeze,
    "save": Admin.save,
    "rollback": Admin.rollback,
    "fork": Admin.fork,
    "depart": Admin.depart,
    "adopt": Admin.adopt,
    "export": Admin.export,
    "claim": Admin.claim,
}

#: What is not done where the audit log cannot tell of it. What is forgotten makes room on a disk that is full: it may be.
_AUDITED = {"freeze", "unfreeze", "rollback", "fork", "depart", "export"}


def _then(future: Future, function: Callable[[Any], Any], catch: bool = False) -> Future:
    """A Future of ``function(result)``, which may be a Future itself. With ``catch``, a RequestError becomes a refusal."""
    answer: Future = Future()

    def done(finished: Future) -> None:
        try:
            result = function(finished.result())
            if isinstance(result, Future):
                result.add_done_callback(finish)
            else:
                answer.set_result(result)
        except RequestError as error:
            answer.set_result(_refusal(error)) if catch else answer.set_exception(error)
        except Exception as error:
            answer.set_exception(error)

    def finish(inner: Future) -> None:
        if (error := inner.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(inner.result())

    future.add_done_callback(done)
    return answer


def _refusal(error: RequestError) -> dict[str, Any]:
    refusal = {"ok": False, "status": error.status, "message": error.message}
    return refusal if error.retry_after is None else {**refusal, "retry_after": error.retry_after}
