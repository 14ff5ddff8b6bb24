"""Slots on CUDA hold B in 8 bits: half of the memory, and of what a decode step of sessions has to read.

Masters stay float32. Each row of B is int8 with a float32 scale that makes its largest number 127, and both ways into a slot
round a master with the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_ttt.worker.delta import Delta


def halves(stacks: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """``lora_b_stacked`` as `share` of slots.py leaves it on CUDA: for each slice int8 [slots, 1, out, R], and after these for
    each float32 scales [slots, 1, out]. As one tuple they come with every call of vLLM's, which itself looks at nothing but the
    shapes of the first half."""
    return list(stacks[: len(stacks) // 2]), list(stacks[len(stacks) // 2 :])


def in_8_bits(stacks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Empty slots in the place of vLLM's in 16 bits."""
    return (
        *(torch.zeros_like(b, dtype=torch.int8) for b in stacks),
        *(torch.zeros(b.shape[:3], device=b.device) for b in stacks),
    )


class RoundedB:
    """Mixed into the class of a live LoRA layer, before SharedA, by `share` of slots.py."""

    lora_b_stacked: tuple[Tensor, ...]

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """vLLM's, for B alone, float32 where it is a session's; vLLM's own dummies at start have a smaller rank."""
        from vllm_ttt.worker.serve.gpu_kernels import round_into

        given = lora_b if isinstance(lora_b, list) else [lora_b]
        for b8, scale, b in zip(*halves(self.lora_b_stacked), given, strict=True):
            round_into(b8[index, 0], scale[index, 0], b.to(b8.device, non_blocking=True))


def fill(b8: list[Tensor], scales: list[Tensor], slot: int, delta: Delta) -> None:
    """Bring a slot to a master, float32, of one session, on the device or on the host: a few launches for all modules.

    Args:
        b8, scales: of all slots, in the order of `Delta.parts`.
    """
    from vllm_ttt.worker.serve.gpu_kernels import rounded

    found = zip(*(rounded(x.to(b8[0].device, non_blocking=True)) for x in delta.tensors()), strict=True)
    for stacks, made in zip((b8, scales), found, strict=True):
        parts = [x[0] for _, x in delta.by(*made).parts()]
        torch._foreach_copy_([stack[slot, 0] for stack in stacks], parts)  # pyright: ignore[reportPrivateImportUsage]
