"""vllm.v1.engine.core_client: the end of a script that uses ``LLM`` with a state dir. What was sent is learned and saved first.

vLLM kills the engine core five seconds after the script has ended. In one process (VLLM_ENABLE_V1_MULTIPROCESSING=0) nobody
makes a step after the last answer.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm_ttt.patches import _contract

_PROCESS = "self vllm_config executor_class log_stats renderer"
_INPROC = "self vllm_config executor_class log_stats executor_fail_callback"
#: On an engine core in this process: it has been drained.
_DRAINED = "_ttt_drained"


def install() -> None:
    from vllm.v1.engine.core_client import InprocClient, SyncMPClient

    _contract.wrap(SyncMPClient, "__init__", _PROCESS, _sync_init)
    _contract.wrap(InprocClient, "__init__", _INPROC, _inproc_init)


def check() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient, SyncMPClient
    from vllm.v1.engine.utils import CoreEngineProcManager

    _contract.check(SyncMPClient, "__init__", _PROCESS)
    _contract.check(InprocClient, "__init__", _INPROC)
    _contract.check(CoreEngineProcManager, "shutdown", "self timeout")
    _contract.check(EngineCore, "post_step", "self model_executed")


def _saves(vllm_config: Any) -> bool:
    from vllm_ttt import plugin

    config = plugin.config_of(vllm_config)
    return config is not None and config.sessions.state_dir is not None


def _sync_init(original: Callable) -> Callable:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if _saves(vllm_config):
            # The newest finalizer of an object, and of all at the script's end, runs first: before vLLM's own.
            weakref.finalize(self, end_process, self.resources, vllm_config.shutdown_timeout)

    return __init__


def end_process(resources: Any, timeout: float) -> None:
    """Ask the engine core to end, and wait until it has saved everything. ``resources`` are vLLM's BackgroundResources."""
    if resources.engine_manager is not None and not resources.engine_dead:
        resources.engine_dead = True  # vLLM's monitor: it ends as asked
        resources.engine_manager.shutdown(timeout=timeout)


def _inproc_init(original: Callable) -> Callable:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if _saves(vllm_config):
            weakref.finalize(self, drain, self.engine_core)
            # At the script's end finalizers run when the threads that write files have ended. This runs before.
            core = weakref.ref(self.engine_core)
            threading._register_atexit(lambda: drain(core()))  # type: ignore[attr-defined]

    return __init__


def drain(core: Any | None) -> None:
    """Step an engine core in this process until everything is learned and saved."""
    if core is None or getattr(core, _DRAINED, False):
        return
    setattr(core, _DRAINED, True)
    core.abort_requests(list(core.scheduler.requests))
    while core.scheduler.has_requests():
        core.scheduler.ttt_ending.step()
        _, executed = core.step_fn()
        core.post_step(model_executed=executed)
        if not executed:
            time.sleep(0.001)
