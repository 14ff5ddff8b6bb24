"""The routes under /v1/ttt. vLLM's --api-key guards them; a key sees its own sessions only."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import models, refusals, tenants
from vllm_ttt.types import SESSION_ID_RULE, check_session_id

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": models.ErrorResponse, "description": "Not a session id"},
    404: {"model": models.ErrorResponse, "description": "No such session under this API key"},
}
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": models.ErrorResponse, "description": "The session has open requests"}
}

#: ``:path`` so that an id with a slash is refused as an id; FastAPI would otherwise answer 404 as for an unknown route.
_SESSION = "/sessions/{session_id:path}"
SessionId = Annotated[str, Path(description=f"The session as the client calls it: {SESSION_ID_RULE}")]

router = APIRouter(prefix="/v1/ttt", tags=["test-time training"])


@router.get("/sessions", response_model=models.Sessions)
async def list_sessions(request: Request) -> Any:
    """The sessions of this API key."""
    return await _ask(request, "list")


@router.get(_SESSION, response_model=models.Session, responses=_ERRORS)
async def get_session(session_id: SessionId, request: Request) -> Any:
    """One session: how far it has come, and the losses of what it sent recently."""
    return await _ask(request, "get", session_id)


@router.post(_SESSION + "/reset", response_model=models.Session, responses=_ERRORS | _CONFLICT)
async def reset_session(session_id: SessionId, request: Request) -> Any:
    """Forget what the session learned; its next answer is the base model's."""
    return await _ask(request, "reset", session_id)


@router.post(_SESSION + "/rollback", response_model=models.Session, responses=_ERRORS | _CONFLICT)
async def roll_back_session(session_id: SessionId, to: models.Rollback, request: Request) -> Any:
    """Return to an earlier version, one of the session's `versions`; what it learned after that is forgotten."""
    return await _ask(request, "rollback", session_id, to.version)


@router.post(_SESSION + "/freeze", response_model=models.Session, responses=_ERRORS)
async def freeze_session(session_id: SessionId, request: Request) -> Any:
    """Serve the session as it is and learn no more, from its next request on."""
    return await _ask(request, "freeze", session_id)


@router.post(_SESSION + "/unfreeze", response_model=models.Session, responses=_ERRORS)
async def unfreeze_session(session_id: SessionId, request: Request) -> Any:
    """Learn again, whoever froze the session."""
    return await _ask(request, "unfreeze", session_id)


@router.delete(_SESSION, response_model=models.Deleted, responses=_ERRORS | _CONFLICT)
async def delete_session(session_id: SessionId, request: Request) -> Any:
    """Forget the session altogether."""
    await _ask(request, "delete", session_id)
    return models.Deleted(session_id=session_id)


@router.get("/config")
async def get_config(request: Request) -> dict[str, Any]:
    """The configuration that is in force, defaults filled in."""
    return await _ask(request, "config")


async def _ask(request: Request, op: str, session_id: str | None = None, *arguments: Any) -> Any:
    """What ``EngineCore.ttt_admin`` answers.

    Args:
        op, arguments: of vllm_ttt.engine.admin.
        session_id: as it stands in the path; None for list and config.
    Raises:
        Exception: one of vLLM's, for the status that is due: 400 for a bad id, else what the engine says.
    """
    try:
        name = "" if session_id is None else check_session_id(session_id)
        tenant = tenants.tenant_of(request)
        core = request.app.state.ttt_engine.engine_core
        answer = await core.call_utility_async("ttt_admin", op, tenant, name, *arguments)
        if not answer["ok"]:
            raise RequestError(answer["message"], status=answer["status"])
    except RequestError as error:
        raise refusals.to_vllm(error) from None
    return answer["result"]
