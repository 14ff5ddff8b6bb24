"""Entry point of ``vllm.endpoint_plugins``: hangs the middleware and the routes into vLLM's API server."""

from __future__ import annotations

import logging
from functools import partial
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
        from vllm_ttt.frontend.adapter import Downloads
        from vllm_ttt.frontend.answer import AnswerMiddleware
        from vllm_ttt.frontend.draining import DrainMiddleware
        from vllm_ttt.frontend.exposition import MetricsMiddleware
        from vllm_ttt.frontend.page import router as page
        from vllm_ttt.frontend.routes import router
        from vllm_ttt.patches import frontend

        if not frontend.installed():
            logger.warning("VLLM_PLUGINS names ttt, but without --plugin ttt nothing learns: no route is added")
            return
        # vLLM adds its own middleware later, so its check of the API key comes before ours.
        app.add_middleware(AnswerMiddleware)
        app.add_middleware(MetricsMiddleware)
        app.add_middleware(DrainMiddleware)
        app.state.ttt_adapters = Downloads()
        app.include_router(router)
        app.include_router(page)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        from vllm_ttt.frontend import engines
        from vllm_ttt.frontend.exposition import Figures

        state.ttt_engine = engine_client
        if not args.disable_log_stats:
            core = engine_client.engine_core
            asks = [partial(engines.ask_one, core, number, "metrics") for number in range(engines.count(core))]
            state.ttt_figures = Figures(asks, engine_client.model_config.served_model_name)


def endpoint_plugin() -> TTTEndpointPlugin:
    return TTTEndpointPlugin()
