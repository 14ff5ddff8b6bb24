"""What the buffers of test-time training take on the device, and whether the device has it."""

from __future__ import annotations

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.geometry import Geometry
from vllm_ttt.worker.step.loss import LOSS_ROWS

#: Left for what CUDA itself keeps of the graphs of the step, in bytes: an allowance, not a measurement.
GRAPHS = 2**30
#: A tile counts as at least so many tokens: reading a session's B and one step of its optimiser cost as much.
SMALLEST_SHARE = 128


def pages(config: TTTConfig) -> int:
    """Pages of the backlog: those of ``backlog_tokens``, and an open one for each session that may be served."""
    return max(1, config.schedule.backlog_tokens // config.learn.chunk) + config.sessions.resident


def begins_at_embedding(geometry: Geometry, config: TTTConfig) -> bool:
    """Whether every layer is adapted, and what enters the first is known by its token: nothing need be captured in the forward
    pass."""
    return config.adapt.preset == "deep" and geometry.layer == 0 and not geometry.wrapped


def needs(
    geometry: Geometry,
    config: TTTConfig,
    max_tokens: int,
    itemsize: int,
    vocab: int,
    max_model_len: int,
    step_itemsize: int,
    kept: int = 4,
    copied: int = 0,
) -> dict[str, int]:
    """Bytes that live as long as the worker, by what they are for; the layers' LoRA slots are vLLM's own and not among them.

    Args:
        geometry: of a delta.
        max_tokens: rows of the capture buffers. itemsize: bytes of a number in the model's dtype.
        step_itemsize: in that of the step's matrix products. kept: as for `step_bytes`.
        copied: bytes of the weights that the step has for itself.
    """
    D, Q, F, rows = geometry.hidden, geometry.attention, geometry.feed_forward, config.sessions.resident
    tokens = pages(config) * config.learn.chunk
    tried = config.guard.probe_tokens if config.guard.every else 1
    captured = 16 + (0 if begins_at_embedding(geometry, config) else (D + Q) * itemsize)
    if geometry.head:  # the model runner has the states of a batch anyway
        max_tokens = 0
    parts = {
        f"masters of {rows} resident sessions (sessions.resident, adapt.rank)": (rows + 1) * geometry.bytes,
        f"activations of {tokens:,} tokens that may wait to be learned (schedule.backlog_tokens)": tokens * captured,
        f"the guard's text, {tried:,} tokens (guard.probe_tokens)": tried * captured,
        f"activations of a batch of {max_tokens:,} tokens (--max-num-batched-tokens)": max_tokens * (captured - 16),
        "fixed projections and the workspace of the loss": step_itemsize * (geometry.rank * (D + Q + F) + LOSS_ROWS * vocab),
    }
    if geometry.head:
        parts["deltas that are being served (sessions.resident, adapt.rank)"] = rows * D * geometry.rank * step_itemsize
    if copied:
        which = "lm_head" if geometry.head else "the adapted layers and of lm_head"
        parts[f"copies of the weights of {which}, which the model has in another form"] = copied
    if config.cache.longest:
        parts["indexes of the caches of sessions that are served (cache.tokens, cache.orders, sessions.resident)"] = (
            rows * config.cache.index_bytes
        )
    if geometry.layers > 1:
        parts |= {
            "a step over several layers (adapt.layers, schedule.tokens_per_step, --max-model-len)": (
                step_bytes(geometry, config, step_itemsize, max_model_len, kept)
            ),
        }
    return parts


def step_bytes(geometry: Geometry, config: TTTConfig, itemsize: int, max_model_len: int, kept: int = 4) -> int:
    """What a step over several layers keeps from its forward for its backward, and gradients and new states of its sessions.

    Args:
        itemsize: bytes of a number in the step's matrix products. kept: in what such a product gives (step/products.py).
    """
    D, Q, F, tokens = geometry.hidden, geometry.attention, geometry.feed_forward, config.schedule.tokens_per_step
    X = Q + 2 * geometry.keys
    layer = 4 * 2 * D + kept * 2 * (F + X) + itemsize * (X + Q + 3 * geometry.rank)
    once = 4 * 4 * D + kept * 4 * F + itemsize * X
    sessions = max(1, tokens // SMALLEST_SHARE)
    packed = packed_bytes(geometry, config, itemsize, max_model_len)
    return tokens * (geometry.layers * layer + once) + packed + 4 * sessions * geometry.bytes


def packed_bytes(geometry: Geometry, config: TTTConfig, itemsize: int, max_model_len: int) -> int:
    """What the sessions of a step attend to, one layer at a time: keys and values as they are packed, as each of their queries'
    heads sees them, and their gradients."""
    sessions = max(1, config.schedule.tokens_per_step // SMALLEST_SHARE)
    return sessions * max_model_len * 3 * 2 * (geometry.keys + geometry.attention) * itemsize


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
