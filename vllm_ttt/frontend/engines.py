"""The engine cores behind vLLM's client, which may be several: which of them is asked, and what their answers are together."""

from __future__ import annotations

import base64
import json
from typing import Any

from vllm_ttt import placement
from vllm_ttt.types import SessionKey

#: Operations that each engine answers for its own sessions.
_LISTS = ("list", "list_all")


def count(core: Any) -> int:
    """How many engine cores ``core``, vLLM's client of them, has."""
    return len(getattr(core, "core_engines", ())) or 1


def rank_of(core: Any, wire: str) -> int | None:
    """What vLLM calls ``data_parallel_rank``: the engine of a session; None where there is but one."""
    return None if (engines := count(core)) == 1 else placement.owner(wire, engines)


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
