"""Takes pending chunks step by step through the micro-step, in batches over sessions, and brings the slots up to date."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import TTTConfig
from vllm_ttt.log import Rarely, logger_of
from vllm_ttt.types import ChunkReason, ChunkReport, RequestPlan, StepReport
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.chunk import Chunk, weights_of
from vllm_ttt.worker.capture.kv_cache import KVCache
from vllm_ttt.worker.capture.past import PastSource
from vllm_ttt.worker.clock import Clock, copy_to_host, to_device, to_host
from vllm_ttt.worker.deltas.masters import Deltas, WorkerSession
from vllm_ttt.worker.deltas.versions import Kept, Versions, keep, restore
from vllm_ttt.worker.guard.guard import Guard
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.compute import Compute
from vllm_ttt.worker.learn.outcomes import Outcome, Tile, known_of
from vllm_ttt.worker.learn.shares import Shares
from vllm_ttt.worker.memory import most_sessions
from vllm_ttt.worker.ngrams.caches import Caches, Text
from vllm_ttt.worker.ngrams.ngrams import Known
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.serve.slots import Slots
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.micro_step import Tail

logger = logger_of(__name__)

#: Every so manyth chunk of a session is scored under the base model too, for people to look at: a third of a step. The first is
#: not: a session of version 0 is the base model.
FROZEN_EVERY = 4


class Trainer:
    """One per worker. Not thread-safe: it runs between vLLM's iterations, on the same stream."""

    def __init__(
        self,
        tail: Tail | Head,
        config: TTTConfig,
        backlog: Backlog,
        deltas: Deltas,
        slots: Slots | HeadSlots,
        probe: Probe,
        cache: KVCache | None = None,
        pasts: int = 2**31,
    ):
        """``cache``: where the past of each chunk is; None where the step needs none. ``pasts``: as `Compute` has it."""
        self.cache = cache
        self.config, self.backlog, self.deltas, self.slots = config, backlog, deltas, slots
        self.compute, self.ranks = Compute(tail, config.learn, backlog, deltas, pasts), tail.ranks
        self.caches = Caches(config.cache, deltas.sessions, config.sessions.resident)
        self.compute.keep_rows = self.caches.on
        self.clock = Clock(tail.head_VD.device)
        sessions, limit = config.sessions, int(config.sessions.versions_gib * 2**30 / tail.ranks.size)
        self.versions = Versions(sessions.keep_versions, sessions.version_every, limit)
        self.guard = Guard(config.guard, tail, probe, self.versions, self.clock)
        self.outcomes: deque[Outcome] = deque()
        #: before what was launched first since somebody set it to None
        self.began: Any = None
        #: sessions whose slot does not follow their master yet
        self.dirty: set[int] = set()
        #: sessions that the guard has stopped, until the engine core plans their requests knowing that
        self.stopped: set[int] = set()
        #: sessions some of whose samples have begun: what is served stays until the others have, too
        self.still: set[int] = set()
        self.shares = Shares(config.schedule.tokens_per_step)
        self.report = StepReport()
        self.errors, self.nonfinite, self.tokens_learned = Rarely(), Rarely(), 0

    def learn(self, tokens: int) -> int:
        """Learn up to ``tokens`` tokens of what waits; returns how many, each chunk counted as its cost in tokens, and at most
        ``tokens``. Never raises: what fails is given up and counted."""
        first = self.shares.first(lambda: self.backlog.queues.keys() | self.guard.due())
        return (self._turn(tokens, first) if first else 0) or self._turn(tokens, frozenset())

    def _turn(self, tokens: int, first: frozenset[int]) -> int:
        """`learn`, the sessions of ``first`` before others."""
        left = tokens - self._try(tokens, first)  # before it learns: no session goes on beyond what has not been tried
        one = True
        while left > 0 and (tiles := self._pick(left, first, one)):
            one = False
            for tile in tiles:
                self.shares.had(tile.chunk.session, tile.chunk.cost)
            try:
                self._step(tiles)
            except Exception:
                self.failed("a micro-step failed; its chunks are given up and their sessions stay at their last version")
                for tile in tiles:
                    self._give_up(tile.chunk, "error")
            left -= sum(tile.chunk.cost for tile in tiles)
        return tokens - max(left, 0)

    def make_room(self, enough: Callable[[], bool], tokens: int) -> None:
        """Learn in steps of ``tokens``, without yielding to serving, until ``enough()``, or until nothing moves any more."""
        while not enough() and self.backlog.queues:
            in_flight = bool(self.outcomes or self.guard.outcomes)
            learned = self.learn(tokens)
            self.collect(wait=True)  # what is learned next may wait for the outcome of a trial
            if not (learned or in_flight):
                return

    def marks(self) -> list[Any]:
        """Marks of the steps and trials whose outcome is not known yet."""
        return [*(x.mark for x in self.outcomes), *(mark for *_, mark in self.guard.outcomes)]

    def collect(self, wait: bool = False) -> None:
        """Take in the outcomes that have arrived; with ``wait``, all of them."""
        if not (self.outcomes or self.guard.outcomes):
            return
        arrived = lambda: (known_of(self.outcomes, self.clock, wait), self.guard.arrived(wait))  # noqa: E731
        known, sums = self.ranks.agree("what has been learned", arrived)
        for values, base in known:
            outcome = self.outcomes.popleft()
            self.clock.wait(outcome.mark)
            each = zip(outcome.chunks, outcome.kept, outcome.texts, values, base, strict=True)
            for chunk, kept, text, value, base in each:
                try:
                    self._learned(chunk, kept, text, value, None if math.isnan(base) else base)
                except Exception:
                    self.failed("the outcome of a chunk could not be taken in; what its session has waiting is given up")
                    self._report_chunk(chunk, math.nan, "error")
                    self.lose(chunk.session, "error")
        for trial in self.guard.collect(self.deltas.sessions, sums):
            self.report.trials.append(trial)
            if trial.back_to is not None:
                self.stopped.add(trial.session)
                self.roll_back(trial.session, trial.back_to)

    def sync(self) -> None:
        """Write the slots of sessions whose master has moved, except where a prompt, or its samples, have begun in part."""
        self.collect()
        for key in self.dirty - self._kept_still() if self.dirty else ():
            self.dirty.discard(key)
            if (session := self.deltas.sessions.get(key)) is None:
                continue
            self._write(key, session)

    def take_report(self) -> StepReport:
        """What has happened since the last report. Requests of which all is learned and served are reported once."""
        self.collect()
        backlog = self.backlog
        closed: dict[ChunkReason, list[Chunk]] = {
            "short": backlog.short, "repetition": backlog.repetitive, "filter": backlog.filtered, "full": backlog.lost,
            "unread": backlog.unread,
        }  # fmt: skip
        for reason, chunks in closed.items():
            for chunk in chunks:
                self._report_chunk(chunk, math.nan, reason)
            chunks.clear()
        self.report.released += self.backlog.released()
        for request, key in self.backlog.settled():
            if key not in self.dirty:
                self.backlog.forget(request)
                self.report.settled.append((request, key))
        report, self.report = self.report, StepReport()
        report.pending, report.queued, report.behind = backlog.pending, backlog.queued, frozenset(self.dirty)
        report.busy = bool(self.learning or self.guard.busy or self.backlog.settled())
        return report

    @property
    def learning(self) -> bool:
        """Whether anything waits to be learned, or has been and is not committed yet, or its slot does not say so yet."""
        return bool(self.backlog.queues or self.outcomes or self.dirty)

    def drop(self, key: int) -> None:
        """Make the session the base model again, and forget what waits."""
        self.ranks.note(key)
        self.backlog.drop_session(key)
        self.caches.drop(key)
        self.deltas.drop(key)
        self.versions.drop(key)
        self.guard.drop(key)
        self.slots.drop(key)
        self.dirty.discard(key)
        self.stopped.discard(key)

    def start(self, request: str, plan: RequestPlan) -> None:
        """A request begins. Where the engine core does not know that the guard has stopped its session, it is not learned."""
        if self.in_flight(plan.session) and self.deltas.session(plan.session).serving is None:
            self.collect(wait=True)  # with `consistency: eventual` alone: its slot has what this step has made
        self.backlog.start(request, plan)
        if plan.learn and plan.session in self.stopped:
            self.lose(plan.session, "frozen")

    def copy(self, key: int, to: int) -> int:
        """Make the new session ``to`` what ``key`` is, as far as the guard trusts that. Nothing waits to be learned of either.

        Returns:
            its version: another one than the engine core knows, where the guard has just returned it.
        """
        self.collect(wait=True)
        self.deltas.copy(key, to)
        self.guard.resume(to, self.guard.untried(key))
        if key in self.versions.good:
            self.versions.add_good(to, *self.versions.good[key])
        return self.deltas.session(to).version

    def resume(self, key: int, session: WorkerSession, untried: int, good: WorkerSession | None) -> None:
        """The session has come back from a file, with so many commits that the guard has not tried since it was ``good``."""
        self.deltas.sessions[key] = session
        self.guard.resume(key, untried)
        if self.guard.config.every and good is not None:
            self.versions.add_good(key, good.version, Kept(good.host, good.rate, good.norms, good.ngrams))

    def in_flight(self, key: int) -> bool:
        """Whether the master of a session is ahead of its version: the outcome of a step is not known yet."""
        return key in self._under_way()

    def roll_back(self, key: int, version: int) -> bool:
        """Make the session what it was at ``version``; False where that is not kept. What waits of it is given up."""
        self.collect(wait=True)
        kept = self.versions.find(key, version)
        if kept is None or version > self.deltas.session(key).version:
            return False
        self.ranks.note(key, version)
        self.lose(key, "rollback")
        untried = self.guard.untried(key) - (self.deltas.session(key).version - version)
        self.caches.drop(key)
        self._keep_serving({key})
        restore(self.deltas, key, version, kept)
        self.versions.cut(key, version)
        self.guard.drop(key)
        self.guard.resume(key, max(0, untried))  # to go back by one does not escape the guard
        self.dirty.add(key)
        self.sync()
        return True

    def failed(self, what: str) -> None:
        """Count an error that serving survives, and log it; call it while the exception is handled. With several ranks it does
        not: the others might wait for this one."""
        self.ranks.failed(what)
        if self.errors.again():
            logger.exception("vllm-ttt: %s (error %d)", what, self.errors.count)

    def _try(self, tokens: int, first: frozenset[int]) -> int:
        """Let the guard have the time for ``tokens`` tokens; returns how many it took. ``first``: as `Guard.run` has it."""
        if self.guard.busy:
            self.began = self.began or self.clock.mark()
        try:
            return self.guard.run(tokens, self.deltas, frozenset(self._under_way()), first)
        except Exception:
            self.failed("a delta could not be tried on the guard's text")
            return tokens
        finally:
            for key, had in self.guard.had.items():
                self.shares.had(key, had)

    def _under_way(self) -> Counter[int]:
        """Of each session, how many chunks whose outcome is not known yet."""
        return Counter(chunk.session for outcome in self.outcomes for chunk in outcome.chunks)

    def _write(self, key: int, session: WorkerSession) -> None:
        try:
            self.slots.write(key, session)
        except Exception:
            self.failed("a slot could not be written; vLLM will fill another from the master")

    def lose(self, key: int, reason: ChunkReason) -> None:
        """Give up what waits of the session, and the rest of what it is sending now; its master stays."""
        for chunk in self.backlog.drop_session(key):
            self._report_chunk(chunk, math.nan, reason)

    def _pick(self, tokens: int, first: frozenset[int], one: bool) -> list[Tile]:
        """The next chunk of as many sessions as fit, those of ``first`` before others; with ``one``, of one at least. This
        bounds the workspace of a step, too."""
        tiles, most = list[Tile](), most_sessions(self.config)
        pasts = math.inf if self.cache is None else self.compute.pasts
        due, chosen, heads = self.guard.due(self._under_way()), set[int](), self.backlog.heads()
        for chunk in sorted(heads, key=lambda chunk: chunk.session not in first) if first else heads:
            if tokens <= 0 or len(tiles) == most:
                break
            large = (chunk.cost > tokens and not (one and not tiles)) or (tiles and chunk.first > pasts)
            if chunk.session in due or large:
                continue
            try:
                row = self.deltas.row(chunk.session, keep=chosen)
            except Exception:
                self.failed("a session could not be brought in to be learned; its chunk is given up")
                self._give_up(chunk, "error")
                continue
            if row is None:
                continue
            tiles.append(Tile(chunk, row))
            chosen.add(chunk.session)
            tokens, pasts = tokens - chunk.cost, pasts - chunk.first
        return tiles

    def _step(self, tiles: list[Tile]) -> None:
        chunks, sessions = [tile.chunk for tile in tiles], [self.deltas.session(tile.chunk.session) for tile in tiles]
        flat, weight, source = self._rows(chunks)
        rows = torch.tensor([tile.row for tile in tiles])
        share = torch.tensor([(chunk.rows - chunk.out) / self.config.learn.chunk for chunk in chunks])
        self.ranks.note(*(x for tile in tiles for x in (tile.chunk.session, tile.row, tile.chunk.rows, tile.chunk.end)))
        self.began = self.began or self.clock.mark()
        self._keep_serving({chunk.session for chunk in chunks})
        base = torch.full((len(tiles),), math.nan)
        due = [s for s, x in enumerate(sessions) if x.steps % FROZEN_EVERY == 0 and (x.steps or x.version)]
        if due:
            losses = self.compute.base_loss(*self._rows([chunks[s] for s in due]))
            base = losses.new_full((len(tiles),), math.nan)
            base.index_copy_(0, to_device(torch.tensor(due), losses.device), losses)
        outcome = Outcome(chunks, self.compute.step(flat, weight, rows, share, source), base)
        self.outcomes.append(outcome)  # whatever fails from here on, the masters have moved
        for chunk, session in zip(chunks, sessions, strict=True):
            session.steps += 1
            self.dirty.add(chunk.session)
        try:
            outcome.values, outcome.base_loss = to_host(outcome.values), to_host(base)
            outcome.kept = [keep(self.deltas, c.session) if self.versions.due(c.session) else None for c in chunks]
            outcome.texts = self.caches.texts(chunks, self.backlog, self.compute.rows_2SC)  # while their pages are their own
        except Exception:
            self.failed("a step's versions, or what it read, could not be kept; its chunks are learned")
        finally:
            outcome.mark = self.clock.mark()
            for chunk in chunks:
                self.backlog.advance(chunk)

    def _rows(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor, PastSource | None]:
        """Where the rows of some chunks are, what each weighs in their mean loss, and what comes before them."""
        flat = self.backlog.rows_of(chunks)
        return flat, weights_of(chunks, flat.shape[1]), None if self.cache is None else PastSource(self.cache, chunks)

    def _kept_still(self) -> set[int]:
        """Sessions that are served as they are for now."""
        return self.backlog.reading_sessions() | self.still

    def _keep_serving(self, keys: set[int]) -> None:
        """While a prompt is being read, and until all its samples are, what is served stays as it began: the master moves."""
        for key in keys & self._kept_still():
            session = self.deltas.session(key)
            if session.serving is None:
                delta = self.deltas.read(key).delta
                # Not on the device, where nothing more is allocated for good: its slot holds the same.
                session.serving = delta.by(*map(copy_to_host, delta.tensors()))
                session.serving_copied = self.clock.mark()
                session.serving_version, session.serving_ngrams = session.version, session.ngrams

    def _learned(self, chunk: Chunk, kept: Kept | None, text: Text | None, values: list[float], base: float | None) -> None:
        """The outcome of a chunk's step is known."""
        ok, loss, rate, *norms = values
        self.backlog.settle(chunk)
        if (session := self.deltas.sessions.get(chunk.session)) is None:
            return  # dropped meanwhile
        if session.version == 0 and math.isfinite(loss):
            base = loss
        session.rate, known = rate, None
        if ok:
            session.version += 1
            self.ranks.note(chunk.session, session.version)
            session.norms = norms
            self.tokens_learned += chunk.rows - chunk.out
            self.guard.committed(chunk.session)
            known = None if text is None else self._remember(session, text)
        if kept is not None:
            kept = kept._replace(rate=rate, norms=session.norms, ngrams=session.ngrams)
            self.versions.add(chunk.session, session.version, kept)
        reason = None if ok else ("loss" if self.compute.max_loss < loss < math.inf else "nonfinite")
        if reason == "nonfinite" and self.nonfinite.again():
            count = self.nonfinite.count
            logger.warning("vllm-ttt: loss, gradient or step of a chunk is not finite; it is not learned (time %d)", count)
        self._report_chunk(chunk, loss, reason, base, known)

    def _remember(self, session: WorkerSession, text: Text) -> Known | None:
        try:
            return self.caches.commit(session, text)
        except Exception:
            self.failed("what a session has learned could not join its cache")
            return None

    def _give_up(self, chunk: Chunk, reason: ChunkReason) -> None:
        queue = self.backlog.queues.get(chunk.session)
        if queue and queue[0] is chunk:
            self._report_chunk(chunk, math.nan, reason)
            self.backlog.advance(chunk)
            self.backlog.settle(chunk)

    def _report_chunk(
        self, chunk: Chunk, loss: float, skipped: ChunkReason | None, base_loss: float | None = None, known: Known | None = None
    ) -> None:
        session = self.deltas.session(chunk.session)
        norm, out = max(session.norms) if skipped is None else None, 0 if skipped == "filter" else chunk.out
        report = ChunkReport(
            chunk.session, chunk.request, chunk.rows - out, loss, base_loss, skipped, chunk.end, session.version, session.rate,
            norm, *(known or ()),
        )  # fmt: skip
        self.report.chunks.append(report)
        if out:
            said = {"tokens": out, "loss": math.nan, "base_loss": None, "skipped": "filter", "norm": None}
            self.report.chunks.append(replace(report, **said))
