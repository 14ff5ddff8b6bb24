"""The routes under /v1/ttt. vLLM's --api-key guards them; a key sees its own sessions only."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import adapter, engines, models, refusals, tenants
from vllm_ttt.frontend.origins import check_origin
from vllm_ttt.types import SESSION_ID_RULE, check_session_id


def _refusals(why: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": models.ErrorResponse, "description": text} for status, text in why.items()}


#: Of every route.
_ANY = _refusals(
    {
        422: "Not what the schema allows",
        503: "The state dir cannot be read, or another server is writing to it; the audit log cannot be written; there is no "
        "room to bring the session in; or the server is shutting down",
    }
)
#: Of those that name a session; that have it copied or written; that change it; that give it a place of its key.
_NAMED = _refusals({400: "Not a session id", 404: "No such session under this API key"})
_WRITTEN = _refusals(
    {
        409: "The session has requests in the engine, or another server has it; or there is no such version, or such a session "
        "already; or the server has no state dir to save it in",
        507: "It cannot be written, or the session's file not be read; the session is as it was, unless the message says that "
        "this was done",
    }
)
_CHANGED = _WRITTEN | _refusals({403: "A page of another site asks a server without API keys"})
_PLACED = _CHANGED | _refusals({429: "There is no room for another session"})

#: Settings that name places on the server.
_PATHS = {"sessions": ("state_dir", "admin_key_file", "audit_log", "key_file"), "guard": ("probe",)}
#: ``:path`` so that an id with a slash is refused as an id; FastAPI would otherwise answer 404 as for an unknown route.
_SESSION = "/sessions/{session_id:path}"
SessionId = Annotated[
    str,
    Path(
        description=f"The session as the client calls it: {SESSION_ID_RULE}",
        json_schema_extra=models.SESSION_ID_SCHEMA,
    ),
]


class _Route(APIRoute):
    """Errors in OpenAI's shape, as vLLM's handlers make them.

    They make a 400 of what the schema forbids, where FastAPI and its documents say 422. Of a body that cannot be read at all
    Starlette's exception tells, and they take FastAPI's alone.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                check_origin(request)
                return await handle(request)
            except RequestError as error:
                if error.retry_after is not None:
                    headers = {"Retry-After": str(error.retry_after)}
                    return JSONResponse(refusals.to_openai(error), error.status, headers)
                raise refusals.to_vllm(error) from None
            except RequestValidationError as error:
                raise refusals.to_vllm(RequestError(refusals.of_schema(error.errors()), status=422)) from None
            except StarletteHTTPException as error:
                raise HTTPException(error.status_code, error.detail, error.headers) from None

        return answer


router = APIRouter(prefix="/v1/ttt", tags=["test-time training"], route_class=_Route, responses=_ANY)


@router.get(
    "/sessions",
    response_model=models.Sessions,
    responses=_refusals(
        {
            400: "`after` is no page's `next`",
            403: "`all` without the admin key",
            429: "This API key waits for as many lists as it may",
        }
    ),
)
async def list_sessions(
    request: Request,
    all: bool = False,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 500,
    after: Annotated[str | None, Query(max_length=1000)] = None,
) -> Any:
    """The sessions of this API key; with `all`, for the admin key only, those of every key, each with its tenant.

    Most recently used first, `limit` of them; where there are more, `next` is what to send as `after` for the next page.
    """
    if all and not tenants.is_admin(request):
        error = RequestError("only the key of sessions.admin_key_file may list the sessions of all keys", status=403)
        raise refusals.to_vllm(error)
    return await _ask(request, "list_all" if all else "list", None, {"limit": limit, "after": after})


# Before the route of the session itself, whose path would take its end for a part of the id.
@router.get(
    _SESSION + "/adapter",
    response_class=StreamingResponse,
    responses={
        **_NAMED,
        **_WRITTEN,
        **_refusals({429: "This API key waits for as many adapters as it may"}),
        200: {"content": {"application/octet-stream": {}, "application/x-tar": {}}},
    },
)
async def get_adapter(
    session_id: SessionId, request: Request, format: Literal["safetensors", "tar"] = "safetensors"
) -> StreamingResponse:
    """The delta as a PEFT adapter, and where it comes from: one .safetensors with both texts in its metadata, or a tar."""
    with ExitStack() as held:
        held.enter_context(request.app.state.ttt_adapters.take(tenants.tenant_of(request)))
        written = await _ask(request, "export", session_id)
        # In a thread: what is sealed is read and decrypted as a whole, and others are answered meanwhile.
        found = await run_in_threadpool(
            adapter.answer, written["path"], session_id, format, written["provenance"], written["key"]
        )
        found.held.push(held.pop_all())
    return found


@router.get(_SESSION, response_model=models.SessionDetail, responses=_NAMED)
async def get_session(session_id: SessionId, request: Request) -> Any:
    """One session: how far it has come, and the losses of what it sent recently."""
    return await _ask(request, "get", session_id)


@router.post(_SESSION + "/reset", response_model=models.SessionDetail, responses=_NAMED | _PLACED)
async def reset_session(session_id: SessionId, request: Request) -> Any:
    """Forget what the session learned; its next answer is the base model's. Answered when the state dir has it."""
    return await _ask(request, "reset", session_id)


@router.delete(_SESSION, response_model=models.Deleted, responses=_NAMED | _CHANGED)
async def delete_session(session_id: SessionId, request: Request) -> Any:
    """Forget the session altogether. Answered when nothing of it is left in the state dir, with a receipt."""
    return await _ask(request, "delete", session_id)


@router.post(_SESSION + "/freeze", response_model=models.SessionDetail, responses=_NAMED | _PLACED)
async def freeze_session(session_id: SessionId, request: Request) -> Any:
    """Serve with the delta as it is, and learn no request that has not begun. Answered when the state dir has it."""
    return await _ask(request, "freeze", session_id)


@router.post(_SESSION + "/unfreeze", response_model=models.SessionDetail, responses=_NAMED | _PLACED)
async def unfreeze_session(session_id: SessionId, request: Request) -> Any:
    """Learn again. Answered when the state dir has it."""
    return await _ask(request, "unfreeze", session_id)


@router.post(_SESSION + "/save", response_model=models.SessionDetail, responses=_NAMED | _CHANGED)
async def save_session(session_id: SessionId, request: Request) -> Any:
    """Write what the session has learned to the state dir; answered when it is on the disk, as `saved_version`."""
    return await _ask(request, "save", session_id)


@router.post(_SESSION + "/rollback", response_model=models.SessionDetail, responses=_NAMED | _PLACED)
async def roll_back_session(session_id: SessionId, body: models.Rollback, request: Request) -> Any:
    """Return to an earlier version, one of the session's `versions`; what it learned after that is forgotten."""
    return await _ask(request, "rollback", session_id, body.version)


@router.post(_SESSION + "/fork", response_model=models.SessionDetail, responses=_NAMED | _PLACED)
async def fork_session(session_id: SessionId, body: models.Fork, request: Request) -> Any:
    """Make another session that begins where this one is. The answer is about the new one, when the state dir has it."""
    return await _ask(request, "fork", session_id, _checked(body.to, "to"))


@router.get("/config")
async def get_config(request: Request) -> dict[str, Any]:
    """The configuration that is in force, defaults filled in. Paths are the operator's: others see that one is set."""
    config = await _ask(request, "config")
    if tenants.is_admin(request):
        return config
    hidden = {section: {key: "set" for key in keys if config.get(section, {}).get(key)} for section, keys in _PATHS.items()}
    return {section: values | hidden.get(section, {}) for section, values in config.items()}


def _checked(name: str, param: str) -> str:
    try:
        return check_session_id(name, param)
    except RequestError as error:
        raise refusals.to_vllm(error) from None


async def _ask(request: Request, op: str, session_id: str | None = None, *argument: Any) -> Any:
    """What ``EngineCore.ttt_admin`` answers, in the engine that has the session.

    Args:
        op: a key of vllm_ttt.engine.admin.OPERATIONS.
        session_id: as it stands in the path; None for lists and config.
        argument: what the operation needs besides, if anything.
    Raises:
        RequestError: 400 for a bad id, else what the engine says; `_Route` answers with it.
    """
    name = "" if session_id is None else check_session_id(session_id)
    tenant, engine = tenants.tenant_of(request), request.app.state.ttt_engine
    try:
        if engines.shares(getattr(engine, "vllm_config", None)):
            await engines.claim_for(engine.engine_core, op, tenant, name, *argument)
        answer = await engines.ask(engine.engine_core, op, tenant, name, *argument)
    except Exception as error:
        if isinstance(error, RequestError) or "shutting down" not in str(error):
            raise
        raise RequestError("the server is shutting down; what it has learned is being saved", status=503) from None
    if not answer["ok"]:
        raise engines.refused(answer)
    return answer["result"]
