"""vLLM's LoRA metadata on CUDA without a wait for the device.

`PunicaWrapperGPU.update_metadata` sorts and counts the batch's adapters with torch on the device and reads the results back
(vllm/lora/punica_wrapper/punica_gpu.py, kernel_metadata.py), so that it would wait for a micro-step that runs ahead of it. Here
the same is computed on the host and copied over once.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU


class AsyncPunicaGPU(PunicaWrapperGPU):  # type: ignore[misc]  # final in name: we change the class of a live wrapper
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
        host = torch.zeros(3 * small + 1 + 2 * len(slots), dtype=torch.int32, pin_memory=True)
        view = host.numpy()
        view[:small] = -1
        view[: len(active)] = active
        view[small : small + len(active)] = counts
        view[2 * small + 1 : 2 * small + 1 + len(active)] = np.cumsum(counts)
        head = 3 * small + 1
        view[head : head + len(slots)] = slots
        view[head + len(slots) :] = np.argsort(slots, kind="stable")
        self.ttt_table[: head + len(slots)].copy_(host[: head + len(slots)], non_blocking=True)
        sorted_at = head + tokens
        self.ttt_table[sorted_at : sorted_at + len(slots)].copy_(host[head + len(slots) :], non_blocking=True)
