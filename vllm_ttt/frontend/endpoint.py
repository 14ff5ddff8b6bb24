"""Entry point of ``vllm.endpoint_plugins``: hangs the middleware and the routes into vLLM's API server."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State

logger = logging.getLogger(__name__)


class TTTEndpointPlugin:
    """See vllm/plugins/endpoint_plugins/interface.py."""

    name = "ttt"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        from vllm_ttt.frontend.answer import AnswerMiddleware
        from vllm_ttt.frontend.routes import router
        from vllm_ttt.patches import frontend

        if not frontend.installed():
            logger.warning("VLLM_PLUGINS names ttt, but without --plugin ttt nothing learns: no route is added")
            return
        # vLLM adds its own middleware later, so its check of the API key comes before ours.
        app.add_middleware(AnswerMiddleware)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        state.ttt_engine = engine_client


def endpoint_plugin() -> TTTEndpointPlugin:
    return TTTEndpointPlugin()
