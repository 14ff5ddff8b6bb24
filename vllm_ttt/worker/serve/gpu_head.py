"""The preset `head` on CUDA: model runner V2 (vllm/v1/worker/gpu/model_runner.py), and a kernel for batches that decode.

The model's graphs have no part in it: logits of sampled tokens are made after them, and so are those of prompts.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm_ttt.patches import _contract
from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.serve.head_runner import Adapting
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.serve.replaced import replaced

#: Up to so many rows, sampled ones for the most part, take the kernel that reads a B for each row.
ROWS = 256
BLOCK_D, BLOCK_R = 32, 128

PROMPT = "self logits_fn hidden_states input_batch all_token_ids num_computed_tokens prompt_lens"
PROMPT_IDS = "self logits_fn hidden_states input_batch prompt_lens"


# No annotation but constexpr: Triton looks any other name up among the globals of the kernel, and does not compile.
@triton.jit
def _move_rows(r, b, y, slots, y_stride, b_stride, D, R, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """y[t, d] += sum_k r[t, k] b[slots[t], d, k]; a row of slot -1 is not touched. Grid: (D / BLOCK_D, rows)."""
    row = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = b + slot.to(tl.int64) * b_stride
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, R, BLOCK_R):
        k = first + tl.arange(0, BLOCK_R)
        inside = (d[:, None] < D) & (k[None, :] < R)
        weights = tl.load(own + d[:, None] * R + k[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(r + row * R + k, mask=k < R, other=0.0).to(tl.float32)
        total += tl.sum(weights * x[None, :], 1)
    out = y + row.to(tl.int64) * y_stride + d
    tl.store(out, tl.load(out, mask=d < D, other=0.0).to(tl.float32) + total, mask=d < D)


class GPUHeadSlots(HeadSlots):
    """With the kernel, for few rows."""

    def warm_up(self) -> None:
        """Compile the kernel, which the first request of a session would wait for."""
        self._moved(self.b_KDR.new_zeros(1, self.b_KDR.shape[1]), [-1])

    def _moved(self, y_ND: Tensor, slots: list[int]) -> Tensor:
        rows, D = y_ND.shape
        if rows > ROWS:
            return super()._moved(y_ND, slots)
        moved = y_ND.clone()
        r = (y_ND.to(self.b_KDR.dtype) @ self.head.ay_RD.T).contiguous()
        table = to_device(torch.tensor(slots, dtype=torch.int32), y_ND.device)
        sizes = cast("dict[str, Any]", {"BLOCK_D": BLOCK_D, "BLOCK_R": BLOCK_R})
        grid = triton.cdiv(D, BLOCK_D), rows
        _move_rows[grid](r, self.b_KDR, moved, table, moved.stride(0), self.b_KDR.stride(0), D, self.b_KDR.shape[2], **sizes)
        return moved


class HeadRunnerV2(Adapting):
    """Logits of sampled tokens are made in ``sample``, those of prompts by a worker of their own, which gets other states."""

    model: Any

    @classmethod
    def ttt_check(cls) -> None:
        _contract.check(GPUModelRunner, "sample", "self hidden_states input_batch grammar_output")
        _contract.check(PromptLogprobsWorker, "compute_prompt_logprobs", PROMPT)
        _contract.check(PromptLogprobsWorker, "compute_prompt_token_id_logprobs", PROMPT_IDS)

    @classmethod
    def adopt(cls, runner: Any, slots: HeadSlots, failed: Any) -> None:
        super().adopt(runner, slots, failed)
        assert isinstance(slots, GPUHeadSlots)
        slots.warm_up()
        prompts = runner.prompt_logprobs_worker
        for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
            setattr(prompts, name, _of_prompts(runner, getattr(prompts, name)))

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        sample = super().sample  # type: ignore[misc]
        if not self.ttt_slots.serves(input_batch.req_ids):
            return sample(hidden_states, input_batch, grammar_output)
        ends = input_batch.cu_num_logits_np

        def whose(_: Tensor) -> list[str | None]:
            return [name for i, name in enumerate(input_batch.req_ids) for _ in range(int(ends[i + 1]) - int(ends[i]))]

        with replaced(self.model, "compute_logits", self.ttt_adapted(self.model.compute_logits, whose)):
            return sample(hidden_states, input_batch, grammar_output)


def asked_prompts(runner: Any, batch: Any) -> dict[str, int]:
    """The requests of a batch whose prompts' logits somebody asked for while they are being read, and their places in it."""
    if not (begun := reading(batch)).any():
        return {}
    prompts = runner.prompt_logprobs_worker
    wanted, scored = prompts.uses_prompt_logprobs[batch.idx_mapping_np], prompts.token_id_scores
    if not (wanted.any() or scored):
        return {}
    return {name: i for i, name in enumerate(batch.req_ids) if begun[i] and (wanted[i] or name in scored)}


def reading(batch: Any) -> NDArray[np.bool_]:
    """[requests]: whose prompt is being read."""
    return batch.num_computed_prefill_tokens_np < batch.prefill_len_np


def _of_prompts(runner: Any, compute: Any) -> Any:
    """A method of vLLM's worker for the logits of prompts that is given the states of sessions with their delta."""

    def adapted(logits_fn: Any, hidden_states: Tensor, input_batch: Any, *args: Any) -> Any:
        asked = asked_prompts(runner, input_batch)
        if runner.ttt_slots.serves(asked):
            begins, rows = input_batch.query_start_loc_np, cast("list[str | None]", [None] * len(hidden_states))
            for name, i in asked.items():
                first, end = int(begins[i]), int(begins[i + 1])
                rows[first:end] = [name] * (end - first)
            hidden_states = runner.ttt_adapt(hidden_states, rows)
        return compute(logits_fn, hidden_states, input_batch, *args)

    return adapted
