"""vLLM's CPU worker (model runner V1, synchronous scheduling) with the TTT hooks."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ttt.worker.capture.step_view import Rows, view_v1
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.ngrams.caches import Caches
from vllm_ttt.worker.serve.cpu_lora import GroupedPunicaCPU
from vllm_ttt.worker.serve.cpu_runner import MixingModelRunner
from vllm_ttt.worker.serve.head_runner import HeadRunnerV1
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.tail import TailModules
from vllm_ttt.worker.worker import TTTWorkerMixin


class TTTCPUWorker(TTTWorkerMixin, CPUWorker):
    def ttt_idle_flag(self, modules: TailModules) -> Tensor:
        GroupedPunicaCPU.adopt(modules.punica)
        return torch.ones((), dtype=torch.bool)

    def ttt_adapters(self) -> None:
        for wrapper in set(self.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()):
            GroupedPunicaCPU.adopt(wrapper)

    def ttt_mix(self, caches: Caches) -> None:
        MixingModelRunner.adopt(self.model_runner, caches, self.trainer.failed)

    def ttt_head_slots(self, deltas: Deltas, slots: int) -> HeadSlots:
        assert isinstance(deltas.tail, Head)
        return HeadSlots(deltas.tail, deltas, slots)

    def ttt_adapt(self, slots: HeadSlots) -> None:
        HeadRunnerV1.adopt(self.model_runner, slots, self.trainer.failed)

    def ttt_memory_left(self) -> int:
        explicit = self.cache_config.kv_cache_memory_bytes
        if explicit is not None:
            return psutil.virtual_memory().available - explicit
        return self.requested_cpu_memory - psutil.Process().memory_info().rss

    def execute_model(self, scheduler_output: Any) -> Any:
        plan = getattr(scheduler_output, "ttt", None)
        if self.idle is not None:
            self.idle.fill_(plan is None or not plan.sessions)
        return super().execute_model(scheduler_output)

    def ttt_batch(self, scheduler_output: Any) -> Any:
        return scheduler_output  # the runner's input batch describes it until the next step

    def ttt_view(self, ran: Any, wanted: Any) -> list[Rows]:
        return view_v1(self.model_runner, ran, wanted)
