"""vLLM's CUDA worker (model runner V2, asynchronous scheduling, CUDA graphs) with the TTT hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu_worker import Worker

from vllm_ttt.plugin import config_of
from vllm_ttt.worker.gpu_lora import AsyncPunicaGPU
from vllm_ttt.worker.step_view import Rows, view_v2
from vllm_ttt.worker.tail import TailModules
from vllm_ttt.worker.worker import TTTWorkerMixin


class TTTCUDAWorker(TTTWorkerMixin, Worker):
    def ttt_idle_flag(self, modules: TailModules) -> Tensor:
        wrapper = modules.o_proj.punica_wrapper
        AsyncPunicaGPU.adopt(wrapper)
        # The flag that makes vLLM's own LoRA kernels return at once; graphs are captured for either value of it.
        return wrapper.token_mapping_meta.no_lora_flag_cpu

    def ttt_batch(self, scheduler_output: Any) -> Any:
        state = self.model_runner.execute_model_state
        return None if state is None else state.input_batch

    def ttt_view(self, ran: Any, wanted: Any) -> list[Rows]:
        return view_v2(self.model_runner, ran, wanted)

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """As vLLM's, with the step's workspace counted: it runs once while vLLM measures its own peak."""
        profile_run = self.model_runner.profile_run
        config = config_of(self.vllm_config)
        assert config is not None

        def with_step(*args: Any, **kwargs: Any) -> None:
            profile_run(*args, **kwargs)
            self.ttt_warm_up(config)

        self.model_runner.profile_run = with_step
        try:
            return super().determine_available_memory()
        finally:
            self.model_runner.profile_run = profile_run
