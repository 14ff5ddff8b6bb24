"""vLLM's LoRA on the CPU, without its leak, and as one op that torch.compile does not look into.

`vllm/lora/ops/torch_ops/lora_ops.py` of vLLM 0.32 indexes the stacked adapters with -1 for rows that have none, which selects
the last slot: a base request beside a session would be served with somebody's delta. Here rows without an adapter are not
touched at all, and each run of rows with the same adapter is one matrix product instead of a gathered matrix per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.utils.torch_utils import direct_register_custom_op


def _grouped_lora(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], runs: Tensor) -> None:
    """y[rows, slice] += x[rows] A^T B^T for each run of rows with one adapter.

    Args:
        y: [N, out], the slices beside each other. x: [N, in].
        a: per slice, [slots, 1, R, in], or [1, 1, R, in], that of all slots. b: per slice, [slots, 1, out of the slice, R].
        runs: [runs, 3] int64: first row, rows, slot; a run of 0 rows ends the list.
    """
    for first, rows, slot in runs.tolist():
        if rows == 0:
            return
        offset, x_rows = 0, x[first : first + rows]
        for a_all, b_slots in zip(a, b, strict=True):
            width = b_slots.shape[2]
            y[first : first + rows, offset : offset + width] += (x_rows @ a_all[min(slot, len(a_all) - 1), 0].T) @ b_slots[
                slot, 0
            ].T
            offset += width


def _grouped_lora_fake(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], runs: Tensor) -> None:
    return


direct_register_custom_op(op_name="ttt_grouped_lora", op_func=_grouped_lora, mutates_args=["y"], fake_impl=_grouped_lora_fake)


class GroupedPunicaCPU(PunicaWrapperCPU):
    """Takes the place of PunicaWrapperCPU on live wrappers: `adopt` sets ``__class__`` and allocates the table of runs."""

    ttt_runs: Tensor

    @classmethod
    def adopt(cls, wrapper: PunicaWrapperCPU) -> None:
        wrapper.__class__ = cls
        wrapper.ttt_runs = torch.zeros(wrapper._seq_start_locs.shape[0] + 1, 3, dtype=torch.int64)  # type: ignore[attr-defined]

    def _update_prefill_metadata(self, token_lora_tensor: Tensor) -> None:
        super()._update_prefill_metadata(token_lora_tensor)
        runs = torch.stack(self.prefill_metadata[:3], 1)
        runs = runs[runs[:, 2] >= 0]
        self.ttt_runs[: len(runs)] = runs
        self.ttt_runs[len(runs)].zero_()

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """No adapter that is served changes lm_head."""

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
        torch.ops.vllm.ttt_grouped_lora(y, x, list(lora_a_stacked), list(lora_b_stacked), self.ttt_runs)
