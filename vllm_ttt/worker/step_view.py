"""Which rows of a batch belong to which request, and what token follows each: the one thing that differs between vLLM's
model runners. A runner gets a function here; the rest of the worker knows none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
            tokens = torch.from_numpy(batch.token_ids_cpu[index, position + 1 : known + 1].copy()).long()
            rows.append(Rows(request, first, position, tokens))
        first += count
    return rows
