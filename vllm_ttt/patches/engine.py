"""In the engine core: block keys that do not depend on a session's delta, and one method for the admin routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ttt.patches import _contract
from vllm_ttt.types import ADAPTER_PATH

_KEYS = ("_gen_lora_extra_hash_keys", "request")


def install() -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    _contract.wrap(kv_cache_utils, *_KEYS, _share_blocks)
    _contract.add(EngineCore, "ttt_admin", _ttt_admin)


def check() -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    _contract.check(kv_cache_utils, *_KEYS)
    _contract.absent(EngineCore, "ttt_admin")
    # Overridden by TTTScheduler rather than patched, but relied on all the same.
    for name, parameters in {
        "add_request": "self request",
        "schedule": "self throttle_prefills",
        "update_from_output": "self scheduler_output model_runner_output",
        "finish_requests": "self request_ids finished_status",
        "has_requests": "self",
        "_handle_blocked_waiting_request": "self request",
    }.items():
        _contract.check(Scheduler, name, parameters)


def _share_blocks(original: Callable) -> Callable:
    """With `last`, no key or value depends on the delta: sessions share blocks with the base model and each other."""

    def _gen_lora_extra_hash_keys(request: Any) -> list[Any]:
        adapter = request.lora_request
        if adapter is not None and adapter.lora_path.startswith(ADAPTER_PATH):
            return []
        return original(request)

    return _gen_lora_extra_hash_keys


def _ttt_admin(self: Any, op: str, tenant: str, name: str, version: int | None = None) -> dict[str, Any]:
    from vllm_ttt.engine.admin import admin

    return admin(self, op, tenant, name, version)
