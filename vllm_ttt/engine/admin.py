"""The admin operations, run by the engine core between two steps. Answers are plain dicts, for msgpack."""

from __future__ import annotations

from typing import Any

from vllm_ttt.engine.ledger import Session
from vllm_ttt.types import SessionKey


def admin(engine: Any, op: str, tenant: str, name: str, version: int | None = None) -> dict[str, Any]:
    """Answer one call of the front end.

    Args:
        engine: vLLM's EngineCore.
        op: "list", "config", "get", "freeze", "unfreeze", "rollback", "reset" or "delete".
        tenant, name: the session's key; ``name`` is "" for the first two.
        version: what "rollback" returns to.
    Returns:
        ``{"ok": True, "result": ...}`` or ``{"ok": False, "status": 4xx, "message": ...}``
    """
    scheduler = engine.scheduler
    if op == "list":
        sessions = sorted(scheduler.ttt_ledger.of_tenant(tenant), key=lambda s: -s.last_used)
        return _ok({"sessions": [_detail(engine, s, losses=False) for s in sessions]})
    if op == "config":
        return _ok(scheduler.ttt_config.model_dump(mode="json"))
    session = scheduler.ttt_ledger.find(SessionKey(tenant, name))
    if session is None:
        return {
            "ok": False,
            "status": 404,
            "message": f"there is no session {name!r}; a request that names it makes it",
        }
    if op == "get":
        return _ok(_detail(engine, session, losses=True))
    if op in ("freeze", "unfreeze"):
        session.frozen = "asked for" if op == "freeze" else None
        return _ok(_detail(engine, session, losses=True))
    if session.requests:
        message = f"session {name!r} has {len(session.requests)} requests in the engine; wait for them, or abort them"
        return {"ok": False, "status": 409, "message": message}
    if op == "rollback":
        (kept,) = engine.model_executor.collective_rpc("ttt_roll_back", args=(session.adapter, version))
        if kept is not None:
            message = f"version {version} of session {name!r} is not kept; it can return to {', '.join(map(str, kept))}"
            return {"ok": False, "status": 404, "message": message}
        assert version is not None
        session.version = version
        return _ok(_detail(engine, session, losses=True))
    engine.model_executor.collective_rpc("ttt_drop", args=(session.adapter,))
    scheduler.ttt_ledger.remove(session)
    if op == "reset":
        fresh = scheduler.ttt_ledger.open(session.key)
        fresh.created, fresh.allowance = session.created, session.allowance
        return _ok(_detail(engine, fresh, losses=True))
    return _ok({"session_id": name, "deleted": True})


def _ok(result: Any) -> dict[str, Any]:
    return {"ok": True, "result": result}


def _detail(engine: Any, session: Session, losses: bool) -> dict[str, Any]:
    (worker,) = engine.model_executor.collective_rpc("ttt_session", args=(session.adapter,))
    return {**session.summary(), **worker, **({"losses": list(session.losses)} if losses else {})}
