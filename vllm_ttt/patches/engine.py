"""In the engine core: block keys that do not depend on a session's delta, and one method for the admin routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ttt.patches import _contract
from vllm_ttt.types import ADAPTER_PATH

_KEYS = ("_gen_lora_extra_hash_keys", "request")
_LOOP = "_handle_shutdown"
_SIGNAL = ("trigger", "self")
_REQUEST = ("from_engine_core_request", "cls request block_hasher")


def install() -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.utils import SignalCallback
    from vllm.v1.request import Request

    _contract.wrap(SignalCallback, *_SIGNAL, _once_at_a_time)
    _contract.wrap(kv_cache_utils, *_KEYS, _share_blocks)
    _contract.wrap(EngineCoreProc, _LOOP, "self", _look_at_the_loop)
    _contract.wrap(Request, *_REQUEST, _keep_the_name)
    _contract.add(EngineCore, "ttt_admin", _ttt_admin)


def check() -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.utils import SignalCallback
    from vllm.v1.request import Request

    _contract.check(SignalCallback, *_SIGNAL)
    _contract.check(kv_cache_utils, *_KEYS)
    _contract.check(EngineCoreProc, _LOOP, "self")
    _contract.check(Request, *_REQUEST)
    _contract.absent(EngineCore, "ttt_admin")
    # Overridden by TTTScheduler rather than patched, but relied on all the same.
    for name, parameters in {
        "add_request": "self request",
        "schedule": "self throttle_prefills",
        "update_from_output": "self scheduler_output model_runner_output",
        "finish_requests": "self request_ids finished_status",
        "has_requests": "self",
        "shutdown": "self",
        "_free_request_blocks": "self request",
        "reset_prefix_cache": "self reset_running_requests reset_connector",
        "_handle_blocked_waiting_request": "self request",
        "_enqueue_waiting_request": "self request",
        "get_request_counts": "self",
        "make_stats": "self spec_decoding_stats kv_connector_stats cudagraph_stats perf_stats ec_connector_stats",
        "_reserve_prefill_lookahead": "self request num_computed_tokens num_new_tokens",
        "_update_after_schedule": "self scheduler_output",
    }.items():
        _contract.check(Scheduler, name, parameters)
    _contract.check(Scheduler, "_get_local_prefix_cache_hit", "self request", "self request max_cache_hit_length")
    _contract.check(KVCacheManager, "pop_blocks_for_free", "self request")
    _contract.check(BlockPool, "free_blocks", "self ordered_blocks")


def _share_blocks(original: Callable) -> Callable:
    """With `last`, no key or value depends on the delta: sessions share blocks with the base model and each other. With `deep`,
    a session's epoch is a part of its adapter's path (engine/prefix/keys.py)."""

    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        adapter = request.lora_request
        if adapter is not None and adapter.lora_path.startswith(ADAPTER_PATH):
            return [] if "/" not in adapter.lora_path.removeprefix(ADAPTER_PATH) else original(request)
        return original(request)

    return _gen_lora_extra_hash_keys


def _once_at_a_time(original: Callable) -> Callable:
    """It sets an event, whose lock a second signal's handler, inside the first one's, would wait for, and the engine core for
    ever: `systemctl stop` signals all processes, and the API server then signals the engine core once more."""

    def trigger(self: Any) -> None:
        if not getattr(self, "ttt_triggered", False):
            self.ttt_triggered = True  # it has one effect, once
            original(self)

    return trigger


def _look_at_the_loop(original: Callable) -> Callable:
    """The engine core asks this once each time round its loop: whether to go on."""

    def _handle_shutdown(self: Any) -> bool:
        look = getattr(self.scheduler, "ttt_loop", None)
        if look is not None:
            look(self)
        goes_on = original(self)
        if look is not None and not goes_on:
            self.scheduler.ttt_ending.done()
        return goes_on

    return _handle_shutdown


def _keep_the_name(original: Callable) -> Callable:
    """What its client calls a request, ``ttt_named``: with it alone a sample of n can be told from a request of such a name."""

    def from_engine_core_request(cls: type, request: Any, block_hasher: Any) -> Any:
        made = original(cls, request, block_hasher)
        made.ttt_named = request.external_req_id
        return made

    return from_engine_core_request


def _ttt_admin(self: Any, op: str, tenant: str, name: str, argument: Any = None) -> Any:
    from vllm_ttt.engine.admin import admin

    return admin(self, op, tenant, name, argument)
