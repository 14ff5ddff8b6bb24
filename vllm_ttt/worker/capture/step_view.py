"""Which rows of a batch belong to which request, and what token follows each: the one thing that differs between vLLM's
model runners. A runner gets a function here; the rest of the worker knows none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.ngrams.stream import BREAK, LONGEST

#: Tokens before the first row of a request that are looked up with it: with that row's, the longest context of a cache.
BEFORE = LONGEST - 1


@dataclass(slots=True)
class Rows:
    """Consecutive rows of one request in the buffers of `Capture`, as far as the token that follows each is known."""

    request: str
    #: index of the first row in the buffers
    first: int
    #: position of the first row in its request
    position: int
    #: [rows] int64, the token that follows
    next_tokens: Tensor
    #: [rows] int64, the token itself; None: nobody asks
    tokens: Tensor | None = None
    #: int64, tokens before ``position``, the last few; None: nobody asks
    before: Tensor | None = None

    def context(self, position: int, left_out: list[tuple[int, int]]) -> Tensor | None:
        """The tokens up to the one at ``position``, LONGEST at most; BREAK for those after pairs that are ``left_out``, ranges
        (first, end). None: nobody asked for them."""
        if self.tokens is None or self.before is None:
            return None
        found = torch.cat((self.before, self.tokens[: position - self.position + 1]))[-LONGEST:]
        start = position - len(found)  # the pair of the first of them
        for first, end in left_out:
            if first < position and end > start:
                found[max(0, first - start) : end - start] = BREAK
        return found


def view_v1(runner: Any, scheduler_output: Any, wanted: Any) -> list[Rows]:
    """Model runner V1 (vllm/v1/worker/gpu_model_runner.py), synchronous scheduling, after ``sample_tokens``.

    Args:
        scheduler_output: of the step that has just run; the runner's input batch still describes it.
        wanted: request ids to return, a container.
    """
    batch, rows, first = runner.input_batch, [], 0
    for index, request in enumerate(batch.req_ids):
        count = scheduler_output.num_scheduled_tokens[request]
        if request in wanted:
            position = int(batch.num_computed_tokens_cpu[index])
            known = min(position + count, int(batch.num_tokens_no_spec[index]) - 1)
            tokens = torch.from_numpy(batch.token_ids_cpu[index, position : known + 1].copy()).long()
            before = torch.from_numpy(batch.token_ids_cpu[index, max(0, position - BEFORE) : position].copy()).long()
            rows.append(Rows(request, first, position, tokens[1:], tokens[:-1], before))
        first += count
    return rows


def view_v2(runner: Any, batch: Any, wanted: Any) -> list[Rows]:
    """Model runner V2 (vllm/v1/worker/gpu/model_runner.py), after ``sample_tokens``: every next token is known on the device.

    Args:
        batch: the InputBatch of the step.
        wanted: request ids to return, a container.
    """
    spans, states, positions = [], [], []
    for index, request in enumerate(batch.req_ids):
        if request in wanted:
            count = int(batch.num_scheduled_tokens[index])
            position = int(batch.num_computed_tokens_np[index])
            spans.append((request, int(batch.query_start_loc_np[index]), position))
            where = torch.arange(max(0, position - BEFORE), position + count + 1)
            states.append(torch.full_like(where, int(batch.idx_mapping_np[index])))
            positions.append(where)
    if not spans:
        return []
    tokens = runner.req_states.all_token_ids.gpu
    where = to_device(torch.stack((torch.cat(states), torch.cat(positions))), batch.input_ids.device)
    view, parts = [], tokens[where[0], where[1]].long().split([len(x) for x in positions])
    for (request, first, position), part in zip(spans, parts, strict=True):
        before = min(position, BEFORE)
        view.append(Rows(request, first, position, part[before + 1 :], part[before:-1], part[:before]))
    return view
