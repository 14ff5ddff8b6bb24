"""Takes chunks from the backlog, learns them into the masters in batches over sessions, and brings the slots up to date."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
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
from vllm_ttt.worker.deltas import Deltas, Session
from vllm_ttt.worker.guard import Guard
from vllm_ttt.worker.measuring import Measuring
from vllm_ttt.worker.memory import SMALLEST_SHARE
from vllm_ttt.worker.micro_step import Delta, Tail
from vllm_ttt.worker.past import Before, PastPool
from vllm_ttt.worker.probe import Probe
from vllm_ttt.worker.scale import choose
from vllm_ttt.worker.slots import Slots
from vllm_ttt.worker.versions import Kept, Versions, restore, snapshot

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
    #: copies of the masters that are to be kept, where one is due
    snapshots: list[Delta | None]
    #: what `Compute.apply` returns
    values: Tensor
    mark: Any


class Trainer:
    """One per worker. Not thread-safe: it runs between vLLM's iterations, on the same stream."""

    def __init__(
        self,
        tail: Tail,
        config: TTTConfig,
        backlog: Backlog,
        deltas: Deltas,
        slots: Slots,
        probe: Probe,
        pool: PastPool | None = None,
    ):
        """``pool``: where the past of each chunk is; None where the step needs none."""
        self.pool = pool
        self.config, self.backlog, self.deltas, self.slots = config, backlog, deltas, slots
        self.compute = Compute(tail, config.learn, backlog, deltas)
        self.clock = Clock(tail.head_VD.device)
        self.measuring = Measuring(config.learn, self.compute, backlog, deltas, self.clock, pool)
        sessions = config.sessions
        self.versions = Versions(sessions.keep_versions, sessions.version_every, int(sessions.versions_gib * 2**30))
        self.guard = Guard(config.guard, tail, probe, self.versions, self.clock)
        self.outcomes: deque[Outcome] = deque()
        #: sessions whose slot does not follow their master yet
        self.dirty: set[int] = set()
        self.report = StepReport()
        self.errors = self.nonfinite = self.tokens_learned = 0

    def learn(self, tokens: int) -> int:
        """Measure and learn up to ``tokens`` tokens of what waits; returns how many, each tile counted as its cost in tokens,
        and at most ``tokens``. Never raises: what fails is given up and counted."""
        left = tokens
        try:
            left -= self.measuring.run(tokens)
        except Exception:
            self.failed("a chunk could not be measured; its session is served with the scale that it had")
        if overdue := self.guard.overdue():
            left -= self._try(left, overdue)
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
        left -= self._try(left)
        return tokens - max(left, 0)

    def make_room(self, enough: Callable[[], bool], tokens: int) -> None:
        """Learn in steps of ``tokens``, without yielding to serving, until ``enough()``, or until nothing moves any more."""
        while not enough() and self.backlog.queues:
            in_flight = bool(self.outcomes or self.guard.outcomes)
            learned = self.learn(tokens)
            self.collect(wait=True)  # what is learned next may wait for the outcome of a trial
            if not (learned or in_flight):
                return

    def collect(self, wait: bool = False) -> None:
        """Take in the outcomes that have arrived; with ``wait``, all of them."""
        self.dirty.update(self.measuring.collect(wait))
        while self.outcomes and (wait or self.clock.done(self.outcomes[0].mark)):
            outcome = self.outcomes.popleft()
            self.clock.wait(outcome.mark)
            values = outcome.values.T.tolist()
            for chunk, copy, (ok, loss, *norms) in zip(outcome.chunks, outcome.snapshots, values, strict=True):
                self.backlog.settle(chunk)
                if (session := self.deltas.sessions.get(chunk.session)) is None:
                    continue  # dropped meanwhile
                if ok:
                    session.version += 1
                    session.norms = norms
                    self.tokens_learned += chunk.rows
                    self.guard.committed(chunk.session)
                if copy is not None:
                    self.versions.add(chunk.session, session.version, Kept(copy, session.norms, session.losses))
                reason = None if ok else ("loss" if self.compute.max_loss < loss < math.inf else "nonfinite")
                if reason == "nonfinite":
                    self.nonfinite += 1
                    if self.nonfinite <= 10 or self.nonfinite % 1000 == 0:
                        logger.warning(
                            "vllm-ttt: loss or gradient of a chunk is not finite; it is not learned (time %d)", self.nonfinite
                        )
                self._report_chunk(chunk, loss, reason)

        for trial in self.guard.collect(self.deltas.sessions, wait):
            self.report.trials.append(trial)
            if trial.back_to is not None:
                self.roll_back(trial.session, trial.back_to)

    def begin(self, key: int, ceiling: float | None) -> None:
        """A request of the session is about to be served for the first time.

        Args:
            ceiling: the most that its prompt allows for the scale; None: what was allowed before.
        """
        session = self.deltas.session(key)
        if ceiling is None:
            return
        session.ceiling = ceiling
        if session.wanted != session.scale and key not in self.backlog.reading_sessions() | self.measuring.sessions():
            self._write(key, session)

    def sync(self) -> None:
        """Write the slots of sessions whose master or scale has moved, except where a prompt has been read in part, or waits to
        be measured under what has served it."""
        self.collect()
        for key in self.dirty - self.backlog.reading_sessions() - self.measuring.sessions():
            self.dirty.discard(key)
            if (session := self.deltas.sessions.get(key)) is None:
                continue
            self._write(key, session)

    def take_report(self) -> StepReport:
        """What has happened since the last report. Requests of which all is learned and served are reported once."""
        self.collect()
        for chunks, reason in ((self.backlog.short, "short"), (self.backlog.repetitive, "repetition")):
            for chunk in chunks:
                self._report_chunk(chunk, math.nan, reason)
            chunks.clear()
        for request, key in self.backlog.settled():
            if key not in self.dirty:
                self.backlog.forget(request)
                self.report.settled.append((request, key))
        report, self.report = self.report, StepReport()
        report.pending = self.backlog.pending
        report.busy = bool(self.backlog.queues or self.dirty or self.outcomes or self.guard.busy or self.backlog.settled())
        return report

    def drop(self, key: int) -> None:
        """Make the session the base model again, and forget what waits."""
        self.measuring.drop(self.backlog.drop_session(key))
        self.deltas.drop(key)
        self.versions.drop(key)
        self.guard.drop(key)
        self.slots.drop(key)
        self.dirty.discard(key)

    def resume(self, key: int, session: Session, untried: int) -> None:
        """The session has come back from a file, with so many commits that the guard has not tried; with none, it is good."""
        self.deltas.sessions[key] = session
        self.guard.resume(key, untried)
        if self.guard.config.every and not untried:
            self.versions.add_good(key, session.version, Kept(session.host, session.norms, session.losses))

    def in_flight(self, key: int) -> bool:
        """Whether the master of a session is ahead of its version: the outcome of a step is not known yet."""
        return any(chunk.session == key for outcome in self.outcomes for chunk in outcome.chunks)

    def roll_back(self, key: int, version: int) -> bool:
        """Make the session what it was at ``version``; False where that is not kept. What waits of it is given up."""
        self.collect(wait=True)
        kept = self.versions.find(key, version)
        if kept is None or version > self.deltas.session(key).version:
            return False
        self.lose(key, "rollback")
        session = restore(self.deltas, key, version, kept)
        session.chosen = choose(session.losses, self.config.learn.scales, self.config.learn.scale_rate)
        self.versions.cut(key, version)
        self.guard.drop(key)
        self.dirty.add(key)
        self.sync()
        return True

    def abandon(self) -> None:
        """Give up everything that waits, of all sessions, and the rest of what they are sending now; their masters stay."""
        reading = {r.plan.session for r in self.backlog.readings.values()}
        for key in reading | set(self.backlog.queues):
            self.lose(key, "error")

    def failed(self, what: str) -> None:
        """Count an error that serving survives, and log it; call it while the exception is handled."""
        self.errors += 1
        if self.errors <= 10 or self.errors % 1000 == 0:
            logger.exception("vllm-ttt: %s (error %d)", what, self.errors)

    def _try(self, tokens: int, only: set[int] | None = None) -> int:
        """Let the guard have the time for ``tokens`` tokens; returns how many it took."""
        unsettled = frozenset(chunk.session for outcome in self.outcomes for chunk in outcome.chunks)
        try:
            return self.guard.run(tokens, self.deltas, unsettled, only)
        except Exception:
            self.failed("a delta could not be tried on the guard's text")
            return tokens

    def _write(self, key: int, session: Session) -> None:
        try:
            self.slots.write(key, session)
        except Exception:
            self.failed("a slot could not be written; vLLM will fill another from the master")

    def lose(self, key: int, reason: str) -> None:
        """Give up what waits of the session, and the rest of what it is sending now; its master stays."""
        lost = self.backlog.drop_session(key)
        self.measuring.drop(lost)
        for chunk in lost:
            self._report_chunk(chunk, math.nan, reason)
        self.deltas.end_chunk(key)

    def _pick(self, tokens: int) -> list[Tile]:
        """The next rows of as many sessions as fit, one chunk each; this bounds the workspace of a step, too."""
        tiles: list[Tile] = []
        unready = self.measuring.sessions() | self.guard.overdue()
        for chunk in self.backlog.heads():
            row = self.deltas.row(chunk.session) if tokens > 0 and chunk.session not in unready else None
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
        flat = self.backlog.rows_of([(tile.chunk, tile.chunk.done, tile.rows) for tile in tiles])
        weight = torch.zeros(flat.shape)
        for s, tile in enumerate(tiles):  # at weight 0: what fills up a tile that is shorter than the longest
            weight[s, : tile.rows] = 1.0 / tile.chunk.rows
        rows = torch.tensor([tile.row for tile in tiles])
        keep = torch.tensor([tile.chunk.done > 0 for tile in tiles])
        before = None if self.pool is None else Before(self.pool, [tile.chunk for tile in tiles])
        self.compute.score(flat, weight, rows, keep, before)
        for tile in tiles:
            tile.chunk.done += tile.rows
        complete = [tile for tile in tiles if tile.chunk.done == tile.chunk.rows]
        if complete:
            self._commit(complete)

    def _commit(self, tiles: list[Tile]) -> None:
        reading = self.backlog.reading_sessions()
        for tile in tiles:
            session = self.deltas.session(tile.chunk.session)
            if tile.chunk.session in reading and session.serving is None:
                current = self.deltas.read(tile.chunk.session)
                session.serving = Delta(*(x.clone() for x in current.tensors()))
                session.serving_version = session.version
        rows = torch.tensor([tile.row for tile in tiles])
        share = torch.tensor([tile.chunk.rows / self.config.learn.chunk for tile in tiles])
        values = to_host(self.compute.apply(rows, share))
        keys = [tile.chunk.session for tile in tiles]
        snapshots = [snapshot(self.deltas, key) if self.versions.due(key) else None for key in keys]
        self.outcomes.append(Outcome([tile.chunk for tile in tiles], snapshots, values, self.clock.mark()))
        for tile in tiles:
            key = tile.chunk.session
            self.dirty.add(key)
            self.deltas.end_chunk(key)
            self.backlog.advance(tile.chunk)

    def _give_up(self, chunk: Chunk, reason: str) -> None:
        self.deltas.end_chunk(chunk.session)
        queue = self.backlog.queues.get(chunk.session)
        if queue and queue[0] is chunk:
            self._report_chunk(chunk, math.nan, reason)
            self.measuring.drop([chunk])
            self.backlog.advance(chunk)
            self.backlog.settle(chunk)

    def _report_chunk(self, chunk: Chunk, loss: float, skipped: str | None) -> None:
        session = self.deltas.session(chunk.session)
        frozen, served = chunk.measured or (None, None)
        norm = max(session.norms) if skipped is None else None
        self.report.chunks.append(
            ChunkReport(
                chunk.session,
                chunk.request,
                chunk.rows,
                loss,
                frozen,
                skipped,
                chunk.end,
                session.version,
                served,
                chunk.scale,
                norm,
                session.chosen,
            )
        )
