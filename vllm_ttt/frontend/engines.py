"""The engine cores behind vLLM's client, which may be several: which of them is asked, and what their answers are together."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

from vllm_ttt import placement, plugin
from vllm_ttt.errors import AGAIN, RequestError
from vllm_ttt.types import SessionKey

#: Operations that each engine answers for its own sessions.
_LISTS = ("list", "list_all")
#: Those that need no session, or read what was recorded of one, whoever has it.
_ANYWHERE = (*_LISTS, "config", "metrics", "get", "claim")
#: Of a state dir that several servers share: seconds for which a session is waited for that another one has, and from one
#: question to the next.
HANDOVER, _PAUSE = 5.0, 0.25


def count(core: Any) -> int:
    """How many engine cores ``core``, vLLM's client of them, has."""
    return len(getattr(core, "core_engines", ())) or 1


def rank_of(core: Any, wire: str) -> int | None:
    """What vLLM calls ``data_parallel_rank``: the engine of a session; None where there is but one."""
    return None if (engines := count(core)) == 1 else placement.owner(wire, engines)


def shares(vllm_config: Any) -> bool:
    """Whether other servers use the state dir too."""
    config = plugin.config_of(vllm_config) if vllm_config is not None else None
    return config is not None and config.sessions.shared


async def claim(core: Any, tenant: str, name: str) -> None:
    """Have the session here, and not in another of the servers that share the state dir. Raises RequestError (409, 503)."""
    deadline = time.monotonic() + HANDOVER
    while not (answer := await ask_one(core, 0, "claim", tenant, name))["ok"] or not answer["result"]["held"]:
        if not answer["ok"]:
            raise refused(answer)
        if time.monotonic() > deadline:
            message = (
                f"session {name!r} is in another server, which still uses it or has just died; send this again in {AGAIN} s, "
                "and let the router send all requests of a session to one server"
            )
            raise RequestError(message, 409, retry_after=AGAIN)
        await asyncio.sleep(_PAUSE)


async def claim_for(core: Any, op: str, tenant: str, name: str, *argument: Any) -> None:
    """`claim` what an operation is about to change."""
    if op in _ANYWHERE:
        return
    await claim(core, tenant, name)
    if op == "fork":
        await claim(core, tenant, argument[0])


def refused(answer: dict[str, Any]) -> RequestError:
    """What an engine has refused, as an error."""
    return RequestError(answer["message"], answer["status"], retry_after=answer.get("retry_after"))


async def ask(core: Any, op: str, tenant: str, name: str, *argument: Any) -> dict[str, Any]:
    """What the engine of the session answers, as the one engine would that a server has without --data-parallel-size.

    Args:
        core: vLLM's client (``AsyncLLM.engine_core``).
        op, tenant, name, argument: as `vllm_ttt.engine.admin.admin` takes them.
    """
    engines = count(core)
    if op in _LISTS and engines > 1:
        page: dict[str, Any] = argument[0]
        answers = await core.call_utility_all_async("ttt_admin", op, tenant, name, {**page, "places": True})
        return merged(answers, page["limit"])
    right = placement.owner(SessionKey(tenant, name).wire(), engines) if name else 0
    if op != "fork" or (target := placement.owner(SessionKey(tenant, argument[0]).wire(), engines)) == right:
        return await ask_one(core, right, op, tenant, name, *argument)
    written = await ask_one(core, right, "depart", tenant, name)
    return await ask_one(core, target, "adopt", tenant, argument[0], written["result"]) if written["ok"] else written


def merged(answers: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """One page of the lists of several engines: each has given its own first sessions, with their places."""
    if (refused := next((answer for answer in answers if not answer["ok"]), None)) is not None:
        return refused
    pages = [answer["result"] for answer in answers]
    found = [pair for page in pages for pair in zip(page["places"], page["sessions"], strict=True)]
    found.sort(key=lambda pair: _decoded(pair[0]), reverse=True)
    more = len(found) > limit or any(page["next"] is not None for page in pages)
    found = found[:limit]
    result = {"sessions": [session for _, session in found], "next": found[-1][0] if more else None}
    return {"ok": True, "result": result}


def _decoded(place: str) -> list[Any]:
    return json.loads(base64.urlsafe_b64decode(place + "=" * (-len(place) % 4)))


async def ask_one(core: Any, engine: int, op: str, tenant: str = "", name: str = "", *argument: Any) -> dict[str, Any]:
    """What the engine of that number answers. vLLM's client has no public way to ask one of several."""
    call = "ttt_admin", op, tenant, name, *argument
    if count(core) == 1:
        return await core.call_utility_async(*call)
    return await core._call_utility_async(*call, engine=core.core_engines[engine])
