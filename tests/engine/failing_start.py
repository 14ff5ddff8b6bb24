"""A worker whose start fails once it has loaded the model."""

from __future__ import annotations

from typing import Any

from vllm_ttt.worker.cpu_worker import TTTCPUWorker


class FailingStart(TTTCPUWorker):
    def initialize_from_config(self, kv_cache_config: Any) -> None:
        raise RuntimeError("planted by a test")
