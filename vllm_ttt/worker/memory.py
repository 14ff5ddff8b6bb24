"""What the buffers of test-time training take on the device, and whether the device has it."""

from __future__ import annotations

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.geometry import Geometry
from vllm_ttt.worker.micro_step import LOSS_ROWS


def pages(config: TTTConfig) -> int:
    """Pages of the backlog: those of ``backlog_tokens``, and an open one for each session that may be served."""
    return config.schedule.backlog_tokens // config.learn.chunk + config.sessions.resident


def needs(geometry: Geometry, config: TTTConfig, max_tokens: int, itemsize: int, vocab: int) -> dict[str, int]:
    """Bytes that live as long as the worker, by what they are for; the layers' LoRA slots are vLLM's own and not among them.

    Args:
        geometry: of a delta.
        max_tokens: rows of the capture buffers. itemsize: bytes of a number in the model's dtype.
    """
    D, Q, F, rows = geometry.hidden, geometry.attention, geometry.feed_forward, config.sessions.resident
    tokens = pages(config) * config.learn.chunk
    tried = config.guard.probe_tokens if config.guard.every else 1
    return {
        f"masters and gradients of {rows} resident sessions (sessions.resident, adapt.rank)": (2 * (rows + 1) * geometry.bytes),
        f"activations of {tokens:,} tokens that may wait to be learned (schedule.backlog_tokens)": (
            tokens * ((D + Q) * itemsize + 8)
        ),
        f"the guard's text, {tried:,} tokens (guard.probe_tokens)": tried * ((D + Q) * itemsize + 8),
        f"activations of a batch of {max_tokens:,} tokens (--max-num-batched-tokens)": max_tokens * (D + Q) * itemsize,
        "fixed projections and the workspace of the loss": itemsize * (geometry.rank * (D + Q + F) + LOSS_ROWS * vocab),
    }


def check(parts: dict[str, int], left: int) -> None:
    """Raise ConfigError where ``parts`` are more than the ``left`` bytes that vLLM may still use for anything but the model."""
    total = sum(parts.values())
    if total <= left:
        return
    lines = [f"  {size / 2**30:8.2f} GiB  {what}" for what, size in parts.items()]
    raise ConfigError(
        f"--plugin ttt needs {total / 2**30:.2f} GiB of device memory beside the model, and --gpu-memory-utilization "
        f"(or --kv-cache-memory-bytes) leaves {max(left, 0) / 2**30:.2f} GiB, which the KV cache is to share:\n"
        + "\n".join(lines)
        + "\n"
        "Raise --gpu-memory-utilization, or lower what stands in parentheses"
    )
