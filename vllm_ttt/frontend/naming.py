"""Which session a request names, and whether it may have one."""

from __future__ import annotations

from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import receipt, tenants
from vllm_ttt.types import Knobs, SessionKey, check_session_id

HEADER = "X-Session-ID"


def check_request(request: Any, raw_request: Any | None) -> None:
    """Raise RequestError (400) where a completion, chat or responses request cannot be served as it asks.

    The session is the first that is given of ``session_id`` in the body, the header and ``vllm_xargs["session_id"]``,
    which is vLLM's order. An empty name is given, and wrong.
    """
    xargs = getattr(request, "vllm_xargs", None) or {}
    Knobs.parse(xargs)
    header = raw_request.headers.get(HEADER) if raw_request is not None else None
    given = {"session_id": request.session_id, HEADER: header, "vllm_xargs.session_id": xargs.get("session_id")}
    for param, name in given.items():
        if name is not None:
            check_session_id(name, param)
            if getattr(request, "use_beam_search", False):
                raise RequestError(
                    "a session cannot learn with beam search; leave out use_beam_search or the session",
                    param="use_beam_search",
                )
            return


def check_header(raw_request: Any | None) -> None:
    """Raise RequestError (400) where the header names a session badly."""
    header = raw_request.headers.get(HEADER) if raw_request is not None else None
    if header is not None:
        check_session_id(header, HEADER)


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
