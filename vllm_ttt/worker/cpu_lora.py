"""vLLM's LoRA on the CPU, without its leak.

`vllm/lora/ops/torch_ops/lora_ops.py` of vLLM 0.32 indexes the stacked adapters with -1 for rows that have none, which selects
the last slot: a base request beside a session would be served with somebody's delta. Here rows without an adapter are not
touched at all, and each run of rows with the same adapter is one matrix product instead of a gathered matrix per token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class GroupedPunicaCPU(PunicaWrapperCPU):
    """Takes the place of PunicaWrapperCPU on live wrappers (by ``__class__``)."""

    #: (first row, rows, slot) of each run of rows that has an adapter
    runs: list[tuple[int, int, int]] = []

    def _update_prefill_metadata(self, token_lora_tensor: Tensor) -> None:
        super()._update_prefill_metadata(token_lora_tensor)
        starts, lengths, slots, *_ = self.prefill_metadata
        runs = zip(starts.tolist(), lengths.tolist(), slots.tolist(), strict=True)
        self.runs = [run for run in runs if run[2] >= 0]

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        offset = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            for first, rows, slot in self.runs:
                shrunk = x[first : first + rows] @ a[slot, 0].T
                y[first : first + rows, offset : offset + width].addmm_(shrunk, b[slot, 0].T, alpha=scale)
            offset += width
