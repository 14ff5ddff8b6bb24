"""Once a request: the losses of its last chunk under several multiples of the B that served it, before the chunk is learned.

What is measured goes before everything else that waits for the session, so its master is still what the request met, or a copy
of that is kept for as long as the prompt is being read; and its slot stays as it is until then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker import scale
from vllm_ttt.worker.backlog import Backlog, Chunk
from vllm_ttt.worker.clock import Clock, to_host
from vllm_ttt.worker.compute import Compute
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.past import Before, PastPool
from vllm_ttt.worker.scaled import STRIDE

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Rows under one scale that take as long as learning a row: a forward of the tail, where learning is one and a backward.
ROWS_PER_TOKEN = 3


@dataclass(slots=True, eq=False)
class Measurement:
    chunk: Chunk
    #: rows that have been measured
    done: int = 0
    #: [scales], their weighted losses
    sums: Tensor | None = None

    @property
    def rows(self) -> int:
        return -(-self.chunk.rows // STRIDE)


class Measuring:
    def __init__(
        self,
        learn: LearnConfig,
        compute: Compute,
        backlog: Backlog,
        deltas: Deltas,
        clock: Clock,
        pool: PastPool | None = None,
    ):
        """``pool``: where the past of each chunk is; None where its rows do not attend to one another."""
        self.pool = pool
        self.learn, self.compute, self.backlog, self.deltas, self.clock = learn, compute, backlog, deltas, clock
        self.on = len(learn.scales) > 1
        self.scales = scale.measured(learn.scales)
        self.waiting: deque[Measurement] = deque()
        self.pinned: list[int] = []
        #: measurements whose values are on their way to the host, with those values and the mark behind them
        self.outcomes: deque[tuple[list[Measurement], Tensor, Any]] = deque()

    def sessions(self) -> set[int]:
        """Sessions that wait to be measured: nothing of them is learned before, and their slots stay."""
        self._take_in()
        return {m.chunk.session for m in self.waiting}

    def run(self, tokens: int) -> int:
        """Measure what waits, as far as the time for learning ``tokens`` tokens suffices; returns how many that took."""
        self._take_in()
        left = tokens
        while left > 0 and (batch := self._pick(left)):
            try:
                self._step(batch)
            except Exception:
                self.drop(m.chunk for m, _ in batch)
                raise
            finally:
                self._unpin()
            left -= self._cost(sum(rows for _, rows in batch))
        return tokens - max(left, 0)

    def collect(self, wait: bool = False) -> list[int]:
        """Take in the losses that have come home; returns the sessions that should be served with another scale."""
        moved = []
        while self.outcomes and (wait or self.clock.done(self.outcomes[0][2])):
            measurements, values, mark = self.outcomes.popleft()
            self.clock.wait(mark)
            for measurement, losses in zip(measurements, values.tolist(), strict=True):
                chunk = measurement.chunk
                session = self.deltas.sessions.get(chunk.session)
                if session is None or not all(map(math.isfinite, losses)):
                    continue  # dropped meanwhile; or not finite, which says nothing
                assert chunk.scale is not None
                chunk.measured = losses[0], scale.loss_at(chunk.scale, self.scales, losses)
                share = chunk.rows / self.backlog.chunk
                session.losses = scale.add(session.losses, self.learn.scales, losses, share, self.learn.scale_memory)
                session.chosen = scale.choose(session.losses, self.learn.scales, self.learn.scale_rate)
                if session.wanted != session.scale:
                    moved.append(chunk.session)
        return moved

    def state(self, key: int) -> dict[str, Any]:
        """What people see of a session: the scale that its losses speak for, the one that is served, and those losses."""
        session = self.deltas.sessions.get(key) or self.deltas.fresh()
        losses = [{"scale": s, "loss": round(x, 6)} for s, x in zip(self.learn.scales, session.losses, strict=True)]
        return {"scale": session.chosen, "scale_served": session.scale, "scale_losses": losses}

    def drop(self, chunks: Iterable[Chunk]) -> None:
        """These chunks will not be learned, and their pages are free."""
        gone = set(chunks)
        self._take_in()
        self.waiting = deque(m for m in self.waiting if m.chunk not in gone)

    def _take_in(self) -> None:
        while self.backlog.last:
            chunk = self.backlog.last.popleft()
            if self.on:
                chunk.scale = self.deltas.session(chunk.session).scale
                self.waiting.append(Measurement(chunk))

    def _pick(self, tokens: int) -> list[tuple[Measurement, int]]:
        """The next rows of as many sessions as fit: those that were served with their master together, another one alone."""
        batch: list[tuple[Measurement, int]] = []
        left, seen = tokens * ROWS_PER_TOKEN // len(self.scales), set()
        for m in self.waiting:
            key = m.chunk.session
            alone = self.deltas.session(key).serving is not None
            if left <= 0 or (alone and batch):
                break
            count = min(m.rows - m.done, left) if self.pool is None else m.chunk.rows
            if batch and count > left:
                continue  # rows that attend to one another are measured together
            if key in seen or not (alone or self._pin(key)):
                continue
            seen.add(key)
            batch.append((m, count))
            left -= count
            if alone:
                break
        return batch

    def _cost(self, rows: int) -> int:
        return -(-rows * len(self.scales) // ROWS_PER_TOKEN)

    def _pin(self, key: int) -> bool:
        """Keep the session's row for the next step; False where every row is taken."""
        if self.deltas.row(key) is None:
            return False
        if key not in self.deltas.pinned:  # else by a chunk that is half learned
            self.deltas.begin_chunk(key)
            self.pinned.append(key)
        return True

    def _unpin(self) -> None:
        for key in self.pinned:
            self.deltas.end_chunk(key)
        self.pinned.clear()

    def _step(self, batch: list[tuple[Measurement, int]]) -> None:
        stride = STRIDE if self.pool is None else 1
        flat = self.backlog.rows_of([(m.chunk, m.done * stride, count) for m, count in batch], stride)
        weight = torch.zeros(flat.shape)
        for s, (m, count) in enumerate(batch):
            weight[s, : count : STRIDE // stride] = 1.0 / m.rows
        keys = [m.chunk.session for m, _ in batch]
        served = self.deltas.session(keys[0]).serving
        rows = torch.tensor([self.deltas.rows[key] for key in keys] if served is None else [self.deltas.spare])
        before = None if self.pool is None else Before(self.pool, [m.chunk for m, _ in batch])
        values_SK = self.compute.measure(flat, weight, rows, served, before)
        for (m, count), values_K in zip(batch, values_SK, strict=True):
            m.sums = values_K.clone() if m.sums is None else m.sums + values_K
            m.done = m.rows if self.pool is not None else m.done + count
        complete = [m for m, _ in batch if m.done == m.rows]
        if complete:
            values = to_host(torch.stack([m.sums for m in complete if m.sums is not None]))
            self.outcomes.append((complete, values, self.clock.mark()))
            self.waiting = deque(m for m in self.waiting if m not in complete)
