"""Which session a request names, and whether it may have one."""

from __future__ import annotations

from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import receipt, tenants
from vllm_ttt.types import Knobs, SessionKey, check_session_id

HEADER = "X-Session-ID"


def check_request(request: Any, raw_request: Any | None) -> None:
    """Raise RequestError (400) where a completion, chat or responses request cannot be served as it asks.

    A session is named by ``session_id`` in the body, the header or ``vllm_xargs["session_id"]``. An empty name is given, and
    wrong. Whoever names it twice names the same: a gateway that sets the header decides, and no body says otherwise.
    """
    xargs = getattr(request, "vllm_xargs", None) or {}
    Knobs.parse(xargs)
    given = [("session_id", request.session_id), *_headers(raw_request), ("vllm_xargs.session_id", xargs.get("session_id"))]
    if _the_same(given) and getattr(request, "use_beam_search", False):
        message = "a session cannot learn with beam search; leave out use_beam_search or the session"
        raise RequestError(message, param="use_beam_search")


def check_header(raw_request: Any | None) -> None:
    """Raise RequestError (400) where the header names a session badly, or two."""
    _the_same(_headers(raw_request))


def _headers(raw_request: Any | None) -> list[tuple[str, Any]]:
    return [] if raw_request is None else [(HEADER, name) for name in raw_request.headers.getlist(HEADER)]


def _the_same(given: list[tuple[str, Any]]) -> bool:
    """Whether a session is named. Raises RequestError (400) where a name is none, or two differ."""
    names = [(param, check_session_id(name, param)) for param, name in given if name is not None]
    for param, name in names[1:]:
        if name != names[0][1]:
            first = f"{names[0][0]} {names[0][1]!r}"
            raise RequestError(
                f"{first} and {param} {name!r} name two sessions; send one of them, or the same twice", param=param
            )
    return bool(names)


def check_prompt(prompt: Any) -> None:
    """Raise RequestError (400) where a session's prompt cannot be learned.

    Args:
        prompt: as vLLM's renderer made it (vllm/inputs/engine.py): a dict with ``type``; or what Python callers pass.
    """
    kind = prompt.get("type") if isinstance(prompt, dict) else None
    embeds = prompt.get("prompt_embeds") if isinstance(prompt, dict) else getattr(prompt, "prompt_embeds", None)
    if kind == "embeds" or embeds is not None:
        raise RequestError("a session learns tokens and prompt_embeds have none; send text or token ids", param="prompt_embeds")
    if hasattr(prompt, "__anext__"):
        raise RequestError("a session cannot learn from a streamed prompt; send the prompt in one piece", param="prompt")


def scoped(name: str, raw_request: Any | None) -> str:
    """``SessionKey.wire()`` of a checked name, or of one that is scoped already; noted for the answer.

    Raises RequestError (401) where the server has API keys and the request has none of them.
    """
    # A checked name never has a slash, a scoped one always.
    key = SessionKey.from_wire(name) if "/" in name else SessionKey(tenants.tenant_of(raw_request), name)
    note = receipt.current.get()
    if note is not None:
        note.session = key.name
    return key.wire()
