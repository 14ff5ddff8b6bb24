"""vLLM's model runner V2 (CUDA), which mixes a session's cache into the logits of the model, before anything is made of them.

As cpu_runner.py, but the host does not know yet what was sampled last: it says which rows are whose, and the kernels of
worker/ngrams/mixing_cuda.py read the tokens where vLLM keeps them. The model's graphs have no part in it: logits are made after
them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm_ttt.patches import _contract
from vllm_ttt.worker.ngrams.caches import Caches
from vllm_ttt.worker.ngrams.ngrams import NGrams
from vllm_ttt.worker.ngrams.tables import Tables, places
from vllm_ttt.worker.serve.gpu_head import PROMPT, PROMPT_IDS, asked_prompts, reading
from vllm_ttt.worker.serve.replaced import replaced


class MixingRunnerV2:
    """Goes in front of the live runner's own class. A batch without a request that has a cache goes straight through."""

    model: Any
    req_states: Any
    ttt_caches: Caches
    ttt_tables: Tables
    #: counts and logs an exception that is being handled
    ttt_failed: Callable[[str], None]

    @staticmethod
    def ttt_check() -> None:
        """Raises PatchContractError where vLLM's is not what this was written for."""
        _contract.check(GPUModelRunner, "sample", "self hidden_states input_batch grammar_output")
        _contract.check(PromptLogprobsWorker, "compute_prompt_logprobs", PROMPT)
        _contract.check(PromptLogprobsWorker, "compute_prompt_token_id_logprobs", PROMPT_IDS)

    @classmethod
    def adopt(cls, runner: Any, caches: Caches, tables: Tables, failed: Callable[[str], None]) -> None:
        """Raises as `ttt_check`."""
        cls.ttt_check()
        runner.__class__ = type(cls.__name__, (cls, type(runner)), {})
        runner.ttt_caches, runner.ttt_tables, runner.ttt_failed = caches, tables, failed
        caches.tables = tables
        prompts = runner.prompt_logprobs_worker
        for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
            setattr(prompts, name, _of_prompts(runner, getattr(prompts, name)))

    @torch.inference_mode()
    def ttt_warm_up(self, hidden: int, dtype: torch.dtype) -> None:
        """Compile the kernels, which the first request of a session would wait for: on what the model says of a state."""
        states = torch.zeros(1, hidden, dtype=dtype, device=self.ttt_tables.keys.device)
        logits = self.model.compute_logits(states)
        first = torch.zeros(1, dtype=torch.int64, device=states.device)
        for rows in ([0], [-1]):  # a table of nothing: no logit moves
            self.ttt_mix(logits, places(self.ttt_tables, rows, [0]), first, first)

    def ttt_mix(self, logits: Tensor, where: Tensor, indices: Tensor, positions: Tensor) -> None:
        from vllm_ttt.worker.ngrams.mixing_cuda import mix  # it needs Triton

        mix(logits, where, indices, positions, self.req_states.all_token_ids.gpu, self.ttt_tables)

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        sample = super().sample  # type: ignore[misc]
        where = self.ttt_where(input_batch) if self.ttt_caches.requests else None
        if where is None:
            return sample(hidden_states, input_batch, grammar_output)
        compute: Callable[..., Tensor] = self.model.compute_logits

        def mixed(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = compute(states, *args, **kwargs)
            try:
                self.ttt_mix(logits, where, input_batch.logits_indices, input_batch.positions)
            except Exception:
                self.ttt_failed("the caches of a batch could not be mixed in")
            return logits

        with replaced(self.model, "compute_logits", mixed):
            return sample(hidden_states, input_batch, grammar_output)

    def ttt_where(self, batch: Any) -> Tensor | None:
        """The `places` of the rows that are sampled; None: nothing is mixed into any."""
        try:
            served = self.ttt_served(batch, _sampling(batch) if reading(batch).any() else self.ttt_caches.requests)
            if not any(served):
                return None
            ends, states = batch.cu_num_logits_np[: len(served) + 1], batch.idx_mapping_np[: len(served)]
            batch_is, tables = (served, ends.tobytes(), states.tobytes()), self.ttt_tables
            if tables.last is None or tables.last[0] != batch_is:  # while it decodes, it is the one before
                where = places(tables, *self.ttt_rows(served, states, ends))
                tables.last = batch_is, where
            return tables.last[1]
        except Exception:
            self.ttt_failed("the caches of a batch could not be brought to the device")
            return None

    def ttt_of_prompts(self, logits_fn: Callable[..., Tensor], hidden_states: Tensor, batch: Any) -> Callable[..., Tensor]:
        """``logits_fn`` for rows of ``hidden_states``, with the caches of requests whose prompt is being read."""
        if not self.ttt_caches.requests:
            return logits_fn
        try:
            served = self.ttt_served(batch, asked_prompts(self, batch))
            if not any(served):
                return logits_fn
            found = self.ttt_rows(served, batch.idx_mapping_np[: len(served)], batch.query_start_loc_np[: len(served) + 1])
        except Exception:
            self.ttt_failed("the cache of a prompt could not be brought to the device")
            return logits_fn

        def mixed(part: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = logits_fn(part, *args, **kwargs)
            try:
                first = int(part.storage_offset() - hidden_states.storage_offset()) // hidden_states.stride(0)
                rows, states = (x[first : first + len(part)] for x in found)
                if max(rows, default=-1) >= 0:
                    indices = torch.arange(first, first + len(part), device=part.device)
                    self.ttt_mix(logits, places(self.ttt_tables, rows, states), indices, batch.positions)
            except Exception:
                self.ttt_failed("the cache of a prompt could not be mixed in")
            return logits

        return mixed

    def ttt_served(self, batch: Any, asked: Container[str]) -> list[tuple[int, NGrams] | None]:
        """Of each request of the batch as `Caches.serving` says; None, too, for those that are not ``asked``."""
        serving = self.ttt_caches.serving
        return [serving(name) if name in asked else None for name in batch.req_ids]

    def ttt_rows(
        self, served: list[tuple[int, NGrams] | None], states: NDArray[np.integer], ends: NDArray[np.integer]
    ) -> tuple[list[int], list[int]]:
        """Of each row of logits the row of its session in the tables, -1 where nothing is mixed in, and the state of its
        request.

        Args:
            states: [requests].
            ends: [requests + 1], where the rows of each begin and end.
        """
        keep, index_of = {key for key, _ in filter(None, served)}, self.ttt_caches.indexes.of
        rows = [-1 if x is None else self.ttt_tables.row(*x, index_of, keep) for x in served]
        each = np.diff(ends)
        return np.repeat(rows, each).tolist(), np.repeat(states, each).tolist()


def _sampling(batch: Any) -> set[str]:
    """The requests of a batch that sample: of a prompt that has been read in part nobody does."""
    read = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens >= batch.prefill_len_np
    return {name for name, done in zip(batch.req_ids, read.tolist(), strict=True) if done}


def _of_prompts(runner: Any, compute: Any) -> Any:
    """A method of vLLM's worker for the logits of prompts that is given the mixed logits."""

    def mixing(logits_fn: Any, hidden_states: Tensor, input_batch: Any, *args: Any) -> Any:
        return compute(runner.ttt_of_prompts(logits_fn, hidden_states, input_batch), hidden_states, input_batch, *args)

    return mixing
