"""The guard's text as it enters the first adapted layer: captured once, through the model that is served, and kept.

Neither the residual stream nor the attention output of that layer depends on a delta, so what a delta does to the text is a
forward of the tail over these rows. With several adapted layers the rows of a piece attend to one another, and to nothing else;
with all of them, the tokens are all that is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.kv_cache import KVCache
from vllm_ttt.worker.capture.past import PastSource
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.micro_step import Tail, accumulate


class Probe:
    """Shapes: h [P, D], a [P, Q], x and t [P] int64, the tokens and those that follow them."""

    def __init__(self, rows: int, h_ND: Tensor, a_NQ: Tensor, cache: KVCache | None = None):
        """Allocate room for ``rows`` rows like those of the capture buffers.

        Args:
            cache: as for `Trainer`; None where the rows do not attend to one another.
        """
        self.cache = cache
        self.h_PD = h_ND.new_zeros(rows, h_ND.shape[1])
        self.a_PQ = a_NQ.new_zeros(rows, a_NQ.shape[1])
        self.x_P = torch.zeros(rows, dtype=torch.int64, device=h_ND.device)
        self.t_P = torch.zeros_like(self.x_P)
        #: rows that are a request's, and those that there will be
        self.taken = self.wanted = 0
        #: a part of the text was lost: all of it comes again
        self.broken = False
        #: requests that are being read: the pair of each that comes next, and their rows, which are consecutive
        self.reading: dict[str, tuple[int, range]] = {}
        #: the rows that have been read, those that are tried together
        self.pieces: list[range] = []

    def start(self, request: str, plan: RequestPlan) -> None:
        if self.broken:
            self.taken, self.broken = 0, False
            self.reading.clear()
            self.pieces.clear()
        self.wanted = min(plan.probe, len(self.t_P))
        count = min(plan.prompt - 1, len(self.t_P) - self.taken)
        self.reading[request] = 0, range(self.taken, self.taken + count)
        self.taken += count

    def take(self, view: list[Rows], h_ND: Tensor, a_NQ: Tensor) -> None:
        """Keep the rows of the probe's requests, each once."""
        for rows in view:
            expected, place = self.reading[rows.request]
            skip = expected - rows.position  # what a preempted request computes again
            count = min(len(rows.next_tokens) - skip, len(place) - expected)
            if count > 0 and skip >= 0:
                first = place.start + expected
                source, target = slice(rows.first + skip, rows.first + skip + count), slice(first, first + count)
                self.h_PD[target], self.a_PQ[target] = h_ND[source], a_NQ[source]
                self.t_P[target] = rows.next_tokens[skip : skip + count]
                if rows.tokens is not None:
                    self.x_P[target] = rows.tokens[skip : skip + count]
                self.reading[rows.request] = expected + count, place

    def finish(self, request: str) -> None:
        """The request has ended. Where one was not read to its end, nothing is tried before all have been read again."""
        read, piece = self.reading.pop(request, (0, range(0)))
        if not read == len(piece) > 0:
            self.broken = self.broken or read < len(piece)
            return
        if not self.whole and self.pieces and self.pieces[-1].stop == piece.start:
            piece = range(self.pieces.pop().start, piece.stop)
        self.pieces.append(piece)

    @property
    def rows(self) -> int:
        return sum(map(len, self.pieces))

    @property
    def whole(self) -> bool:
        """Whether its pieces are tried whole: their rows attend to one another."""
        return self.cache is not None

    @property
    def ready(self) -> bool:
        """Whether all of it has been read, as far as there is room."""
        return bool(self.pieces) and not self.reading and self.rows >= self.wanted

    def next(self, done: int, most: int) -> range:
        """What to try where ``done`` rows have been: at most ``most``, but all that attend to one another."""
        for piece in self.pieces:
            if done < len(piece):
                return piece if self.whole else piece[done : done + most]
            done -= len(piece)
        return range(0)

    def loss(self, tail: Tail | Head, delta: Delta, rows: range) -> Tensor:
        """[1] float32: the sum of the losses of some rows in nats, under ``delta``, one session's in the tail's dtype."""
        at, count = slice(rows.start, rows.stop), len(rows)
        weight = torch.ones(1, count, device=self.t_P.device)
        past = None if self.cache is None else PastSource(self.cache, ()).past(1, count).to(self.t_P.device)
        h, a = tail.entering(self.h_PD[None, at], self.a_PQ[None, at], self.x_P[None, at])
        return accumulate(tail, delta, h, a, self.t_P[None, at], weight, None, past)
