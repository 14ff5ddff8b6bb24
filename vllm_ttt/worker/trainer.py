"""Takes chunks from the backlog, learns them into the masters in batches over sessions, and brings the slots up to date."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_ttt.config import TTTConfig
from vllm_ttt.types import ChunkReport, StepReport
from vllm_ttt.worker.backlog import Backlog, Chunk
from vllm_ttt.worker.clock import Clock, to_host
from vllm_ttt.worker.compute import Compute
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.memory import SMALLEST_SHARE
from vllm_ttt.worker.micro_step import Delta, Tail
from vllm_ttt.worker.past import PastPool
from vllm_ttt.worker.qkv import Past
from vllm_ttt.worker.slots import Slots

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own


@dataclass(slots=True)
class Tile:
    """Rows of one chunk, and the row of its session's master."""

    chunk: Chunk
    row: int
    rows: int

    @property
    def cost(self) -> int:
        """In tokens."""
        return max(self.rows, SMALLEST_SHARE)


@dataclass(slots=True)
class Outcome:
    """What a commit did, on its way to the host."""

    chunks: list[Chunk]
    #: whether the frozen loss was measured
    frozen: list[bool]
    #: what `Compute.apply` returns
    values: Tensor
    mark: Any


class Trainer:
    """One per worker. Not thread-safe: it runs between vLLM's iterations, on the same stream."""

    def __init__(
        self, tail: Tail, config: TTTConfig, backlog: Backlog, deltas: Deltas, slots: Slots, pool: PastPool | None = None
    ):
        """``pool``: where the past of each chunk is; None where the step needs none."""
        self.pool = pool
        self.config, self.backlog, self.deltas, self.slots = config, backlog, deltas, slots
        self.dtype = tail.head_VD.dtype
        self.compute = Compute(tail, config.learn, backlog, deltas)
        self.clock = Clock(tail.head_VD.device)
        self.outcomes: deque[Outcome] = deque()
        #: sessions whose slot does not follow their master yet
        self.dirty: set[int] = set()
        self.report = StepReport()
        self.errors = self.nonfinite = self.tokens_learned = 0

    def learn(self, tokens: int) -> int:
        """Learn up to ``tokens`` tokens of what waits; returns how many, each tile counted as its cost in tokens, and at most
        ``tokens``. Never raises: what fails is given up and counted."""
        left = tokens
        while left > 0 and (tiles := self._pick(left)):
            try:
                self._step(tiles)
            except Exception:
                self.failed("a micro-step failed; its chunks are given up and their sessions stay at their last version")
                for tile in tiles:
                    self._give_up(tile.chunk, "error")
            left -= sum(tile.cost for tile in tiles)
            if self.pool is not None:
                self.pool.sweep(self.backlog)
        return tokens - max(left, 0)

    def collect(self, wait: bool = False) -> None:
        """Take in the outcomes that have arrived; with ``wait``, all of them."""
        while self.outcomes and (wait or self.clock.done(self.outcomes[0].mark)):
            outcome = self.outcomes.popleft()
            self.clock.wait(outcome.mark)
            values = outcome.values.T.tolist()
            for chunk, measured, (ok, loss, frozen, *norms) in zip(outcome.chunks, outcome.frozen, values, strict=True):
                self.backlog.settle(chunk)
                if (session := self.deltas.sessions.get(chunk.session)) is None:
                    continue  # dropped meanwhile
                if ok:
                    session.version += 1
                    session.norms = norms
                    self.tokens_learned += chunk.rows
                reason = None if ok else ("loss" if self.compute.max_loss < loss < math.inf else "nonfinite")
                if reason == "nonfinite":
                    self.nonfinite += 1
                    if self.nonfinite <= 10 or self.nonfinite % 1000 == 0:
                        logger.warning(
                            "vllm-ttt: loss or gradient of a chunk is not finite; it is not learned (time %d)", self.nonfinite
                        )
                self._report_chunk(chunk, loss, frozen if measured else None, reason)

    def sync(self) -> None:
        """Write the slots of sessions whose master has moved, except where a prompt has been read in part."""
        self.collect()
        for key in self.dirty - self.backlog.reading_sessions():
            self.dirty.discard(key)
            if (session := self.deltas.sessions.get(key)) is None:
                continue
            try:
                self.slots.write(key, session)
            except Exception:
                self.failed("a slot could not be written; vLLM will fill another from the master")

    def take_report(self) -> StepReport:
        """What has happened since the last report. Requests of which all is learned and served are reported once."""
        self.collect()
        for chunk in self.backlog.short:
            self._report_chunk(chunk, math.nan, None, "short")
        self.backlog.short.clear()
        for request, key in self.backlog.settled():
            if key not in self.dirty:
                self.backlog.forget(request)
                self.report.settled.append((request, key))
        report, self.report = self.report, StepReport()
        report.pending = self.backlog.pending
        report.busy = bool(self.backlog.queues or self.dirty or self.outcomes or self.backlog.settled())
        return report

    def drop(self, key: int) -> None:
        """Make the session the base model again, and forget what waits."""
        self.backlog.drop_session(key)
        self.deltas.drop(key)
        self.slots.drop(key)
        self.dirty.discard(key)

    def in_flight(self, key: int) -> bool:
        """Whether the master of a session is ahead of its version: the outcome of a step is not known yet."""
        return any(chunk.session == key for outcome in self.outcomes for chunk in outcome.chunks)

    def abandon(self) -> None:
        """Give up everything that waits, of all sessions, and the rest of what they are sending now; their masters stay."""
        reading = {r.plan.session for r in self.backlog.readings.values()}
        for key in reading | set(self.backlog.queues):
            self.give_up(key, "error")

    def give_up(self, key: int, reason: str) -> None:
        """Give up what waits of a session, and the rest of what it is sending now; its master stays."""
        for chunk in self.backlog.drop_session(key):
            self._report_chunk(chunk, math.nan, None, reason)
        self.deltas.end_chunk(key)

    def failed(self, what: str) -> None:
        """Count an error that serving survives, and log it; call it while the exception is handled."""
        self.errors += 1
        if self.errors <= 10 or self.errors % 1000 == 0:
            logger.exception("vllm-ttt: %s (error %d)", what, self.errors)

    def _pick(self, tokens: int) -> list[Tile]:
        """The next rows of as many sessions as fit, one chunk each; this bounds the workspace of a step, too."""
        tiles: list[Tile] = []
        for chunk in self.backlog.heads():
            row = self.deltas.row(chunk.session) if tokens > 0 else None
            if row is None or any(tile.row == row for tile in tiles):
                continue
            left = chunk.rows - chunk.done
            if self.pool is not None and tiles and left > tokens:
                continue  # its rows attend to one another: they are learned together
            tiles.append(Tile(chunk, row, min(left, tokens) if self.pool is None else left))
            tokens -= tiles[-1].cost
            self.deltas.begin_chunk(chunk.session)
        return tiles

    def _step(self, tiles: list[Tile]) -> None:
        flat, weight = self._rows(tiles)
        rows = torch.tensor([tile.row for tile in tiles])
        keep = torch.tensor([tile.chunk.done > 0 for tile in tiles])
        self.compute.score(flat, weight, rows, keep, self._past(tiles, flat))
        if due := [s for s, tile in enumerate(tiles) if self._frozen_due(tile.chunk)]:
            past = self._past([tiles[s] for s in due], flat)
            self.compute.score_frozen(flat[due], weight[due], rows[due], keep[due], past)
        for tile in tiles:
            tile.chunk.done += tile.rows
        complete = [tile for tile in tiles if tile.chunk.done == tile.chunk.rows]
        if complete:
            self._commit(complete)

    def _rows(self, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
        """Row numbers in the pages and weights, [S, C]. A tile shorter than the longest is filled up with rows of its own, at
        weight 0: what is not finite in one session never meets another."""
        S, C = len(tiles), max(tile.rows for tile in tiles)
        flat, weight = torch.zeros(S, C, dtype=torch.int64), torch.zeros(S, C)
        for s, tile in enumerate(tiles):
            start = tile.chunk.page * self.backlog.chunk + tile.chunk.done
            flat[s] = start
            flat[s, : tile.rows] += torch.arange(tile.rows)
            weight[s, : tile.rows] = 1.0 / tile.chunk.rows
        return flat, weight

    def _past(self, tiles: list[Tile], flat: Tensor) -> Past | None:
        return None if self.pool is None else self.pool.past([tile.chunk for tile in tiles], flat.shape[1])

    def _frozen_due(self, chunk: Chunk) -> bool:
        every = self.config.observe.frozen_every
        return every > 0 and self.deltas.session(chunk.session).chunks % every == 0

    def _commit(self, tiles: list[Tile]) -> None:
        reading = self.backlog.reading_sessions()
        for tile in tiles:
            session = self.deltas.session(tile.chunk.session)
            if tile.chunk.session in reading and session.serving is None:
                current = self.deltas.read(tile.chunk.session)
                session.serving = Delta(*(x.to(self.dtype, copy=True) for x in current.tensors()))
                session.serving_version = session.version
        rows = torch.tensor([tile.row for tile in tiles])
        share = torch.tensor([tile.chunk.rows / self.config.learn.chunk for tile in tiles])
        values = to_host(self.compute.apply(rows, share))
        measured = [self._frozen_due(tile.chunk) for tile in tiles]
        self.outcomes.append(Outcome([tile.chunk for tile in tiles], measured, values, self.clock.mark()))
        for tile in tiles:
            key = tile.chunk.session
            self.dirty.add(key)
            self.deltas.session(key).chunks += 1
            self.deltas.end_chunk(key)
            self.backlog.advance(tile.chunk)

    def _give_up(self, chunk: Chunk, reason: str) -> None:
        self.deltas.end_chunk(chunk.session)
        queue = self.backlog.queues.get(chunk.session)
        if queue and queue[0] is chunk:
            self._report_chunk(chunk, math.nan, None, reason)
            self.backlog.advance(chunk)
            self.backlog.settle(chunk)

    def _report_chunk(self, chunk: Chunk, loss: float, frozen: float | None, skipped: str | None) -> None:
        version = self.deltas.session(chunk.session).version
        self.report.chunks.append(
            ChunkReport(chunk.session, chunk.request, chunk.rows, loss, frozen, skipped, chunk.end, version)
        )
