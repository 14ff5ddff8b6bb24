"""vLLM's CPU model runner, which mixes a session's cache into the logits of the model, before anything is made of them.

What comes after (structured output, logit_bias, min_tokens, penalties, temperature, top-k, and the log-probabilities that are
reported) works on the mixed logits as it does on the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ttt.patches import _contract
from vllm_ttt.worker.ngrams.caches import Caches
from vllm_ttt.worker.ngrams.mixing import mix
from vllm_ttt.worker.ngrams.stream import LONGEST, Tokens
from vllm_ttt.worker.serve.head_runner import sampled_rows
from vllm_ttt.worker.serve.replaced import replaced


class MixingModelRunner(CPUModelRunner):
    """Takes the place of vLLM's (by ``__class__``). A batch without a request that has a cache goes straight through."""

    ttt_caches: Caches
    #: counts and logs an exception that is being handled
    ttt_failed: Callable[[str], None]

    @staticmethod
    def ttt_check() -> None:
        """Raises PatchContractError where vLLM's is not what this was written for."""
        _contract.check(GPUModelRunner, "execute_model", "self scheduler_output intermediate_tensors")
        _contract.check(GPUModelRunner, "_get_prompt_logprobs_dict", "self hidden_states num_scheduled_tokens")

    @classmethod
    def adopt(cls, runner: Any, caches: Caches, failed: Callable[[str], None]) -> None:
        """Raises as `ttt_check`."""
        cls.ttt_check()
        runner.__class__ = cls
        runner.ttt_caches, runner.ttt_failed = caches, failed

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        output = super().execute_model(scheduler_output, intermediate_tensors)
        state, requests = self.execute_model_state, self.ttt_caches.requests
        if state is not None and any(name in requests for name in scheduler_output.num_scheduled_tokens):
            try:
                self.execute_model_state = state._replace(logits=self._sampled(scheduler_output, state.logits))
            except Exception:
                self.ttt_failed("the caches of a batch could not be mixed in")
        return output

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        requests, begins = self.ttt_caches.requests, self.query_start_loc.np
        asked = [name for name in self.num_prompt_logprobs if name in requests and name in num_scheduled_tokens]
        if not asked:
            return super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
        # vLLM asks for the logits of one request after another, of rows that are a part of ``hidden_states``.
        by_row = {int(begins[self.input_batch.req_id_to_index[name]]): name for name in asked}
        compute: Callable[..., Tensor] = self.model.compute_logits  # pyright: ignore[reportAssignmentType]

        def mixed(rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = compute(rows, *args, **kwargs)
            first = (rows.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
            return logits if (name := by_row.get(first)) is None else self._prompt(name, logits)

        with replaced(self.model, "compute_logits", mixed):
            return super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)

    def _sampled(self, scheduler_output: Any, logits: Tensor) -> Tensor:
        """The logits of the tokens that are sampled: rows of each request of the batch, in its order."""
        batch, wanted = self.input_batch, dict[int, tuple[list[int], list[Tokens]]]()
        found, next_row = {}, 0
        for index, name in enumerate(batch.req_ids):
            first, count = next_row, sampled_rows(scheduler_output, name)
            next_row += count
            if (key := self.ttt_caches.requests.get(name)) is None:
                continue
            last = int(batch.num_computed_tokens_cpu[index]) + scheduler_output.num_scheduled_tokens[name]
            if last < int(batch.num_prompt_tokens[index]) or (served := self.ttt_caches.served(name)) is None:
                continue  # a prompt that has been read in part: nobody samples
            found[key] = served
            rows, befores = wanted.setdefault(key, ([], []))
            for row, end in enumerate(range(last - count + 1, last + 1), first):  # each draft is what comes before the next row
                rows.append(row)
                befores.append(batch.token_ids_cpu[index, max(0, end - LONGEST) : end].copy())
        if not found:
            return logits
        logits = logits.float()  # as vLLM's sampler does; for other rows of the batch it changes nothing
        for key, (rows, befores) in wanted.items():
            mix(logits, rows, befores, *found[key])
        return logits

    def _prompt(self, name: str, logits: Tensor) -> Tensor:
        """The logits of a part of a request's prompt."""
        try:
            if (served := self.ttt_caches.served(name)) is None:
                return logits
            request = self.requests[name]
            tokens, first = np.array(request.prompt_token_ids, np.int32), request.num_computed_tokens + 1
            befores = [tokens[max(0, end - LONGEST) : end] for end in range(first, first + len(logits))]
            mixed = logits.float()
            mix(mixed, range(len(befores)), befores, *served)
            return mixed
        except Exception:
            self.ttt_failed("the cache of a prompt could not be mixed in")
            return logits
