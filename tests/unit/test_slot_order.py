"""Which sessions lose their slots when others need some: vLLM's own managers of adapters, around no model."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest

from vllm_ttt.types import ADAPTER_PATH
from vllm_ttt.worker.serve.slots import SessionLoRAManager

pytestmark = pytest.mark.unit

SLOTS, SESSIONS = 16, 40


class Filled:
    """What fills slots; ``loads``: the sessions that it was asked for."""

    def __init__(self, inner: Any):
        self.inner, self.loads = inner, list[int]()

    def adapter(self, key: int) -> LoRAModel:
        self.loads.append(key)
        return LoRAModel(key, 8, {})

    def holds(self, key: int) -> bool:
        return key in self.inner.lora_index_to_id


def manager() -> tuple[Any, Filled]:
    inner: Any = object.__new__(LRUCacheLoRAModelManager)
    inner.lora_config = SimpleNamespace(max_loras=SLOTS, max_cpu_loras=SLOTS)
    inner._registered_adapters = AdapterLRUCache(SLOTS, inner.deactivate_adapter)
    inner._active_adapters = AdapterLRUCache(SLOTS, inner._deactivate_adapter)
    inner.lora_index_to_id, inner.modules, inner._classification_head = [None] * SLOTS, {}, None
    inner._validate_moe_lora_format = inner._create_merged_loras_inplace = lambda lora: None
    outer: Any = object.__new__(SessionLoRAManager)
    outer._adapter_manager, outer.slots = inner, Filled(inner)
    return outer, outer.slots


def test_a_session_that_comes_back_takes_no_slot_of_the_batch() -> None:
    """Nobody who is served now is loaded again, whatever the numbers of those who come."""
    outer, filled = manager()
    batch, turns = list(range(1, SLOTS + 1)), random.Random(0)
    for _ in range(200):
        held = {key for key in range(1, SESSIONS + 1) if filled.holds(key)}
        filled.loads.clear()
        outer._apply_adapters({LoRARequest(f"s{key}", key, f"{ADAPTER_PATH}{key}") for key in batch})
        assert all(filled.holds(key) for key in batch)
        assert sorted(filled.loads) == sorted(set(batch) - held)
        for _ in range(turns.randrange(1, 4)):
            batch[turns.randrange(SLOTS)] = turns.choice([key for key in range(1, SESSIONS + 1) if key not in batch])
