"""A server that ends takes nothing new: vLLM goes on listening until what runs has ended and all is saved.

The engine core would end a new request at once, as an empty answer with status 200, and a text could not be turned into tokens
any more. With a state dir that lasts up to the shutdown time-out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend.answer import send_error
from vllm_ttt.frontend.paths import path_of

#: Attribute of vLLM's engine client, once its shutdown has begun (patches/async_llm.py).
MARK = "ttt_draining"
#: What load balancers ask whether to send more.
HEALTH = frozenset({"/health", "/ping"})


class DrainMiddleware:
    """Answers 503 to what is to be done, to all that asks the engine core, and to who asks whether the server is well. What was
    asked before goes on."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and getattr(getattr(scope["app"].state, "engine_client", None), MARK, False):
            path = path_of(scope)
            if scope["method"] == "POST" or path in HEALTH or path.startswith("/v1/ttt"):
                error = RequestError("the server is shutting down; send the request to another, or again later", status=503)
                return await send_error(error, send, [(b"connection", b"close")])
        return await self.app(scope, receive, send)
