"""vLLM's multi-LoRA on CUDA for sessions: no wait for the device, one projection for all, and kernels of our own.

`PunicaWrapperGPU.update_metadata` sorts and counts the batch's adapters with torch on the device and reads the results back
(vllm/lora/punica_wrapper/punica_gpu.py, kernel_metadata.py), so that it would wait for a micro-step that runs ahead of it: here
the same is computed on the host and copied over once. All sessions have the same A, so that x A^T is one matrix product. B is
in 8 bits (gpu_slots.py), and what multiplies with it is in gpu_kernels.py.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_ttt.worker.serve.gpu_kernels import ROWS, by_slots, decodes, expand, shrink
from vllm_ttt.worker.serve.gpu_slots import halves


def session_lora(
    y: Tensor, x: Tensor, a: Tensor, b: list[Tensor], scales: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor,
    starts: Tensor, active: Tensor, no_lora: Tensor,
) -> None:  # fmt: skip
    """y += x A^T B^T, B of each row's session.

    Args:
        y: [N, out]. x, b, scales, slots: as for `expand`. a: [1, 1, R, in], that of all slots.
        by_slot, counts, starts, active: as for `by_slots`. no_lora: [1] on the host, whether no row has a slot.
    """
    if no_lora.item():  # on the host
        return
    if decodes(x, b):
        expand(y, *shrink(x, a[0, 0]), b, scales, slots)
    else:
        by_slots(y, x @ a[0, 0].T, b, scales, by_slot, counts, starts, active)


def _session_lora_fake(
    y: Tensor, x: Tensor, a: Tensor, b: list[Tensor], scales: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor,
    starts: Tensor, active: Tensor, no_lora: Tensor,
) -> None:  # fmt: skip
    return


direct_register_custom_op(op_name="ttt_session_lora", op_func=session_lora, mutates_args=["y"], fake_impl=_session_lora_fake)


class SessionPunicaGPU(PunicaWrapperGPU):  # type: ignore[misc]  # final in name: we change the class of a live wrapper
    """Takes the place of PunicaWrapperGPU: `adopt` sets ``__class__`` and lays the metadata out as one tensor."""

    ttt_table: Tensor

    @classmethod
    def adopt(cls, wrapper: PunicaWrapperGPU) -> None:
        """Call before the model is traced: the kernels' arguments get other addresses, for good."""
        wrapper.__class__ = cls
        meta = wrapper.token_mapping_meta
        small, tokens = meta.active_lora_ids.numel(), meta.token_lora_mapping.numel()
        # active ids | tokens of each | start of each | tokens' slots | tokens sorted by slot
        sizes = [small, small, small + 1, tokens, tokens]
        table = torch.zeros(sum(sizes), dtype=torch.int32, device=meta.token_lora_mapping.device)
        (
            meta.active_lora_ids,
            meta.num_tokens_per_lora,
            meta.lora_token_start_loc,
            meta.token_lora_mapping,
            meta.token_indices_sorted_by_lora_ids,
        ) = table.split(sizes)
        wrapper.ttt_table = table  # type: ignore[attr-defined]

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        torch.ops.vllm.ttt_session_lora(y, x, lora_a_stacked[0], *halves(lora_b_stacked), *self.ttt_args(x))

    def ttt_args(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the ops take after B and its scales."""
        return self.token_mapping_meta.meta_args(x.shape[0], specialize_active_lora=False)[:-1]

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """As vLLM's, for the token mapping alone: no embedding or logits layer of ours has an adapter."""
        self.is_prefill = mapping.is_prefill
        meta = self.token_mapping_meta
        ids, inverse = np.unique(np.asarray(mapping.index_mapping, dtype=np.int64), return_inverse=True)
        slot_of = {key: slot for slot, key in enumerate(lora_index_to_id) if key is not None}
        slots = np.array([slot_of[i] if i > 0 else -1 for i in ids.tolist()], dtype=np.int32)[inverse]
        if bool((slots == -1).all()):
            meta.no_lora_flag_cpu[0] = True
            meta.num_active_loras_cpu[0] = 0
            return
        meta.no_lora_flag_cpu[0] = False
        active, counts = np.unique(slots, return_counts=True)
        number = len(active)
        if meta.captured_lora_counts:
            at = bisect.bisect_left(meta.captured_lora_counts, number)
            number = meta.captured_lora_counts[min(at, len(meta.captured_lora_counts) - 1)]
        meta.num_active_loras_cpu[0] = number

        small, tokens = meta.active_lora_ids.numel(), meta.token_lora_mapping.numel()
        head, rows = 3 * small + 1, len(slots)
        padded = min(tokens, max(rows, ROWS))  # a graph may have more rows than the batch: they have no slot
        host = torch.zeros(head + padded + rows, dtype=torch.int32, pin_memory=True)
        view = host.numpy()
        view[:small] = -1
        view[: len(active)] = active
        view[small : small + len(active)] = counts
        view[2 * small + 1 : 2 * small + 1 + len(active)] = np.cumsum(counts)
        view[head : head + padded] = -1
        view[head : head + rows] = slots
        view[head + padded :] = np.argsort(slots, kind="stable")
        self.ttt_table[: head + padded].copy_(host[: head + padded], non_blocking=True)
        self.ttt_table[head + tokens : head + tokens + rows].copy_(host[head + padded :], non_blocking=True)
