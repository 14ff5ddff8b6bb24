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
from vllm_ttt.worker.clock import Clock, to_device, to_host
from vllm_ttt.worker.deltas import Deltas, index
from vllm_ttt.worker.micro_step import Delta, Tail, accumulate, update
from vllm_ttt.worker.slots import Slots

logger = init_logger(__name__)


@dataclass(slots=True)
class Tile:
    """Rows of one chunk, and the row of its session's master."""

    chunk: Chunk
    row: int
    rows: int


@dataclass(slots=True)
class Outcome:
    """What a commit did, on its way to the host."""

    chunks: list[Chunk]
    #: [3 + modules, S]: whether it was applied, loss, frozen loss (NaN where not measured), norms
    values: Tensor
    mark: Any


class Trainer:
    """One per worker. Not thread-safe: it runs between vLLM's iterations, on the same stream."""

    def __init__(self, tail: Tail, config: TTTConfig, backlog: Backlog, deltas: Deltas, slots: Slots):
        self.tail, self.config, self.backlog, self.deltas, self.slots = tail, config, backlog, deltas, slots
        self.max_loss = config.learn.max_loss * math.log(tail.head_VD.shape[0])
        self.dtype = tail.head_VD.dtype
        rows = deltas.masters.o.shape[0]
        # Sums over the tiles of the chunk that is being learned, by row of the masters.
        self.loss_R = torch.zeros(rows, device=tail.head_VD.device)
        self.frozen_R = torch.zeros(rows, device=tail.head_VD.device)
        self.clock = Clock(tail.head_VD.device)
        self.outcomes: deque[Outcome] = deque()
        #: sessions whose slot does not follow their master yet
        self.dirty: set[int] = set()
        self.report = StepReport()
        self.errors = 0

    def learn(self, tokens: int) -> int:
        """Learn up to ``tokens`` tokens of what waits; returns how many. Never raises: what fails is given up and counted."""
        left = tokens
        while left > 0 and (tiles := self._pick(left)):
            try:
                self._step(tiles)
            except Exception:
                self.failed("a micro-step failed; its chunks are given up and their sessions stay at their last version")
                for tile in tiles:
                    self._give_up(tile.chunk, "error")
            left -= sum(tile.rows for tile in tiles)
        return tokens - left

    def collect(self, wait: bool = False) -> None:
        """Take in the outcomes that have arrived; with ``wait``, all of them."""
        while self.outcomes and (wait or self.clock.done(self.outcomes[0].mark)):
            outcome = self.outcomes.popleft()
            self.clock.wait(outcome.mark)
            for chunk, (ok, loss, frozen, *norms) in zip(outcome.chunks, outcome.values.T.tolist(), strict=True):
                self.backlog.settle(chunk)
                if (session := self.deltas.sessions.get(chunk.session)) is None:
                    continue  # dropped meanwhile
                if ok:
                    session.version += 1
                    session.norms = norms
                reason = None if ok else ("loss" if self.max_loss < loss < math.inf else "nonfinite")
                self._report_chunk(chunk, loss, None if math.isnan(frozen) else frozen, reason)

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
        report.pending, report.errors = self.backlog.pending, self.errors
        report.busy = bool(self.backlog.queues or self.dirty or self.outcomes or self.backlog.settled())
        return report

    def drop(self, key: int) -> None:
        """Make the session the base model again, and forget what waits."""
        self.backlog.drop_session(key)
        self.deltas.drop(key)
        self.slots.drop(key)
        self.dirty.discard(key)

    def failed(self, what: str) -> None:
        """Count an error that serving survives, and log it; call it while the exception is handled."""
        self.errors += 1
        if self.errors <= 10 or self.errors % 1000 == 0:
            logger.exception("vllm-ttt: %s (error %d)", what, self.errors)

    def _pick(self, tokens: int) -> list[Tile]:
        """The next rows of as many sessions as fit, one chunk each."""
        tiles: list[Tile] = []
        for chunk in self.backlog.heads():
            row = self.deltas.row(chunk.session) if tokens > 0 else None
            if row is None or any(tile.row == row for tile in tiles):
                continue
            tiles.append(Tile(chunk, row, min(chunk.rows - chunk.done, tokens)))
            tokens -= tiles[-1].rows
            if chunk.done == 0:
                self.deltas.begin_chunk(chunk.session)
                self.loss_R[row] = self.frozen_R[row] = 0.0  # sums over tiles
            else:
                self.deltas.pinned.add(chunk.session)
        return tiles

    def _step(self, tiles: list[Tile]) -> None:
        h_SCD, a_SCQ, t_SC, w_SC = self._gather(tiles)
        rows_S = index([tile.row for tile in tiles], self.loss_R)
        served = self.deltas.masters.select(rows_S).to(self.dtype)
        grad = self.deltas.grads.select(rows_S)
        loss_S = accumulate(self.tail, served, h_SCD, a_SCQ, t_SC, w_SC, grad)
        frozen_S = self._frozen(tiles, served, h_SCD, a_SCQ, t_SC, w_SC, loss_S)
        for x, part in zip(self.deltas.grads.tensors(), grad.tensors(), strict=True):
            x.index_copy_(0, rows_S, part)
        self.loss_R.index_add_(0, rows_S, loss_S)
        self.frozen_R.index_add_(0, rows_S, frozen_S)
        for tile in tiles:
            tile.chunk.done += tile.rows
        complete = [tile for tile in tiles if tile.chunk.done == tile.chunk.rows]
        if complete:
            self._commit(complete)

    def _gather(self, tiles: list[Tile]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of the pages as [S, C, ...], and each row's weight, which is 0 where a tile is shorter than the longest."""
        S, C, backlog = len(tiles), max(tile.rows for tile in tiles), self.backlog
        flat, weight = torch.zeros(S, C, dtype=torch.int64), torch.zeros(S, C)
        for s, tile in enumerate(tiles):
            start = tile.chunk.page * backlog.chunk + tile.chunk.done
            flat[s, : tile.rows] = torch.arange(start, start + tile.rows)
            weight[s, : tile.rows] = 1.0 / tile.chunk.rows
        device = backlog.t_PC.device
        flat, weight = to_device(flat.flatten(), device), to_device(weight, device)
        pick = lambda x: x.flatten(0, 1).index_select(0, flat).view(S, C, *x.shape[2:])  # noqa: E731
        return pick(backlog.h_PCD), pick(backlog.a_PCQ), pick(backlog.t_PC), weight

    def _frozen(self, tiles: list[Tile], served: Delta, h: Tensor, a: Tensor, t: Tensor, w: Tensor, loss_S: Tensor) -> Tensor:
        """[S] loss under the frozen model, NaN where it is not due. A session's first chunk is scored under it anyway."""
        frozen_S = torch.full_like(loss_S, math.nan)
        due = [s for s, tile in enumerate(tiles) if self._frozen_due(tile.chunk)]
        first = [s for s in due if self.deltas.session(tiles[s].chunk.session).chunks == 0]
        if first:
            i = index(first, loss_S)
            frozen_S[i] = loss_S[i]
        if rest := [s for s in due if s not in first]:
            i = index(rest, loss_S)
            base = Delta(*(torch.zeros_like(x[: len(rest)]) for x in served.tensors()))
            frozen_S[i] = accumulate(self.tail, base, h[i], a[i], t[i], w[i], None)
        return frozen_S

    def _frozen_due(self, chunk: Chunk) -> bool:
        every = self.config.observe.frozen_every
        return every > 0 and self.deltas.session(chunk.session).chunks % every == 0

    def _commit(self, tiles: list[Tile]) -> None:
        learn = self.config.learn
        rows_S = index([tile.row for tile in tiles], self.loss_R)
        share_S = to_device(torch.tensor([tile.chunk.rows / learn.chunk for tile in tiles]), self.loss_R.device)
        loss_S = self.loss_R.index_select(0, rows_S)
        new, ok_S, norm_MS = update(
            self.tail, self.deltas.masters.select(rows_S), self.deltas.grads.select(rows_S), loss_S, share_S,
            learn.rate, learn.decay, learn.max_norm, self.max_loss,
        )  # fmt: skip
        reading = self.backlog.reading_sessions()
        for tile in tiles:
            session = self.deltas.session(tile.chunk.session)
            if tile.chunk.session in reading and session.serving is None:
                current = self.deltas.read(tile.chunk.session)
                session.serving = Delta(*(x.to(self.dtype, copy=True) for x in current.tensors()))
                session.serving_version = session.version
        for x, part in zip(self.deltas.masters.tensors(), new.tensors(), strict=True):
            x.index_copy_(0, rows_S, part)
        values = torch.cat((torch.stack((ok_S.float(), loss_S, self.frozen_R.index_select(0, rows_S))), norm_MS))
        values = to_host(values)
        self.outcomes.append(Outcome([tile.chunk for tile in tiles], values, self.clock.mark()))
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
        self.report.chunks.append(ChunkReport(chunk.session, chunk.request, chunk.rows, loss, frozen, skipped, version))
