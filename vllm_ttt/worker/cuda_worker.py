"""vLLM's CUDA worker (model runner V2, asynchronous scheduling, CUDA graphs) with the TTT hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu_worker import Worker

from vllm_ttt.worker.capture.step_view import Rows, view_v2
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.ngrams.caches import Caches
from vllm_ttt.worker.ngrams.tables import Tables
from vllm_ttt.worker.serve import gpu_linear
from vllm_ttt.worker.serve.gpu_cache import MixingRunnerV2
from vllm_ttt.worker.serve.gpu_head import GPUHeadSlots, HeadRunnerV2
from vllm_ttt.worker.serve.gpu_lora import SessionPunicaGPU
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.tail import TailModules
from vllm_ttt.worker.worker import TTTWorkerMixin


class TTTCUDAWorker(TTTWorkerMixin, Worker):
    def ttt_idle_flag(self, modules: TailModules) -> Tensor:
        wrapper = modules.punica
        SessionPunicaGPU.adopt(wrapper)
        # Where the forward pass finds it, by name.
        self.model_runner.vllm_config.compilation_config.static_forward_context[gpu_linear.MAPPING] = wrapper
        for layer in modules.adapting:
            gpu_linear.adopt(layer)
        # The flag that makes vLLM's own LoRA kernels return at once; graphs are captured for either value of it.
        return wrapper.token_mapping_meta.no_lora_flag_cpu

    def ttt_mix(self, caches: Caches) -> None:
        model = self.vllm_config.model_config
        tables = Tables(caches.indexes.most, caches.config, self.device)
        MixingRunnerV2.adopt(self.model_runner, caches, tables, self.trainer.failed)
        self.model_runner.ttt_warm_up(model.get_hidden_size(), model.dtype)

    def ttt_head_slots(self, deltas: Deltas, slots: int) -> HeadSlots:
        assert isinstance(deltas.tail, Head)
        return GPUHeadSlots(deltas.tail, deltas, slots)

    def ttt_adapt(self, slots: HeadSlots) -> None:
        HeadRunnerV2.adopt(self.model_runner, slots, self.trainer.failed)

    def ttt_memory_left(self) -> int:
        torch.cuda.empty_cache()  # at start only: what the loading of the weights has left behind
        free, _ = torch.cuda.mem_get_info()
        explicit = self.cache_config.kv_cache_memory_bytes
        if explicit is not None:
            return free - explicit
        return int(self.requested_memory) - (self.init_snapshot.free_memory - free)

    def ttt_batch(self, scheduler_output: Any) -> Any:
        state = self.model_runner.execute_model_state
        return None if state is None else state.input_batch

    def ttt_view(self, ran: Any, wanted: Any) -> list[Rows]:
        return view_v2(self.model_runner, ran, wanted)
