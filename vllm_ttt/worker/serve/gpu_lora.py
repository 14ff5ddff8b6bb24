"""vLLM's multi-LoRA on CUDA for sessions: no wait for the device, one projection for all, and a kernel for decoding.

`PunicaWrapperGPU.update_metadata` sorts and counts the batch's adapters with torch on the device and reads the results back
(vllm/lora/punica_wrapper/punica_gpu.py, kernel_metadata.py), so that it would wait for a micro-step that runs ahead of it: here
the same is computed on the host and copied over once. All sessions have the same A, so that x A^T is one matrix product. And in
a batch that decodes, each row has another B: two kernels that read it once, at the memory's speed.
"""

from __future__ import annotations

import bisect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.ops.triton_ops import lora_expand
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

#: Batches of up to so many rows, decodes for the most part, take the kernels that read a B for each row.
ROWS = 128
#: Rows of x, and columns of it at a time, that a program of `_shrink` has; into how many parts it cuts the columns at most.
BLOCK_M, BLOCK_K, SPLITS = 64, 128, 32
#: Rows of B that a program of `_expand` reads at a time, and how often.
BLOCK_N, TIMES = 128, 2
#: Numbers of a row that a program of `_add` has.
BLOCK_ADD = 1024


# No annotation but constexpr: Triton looks any other name up among the globals of the kernel, and does not compile.
@triton.jit
def _shrink(x, a, parts, N, K, x_stride, R: tl.constexpr, PER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """parts[s] = x A^T over the s-th part of the columns, float32. Grid: (parts, N / BLOCK_M)."""
    rows, r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, R)
    found = tl.zeros((BLOCK_M, R), tl.float32)
    for i in range(PER):
        k = (tl.program_id(0) * PER + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        columns = tl.load(a + r[None, :] * K + k[:, None], k[:, None] < K, 0.0)
        given = tl.load(x + rows[:, None].to(tl.int64) * x_stride + k[None, :], (rows[:, None] < N) & (k[None, :] < K), 0.0)
        found = tl.dot(given, columns, found, input_precision="ieee")
    tl.store(parts + (tl.program_id(0) * N + rows[:, None]) * R + r[None, :], found, rows[:, None] < N)


@triton.jit
def _expand(parts, b, y, slots, N, OUT, y_stride, b_stride, ADD: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
            R: tl.constexpr, BLOCK_N: tl.constexpr, TIMES: tl.constexpr):  # fmt: skip
    """y[t, n] = sum_k r[t, k] b[slots[t], n, k], r being the sum of the parts, with ADD added to what is there; rows of slot -1
    stay. Grid: (out, N)."""
    row = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    first, k = tl.program_id(0) * TIMES * BLOCK_N, tl.arange(0, R)
    at, n = b + slot.to(tl.int64) * b_stride + k[None, :], first + tl.arange(0, BLOCK_N)
    weights = tl.load(at + n[:, None] * R, n[:, None] < OUT, 0.0)  # on their way while r is summed
    s = tl.arange(0, PADDED)
    r = tl.sum(tl.load(parts + (s[:, None] * N + row) * R + k[None, :], s[:, None] < SPLITS, 0.0), 0)
    for i in tl.static_range(TIMES):
        if i > 0:
            n = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = tl.load(at + n[:, None] * R, n[:, None] < OUT, 0.0)
        out, found = y + row.to(tl.int64) * y_stride + n, tl.sum(weights.to(tl.float32) * r[None, :], 1)
        if ADD:
            found += tl.load(out, n < OUT, 0.0).to(tl.float32)
        tl.store(out, found, n < OUT)


@triton.jit
def _add(y, d, slots, OUT, y_stride, BLOCK: tl.constexpr):
    """y += d, float32, in rows that have a slot. Grid: (OUT / BLOCK, N)."""
    row = tl.program_id(1)
    if tl.load(slots + row) < 0:
        return
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = y + row.to(tl.int64) * y_stride + n
    tl.store(out, tl.load(out, n < OUT, 0.0).to(tl.float32) + tl.load(d + row * OUT + n, n < OUT, 0.0), n < OUT)


def decodes(x: Tensor, b: list[Tensor]) -> bool:
    """Whether the kernels for few rows with a B each take ``x``."""
    rank = b[0].shape[3]
    return x.shape[0] <= ROWS and rank >= 16 and rank & (rank - 1) == 0


def parts_of(x: Tensor, a_RI: Tensor) -> Tensor:
    """Room for x A^T in parts that are to be added up, float32 [parts, N, R]."""
    blocks = -(-x.shape[1] // BLOCK_K)
    return torch.empty(-(-blocks // -(-blocks // SPLITS)), x.shape[0], a_RI.shape[0], device=x.device)


def by_rows(y: Tensor, x: Tensor, a_RI: Tensor, b: list[Tensor], slots: Tensor, parts: Tensor, add: bool) -> None:
    """y = x A^T B^T, or with ``add`` y += that, where few rows have a B each: B is read once, at the memory's speed, and the
    order of sums is fixed. ``parts``: of `parts_of`. Other arguments as for `session_lora`."""
    (N, K), (splits, _, R) = x.shape, parts.shape
    sizes: dict[str, Any] = {"R": R, "PER": -(-K // (BLOCK_K * splits)), "BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K}
    _shrink[(splits, -(-N // BLOCK_M))](x, a_RI, parts, N, K, x.stride(0), **sizes)
    sizes = {"R": R, "SPLITS": splits, "PADDED": triton.next_power_of_2(splits), "BLOCK_N": BLOCK_N, "TIMES": TIMES, "ADD": add}
    offset = 0
    for part in b:
        out, to = part.shape[2], y[:, offset:]
        _expand[(-(-out // (BLOCK_N * TIMES)), N)](parts, part, to, slots, N, out, y.stride(0), part.stride(0), **sizes)
        offset += out


def add_rows(y: Tensor, d: Tensor, slots: Tensor) -> None:
    """y += d, [N, out] float32, in rows that have a slot."""
    N, out = d.shape
    sizes: dict[str, Any] = {"BLOCK": BLOCK_ADD}
    _add[(-(-out // BLOCK_ADD), N)](y, d, slots, out, y.stride(0), **sizes)


def session_lora(
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
    if decodes(x, b):
        by_rows(y, x, a[0, 0], b, slots, parts_of(x, a[0, 0]), add=True)
        return
    r = x @ a[0, 0].T
    lora_expand(r.unsqueeze(0).expand(len(b), -1, -1).contiguous(), b, y, slots, by_slot, counts, starts, active, no_lora,
                num_active, offset_start=0, add_inputs=True)  # fmt: skip


def _session_lora_fake(
    y: Tensor, x: Tensor, a: Tensor, b: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor, starts: Tensor,
    active: Tensor, no_lora: Tensor, num_active: Tensor,
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
