"""vLLM's CPU worker (model runner V1, eager) with the TTT hooks."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ttt.worker.cpu_lora import GroupedPunicaCPU
from vllm_ttt.worker.worker import TTTWorkerMixin


class TTTCPUWorker(TTTWorkerMixin, CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        modules = self.model_runner.lora_manager._adapter_manager.modules.values()
        for wrapper in {id(m.punica_wrapper): m.punica_wrapper for m in modules}.values():
            GroupedPunicaCPU.adopt(wrapper)
