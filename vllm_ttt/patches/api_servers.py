"""vllm.v1.utils.APIServerProcessManager.__init__: with ``--api-server-count`` above 1, each API server is a process of its own.

Such a process reads the flags again, before vLLM loads its plugins there: it would serve without ttt, and without scoping the
names of sessions by API key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_ttt.patches import _contract

_INIT = (
    "self listen_address sock args num_servers input_listeners output_listeners target_server_fn stats_update_address "
    "tensor_queue"
)


def install() -> None:
    from vllm.v1.utils import APIServerProcessManager

    _contract.wrap(APIServerProcessManager, "__init__", _INIT, _init)


def check() -> None:
    from vllm.v1.utils import APIServerProcessManager

    _contract.check(APIServerProcessManager, "__init__", _INIT)


def serve(target: Callable[..., None] | None, *args: Any, **kwargs: Any) -> None:
    """What each of those processes runs: load the plugin, then vLLM's own ``target``."""
    from vllm_ttt.plugin import register

    register()
    if target is None:
        from vllm.v1.utils import run_api_server_worker_proc as target
    target(*args, **kwargs)


def _init(original: Callable) -> Callable:
    def __init__(self: Any, *args: Any, target_server_fn: Callable[..., None] | None = None, **kwargs: Any) -> None:
        original(self, *args, target_server_fn=functools.partial(serve, target_server_fn), **kwargs)

    return __init__
