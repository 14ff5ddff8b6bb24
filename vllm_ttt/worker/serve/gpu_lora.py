"""vLLM's multi-LoRA on CUDA for sessions: no wait for the device, one projection for all, and a kernel for decoding.

`PunicaWrapperGPU.update_metadata` sorts and counts the batch's adapters with torch on the device and reads the results back
(vllm/lora/punica_wrapper/punica_gpu.py, kernel_metadata.py), so that it would wait for a micro-step that runs ahead of it: here
the same is computed on the host and copied over once. All sessions have the same A, so that x A^T is one matrix product. And in
a batch that decodes, each row has another B: it is read once, at the memory's speed.
"""

from __future__ import annotations

import bisect
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from vllm.lora.ops.triton_ops import lora_expand
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

#: Batches of up to so many rows, decodes for the most part, take the kernel that reads a B for each row.
ROWS = 128
BLOCK = 64


# No annotation but constexpr: Triton looks any other name up among the globals of the kernel, and does not compile.
@triton.jit
def _expand_rows(r, b, y, slots, y_stride, b_stride, R: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[t, n] += sum_k r[t, k] b[slots[t], n, k]; a row of slot -1 is not touched. Grid: (out / BLOCK_N, rows)."""
    row = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, R)
    weights = tl.load(b + slot.to(tl.int64) * b_stride + n[:, None] * R + k[None, :]).to(tl.float32)
    x = tl.load(r + row * R + k).to(tl.float32)
    out = y + row.to(tl.int64) * y_stride + n
    tl.store(out, tl.load(out).to(tl.float32) + tl.sum(weights * x[None, :], 1))


def _session_lora(
    y: Tensor, x: Tensor, a: Tensor, b: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor, starts: Tensor,
    active: Tensor, no_lora: Tensor, num_active: Tensor,
) -> None:  # fmt: skip
    """y += x A^T B^T, B of each row's session.

    Args:
        y: [N, out], the slices of ``b`` beside each other. x: [N, in].
        a: [1, 1, R, in], that of all slots. b: per slice, [slots, 1, out of the slice, R].
        slots: [N] int32, slot of each row, or -1. The others are what vLLM's `lora_expand` takes.
    """
    if no_lora.item():  # on the host
        return
    r = x @ a[0, 0].T
    rank = b[0].shape[3]
    by_rows = x.shape[0] <= ROWS and rank & (rank - 1) == 0 and all(part.shape[2] % BLOCK == 0 for part in b)
    if not by_rows:
        lora_expand(r.unsqueeze(0).expand(len(b), -1, -1).contiguous(), b, y, slots, by_slot, counts, starts, active, no_lora,
                    num_active, offset_start=0, add_inputs=True)  # fmt: skip
        return
    offset, sizes = 0, cast("dict[str, Any]", {"R": rank, "BLOCK_N": BLOCK})
    for part in b:
        out = part.shape[2]
        _expand_rows[out // BLOCK, x.shape[0]](r, part, y[:, offset:], slots, y.stride(0), part.stride(0), **sizes)
        offset += out


def _session_lora_fake(
    y: Tensor, x: Tensor, a: Tensor, b: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor, starts: Tensor,
    active: Tensor, no_lora: Tensor, num_active: Tensor,
) -> None:  # fmt: skip
    return


direct_register_custom_op(op_name="ttt_session_lora", op_func=_session_lora, mutates_args=["y"], fake_impl=_session_lora_fake)


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
        args = self.token_mapping_meta.meta_args(x.shape[0], self.lora_config.specialize_active_lora)
        torch.ops.vllm.ttt_session_lora(y, x, lora_a_stacked[0], list(lora_b_stacked), *args)

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
