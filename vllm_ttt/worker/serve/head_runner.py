"""vLLM's model runner on the CPU with the preset `head`, and what it shares with that of CUDA (gpu_head.py).

While it asks the model for logits, the states of sessions get their delta. Those that it keeps are as the model gave them: what
is learned never sees a delta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ttt.patches import _contract
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.serve.replaced import replaced


def sampled_rows(scheduler_output: Any, request: str) -> int:
    """Model runner V1: how many logits a request of the batch has. One follows each draft of its next tokens."""
    return 1 + len(scheduler_output.scheduled_spec_decode_tokens.get(request, ()))


class Adapting:
    """What both have in common. A batch without a row of a session goes straight through."""

    ttt_slots: HeadSlots
    #: counts and logs an exception that is being handled
    ttt_failed: Callable[[str], None]

    @classmethod
    def adopt(cls, runner: Any, slots: HeadSlots, failed: Callable[[str], None]) -> None:
        """Put this class in front of the live runner's own. Raises PatchContractError where that is not what we know."""
        cls.ttt_check()
        runner.__class__ = type(cls.__name__, (cls, type(runner)), {})
        runner.ttt_slots, runner.ttt_failed = slots, failed

    @classmethod
    def ttt_check(cls) -> None:
        raise NotImplementedError

    def ttt_adapt(self, states: Tensor, rows: list[str | None]) -> Tensor:
        """``rows``: whose request each state is. Where it fails, the base model answers."""
        try:
            if len(rows) != len(states):
                raise RuntimeError(f"{len(states)} states of {len(rows)} requests")
            return self.ttt_slots.adapt(states, rows)
        except Exception:
            self.ttt_failed("the deltas of a batch could not be applied; the base model answers")
            return states

    def ttt_adapted(
        self, compute: Callable[..., Tensor], rows_of: Callable[[Tensor], list[str | None]]
    ) -> Callable[..., Tensor]:
        """The model's ``compute_logits`` for states of which ``rows_of`` says whose they are."""

        def compute_logits(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return compute(self.ttt_adapt(states, rows_of(states)), *args, **kwargs)

        return compute_logits


class HeadRunnerV1(Adapting):
    """Model runner V1 (CPU): logits of sampled tokens are made in ``execute_model``, rows of each request in its order."""

    model: Any
    input_batch: Any
    num_prompt_logprobs: dict[str, int]
    query_start_loc: Any

    @classmethod
    def ttt_check(cls) -> None:
        _contract.check(GPUModelRunner, "execute_model", "self scheduler_output intermediate_tensors")
        _contract.check(GPUModelRunner, "_get_prompt_logprobs_dict", "self hidden_states num_scheduled_tokens")

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        execute = super().execute_model  # type: ignore[misc]
        if not self.ttt_slots.serves(scheduler_output.num_scheduled_tokens):
            return execute(scheduler_output, intermediate_tensors)

        def whose(_: Tensor) -> list[str | None]:
            return [name for name in self.input_batch.req_ids for _ in range(sampled_rows(scheduler_output, name))]

        adapted = self.ttt_adapted(self.model.compute_logits, whose)
        with replaced(self.model, "compute_logits", adapted):
            return execute(scheduler_output, intermediate_tensors)

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        compute = super()._get_prompt_logprobs_dict  # type: ignore[misc]
        asked = [name for name in self.num_prompt_logprobs if name in num_scheduled_tokens]
        if not self.ttt_slots.serves(asked):
            return compute(hidden_states, num_scheduled_tokens)
        # vLLM asks for the logits of one request after another, of rows that are a part of ``hidden_states``.
        begins = self.query_start_loc.np
        by_row = {int(begins[self.input_batch.req_id_to_index[name]]): name for name in asked}

        def whose(states: Tensor) -> list[str | None]:
            first = (states.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
            return [by_row.get(first)] * len(states)

        with replaced(self.model, "compute_logits", self.ttt_adapted(self.model.compute_logits, whose)):
            return compute(hidden_states, num_scheduled_tokens)
