"""What the buffers of test-time training take on the device, and whether the device has it."""

from __future__ import annotations

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.geometry import Geometry
from vllm_ttt.worker.step.loss import LOSS_ROWS

#: Left for what CUDA itself keeps of the graphs of the step, in bytes: an allowance, not a measurement.
GRAPHS = 2**30
#: On CUDA a step has so many times schedule.tokens_per_step tokens while nobody is served: of one of 512 tokens half of the
#: kernels are too small for the device (docs/cost.md).
ALONE = 2
#: Bytes of each number of B in a session's master: B, and its last update. What the optimiser makes of one: its direction, on
#: several ranks from parts of it, and on a CPU some products of torch.
BYTES_OF_A_NUMBER, OPTIMISER = 6, 32
#: A tile counts as at least so many tokens: reading a session's B and one step of its optimiser cost as much.
SMALLEST_SHARE = 128


def pages(config: TTTConfig) -> int:
    """Pages of the backlog: those of ``backlog_tokens``, and an open one for each session that may be served."""
    return max(1, config.schedule.backlog_tokens // config.learn.chunk) + config.sessions.resident


def tile(config: TTTConfig, cuda: bool) -> int:
    """Most tokens of a step."""
    return config.schedule.tokens_per_step * (ALONE if cuda else 1)


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
    cuda: bool = False,
    copied: int = 0,
) -> dict[str, int]:
    """Bytes that live as long as the worker, by what they are for; the layers' LoRA slots are vLLM's own and not among them.

    Args:
        geometry: of a delta.
        max_tokens: rows of the capture buffers. itemsize: bytes of a number in the model's dtype.
        step_itemsize: in that of the step's matrix products.
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
                step_bytes(geometry, config, step_itemsize, max_model_len, cuda)
            ),
        }
    return parts


def step_bytes(geometry: Geometry, config: TTTConfig, itemsize: int, max_model_len: int, cuda: bool = False) -> int:
    """What a step over several layers has at a time, at most: what its forward keeps for its backward, with the gradients of
    its sessions, or what the optimiser makes of those.

    Args:
        itemsize: bytes of a number in the step's matrix products.
    """
    D, Q, F, tokens = geometry.hidden, geometry.attention, geometry.feed_forward, tile(config, cuda)
    X = Q + 2 * geometry.keys
    if cuda:  # a product keeps its dtype, and stays for the sake of the x A^T beside it, which a stream less makes up for
        layer = 4 * D + itemsize * (2 * (D + geometry.rank) + 2 * F + 2 * X + Q)
    else:
        layer = 4 * 2 * D + 4 * 2 * (F + X) + itemsize * (X + Q + 3 * geometry.rank)
    once = 4 * 4 * D + (itemsize if cuda else 4) * 4 * F + itemsize * X
    passes = tokens * (geometry.layers * layer + once) + packed_bytes(geometry, config, itemsize, max_model_len, cuda)
    numbers = most_sessions(config) * geometry.bytes // BYTES_OF_A_NUMBER
    given = numbers * (4 + itemsize)  # the gradient, and B for the products
    return given + max(passes, numbers * OPTIMISER)


def packed_bytes(geometry: Geometry, config: TTTConfig, itemsize: int, max_model_len: int, cuda: bool = False) -> int:
    """What the sessions of a step attend to, one layer at a time: keys and values as they are packed, as each of their queries'
    heads sees them, and their gradients."""
    rows = past_rows(max_model_len) + tile(config, cuda)
    return rows * 3 * 2 * (geometry.keys + geometry.attention) * itemsize


def most_sessions(config: TTTConfig) -> int:
    """How many sessions one step may have: each has a gradient of its own."""
    return max(1, config.schedule.tokens_per_step // SMALLEST_SHARE)


def past_rows(max_model_len: int) -> int:
    """How many tokens may come before the chunks of one step, together: as many as before any chunk alone."""
    return max_model_len


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
