"""What can be served with --tensor-parallel-size, where several ranks share a model and its sessions."""

from __future__ import annotations

from typing import Any

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError


def check(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where several ranks would share a model in a way in which its sessions cannot learn."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks = parallel.tensor_parallel_size
    if ranks == 1:
        return
    executor = parallel.distributed_executor_backend
    quantised = getattr(model.hf_config, "quantization_config", None) or model.quantization
    refusals = {
        "the preset head, whose deltas are served from a table that knows no ranks": config.adapt.preset == "head",
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
