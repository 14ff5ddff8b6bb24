"""The guard's text as the last layer sees it: captured once, through the model that is served, and kept.

With `last`, neither the residual stream nor the attention output of the last layer depends on a delta, so what a delta does to
the text is a forward of the tail over these rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.micro_step import Delta, Tail, accumulate
from vllm_ttt.worker.step_view import Rows


class Probe:
    """Shapes: h [P, D], a [P, Q], t [P] int64; the first ``rows`` of P are filled."""

    def __init__(self, rows: int, h_ND: Tensor, a_NQ: Tensor):
        """Allocate room for ``rows`` rows like those of the capture buffers."""
        self.h_PD = h_ND.new_zeros(rows, h_ND.shape[1])
        self.a_PQ = a_NQ.new_zeros(rows, a_NQ.shape[1])
        self.t_P = torch.zeros(rows, dtype=torch.int64, device=h_ND.device)
        self.rows = 0
        #: requests that are being read, and the pair of each that comes next
        self.reading: dict[str, tuple[RequestPlan, int]] = {}

    def start(self, request: str, plan: RequestPlan) -> None:
        self.reading[request] = plan, 0

    def take(self, view: list[Rows], h_ND: Tensor, a_NQ: Tensor) -> None:
        """Keep the rows of the probe's requests, each once."""
        for rows in view:
            plan, expected = self.reading[rows.request]
            skip = expected - rows.position  # what a preempted request computes again
            count = min(len(rows.next_tokens), plan.prompt - 1 - rows.position) - skip
            count = min(count, len(self.t_P) - self.rows)
            if count > 0 and skip >= 0:
                source, target = slice(rows.first + skip, rows.first + skip + count), slice(self.rows, self.rows + count)
                self.h_PD[target], self.a_PQ[target] = h_ND[source], a_NQ[source]
                self.t_P[target] = rows.next_tokens[skip : skip + count]
                self.rows += count
                self.reading[rows.request] = plan, expected + count

    def finish(self, request: str) -> None:
        self.reading.pop(request, None)

    @property
    def ready(self) -> bool:
        """Whether it has been read, as far as there is room."""
        return self.rows > 0 and not self.reading

    def loss(self, tail: Tail, delta: Delta, first: int, end: int) -> Tensor:
        """[1] float32: the sum of the losses of some rows in nats, under ``delta``, one session's in the tail's dtype."""
        rows = slice(first, end)
        weight = torch.ones(1, end - first, device=self.t_P.device)
        return accumulate(tail, delta, self.h_PD[None, rows], self.a_PQ[None, rows], self.t_P[None, rows], weight, None)
