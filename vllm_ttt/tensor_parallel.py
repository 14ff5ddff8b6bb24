"""What can be served with --tensor-parallel-size, where several ranks share a model and its sessions."""

from __future__ import annotations

import os
from typing import Any

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError

#: In the environment: try it on CUDA, where nobody has.
TRY = "TTT_TRY_RANKS"


def check(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where several ranks would share a model in a way in which its sessions cannot learn."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks, on_cuda = parallel.tensor_parallel_size, vllm_config.device_config.device_type == "cuda"
    if ranks == 1:
        return
    executor = parallel.distributed_executor_backend
    quantised = getattr(model.hf_config, "quantization_config", None) or model.quantization
    refusals = {
        "the preset head, whose deltas are served from a table that knows no ranks": config.adapt.preset == "head",
        f"CUDA, where it has never run ({TRY}=1 tries it, without CUDA graphs of the step)": (
            on_cuda and os.environ.get(TRY) != "1"
        ),
        "a quantised model, whose weights have not been read on several ranks yet": bool(quantised),
        "--speculative-config, which has not been tried beside it": vllm_config.speculative_config is not None,
        "several machines": parallel.nnodes > 1,
        f"--distributed-executor-backend {executor}": executor not in (None, "mp"),
        "--enable-batch-sharded-sampling": bool(parallel.enable_batch_sharded_sampling),
        "--data-parallel-size, which has not been tried beside it": parallel.data_parallel_size > 1,
    }
    for what, refused in refusals.items():
        if refused:
            raise ConfigError(
                f"--tensor-parallel-size {ranks} is not supported with --plugin ttt and {what}; serve with one of them alone"
            )
