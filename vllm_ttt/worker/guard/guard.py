"""Tries each session's delta, as it is served, on a text that no session sends; what makes that worse is rolled back.

A session is due once it has made so many commits as `guard.every` says: it is tried before anything else is learned, and learns
nothing more until its trial has begun. So no version is further from a good one than that, however busy the server is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import GuardConfig
from vllm_ttt.log import logger_of
from vllm_ttt.types import Trial
from vllm_ttt.worker.clock import Clock, arrived, to_host
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.deltas.masters import Deltas, WorkerSession
from vllm_ttt.worker.deltas.versions import Kept, Versions, keep
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.micro_step import Tail

logger = logger_of(__name__)

#: Rows of a forward that take as long as learning a row: a forward and a backward.
ROWS_PER_TOKEN = 3


@dataclass(slots=True, eq=False)
class Task:
    """A delta on trial."""

    #: None: of the base model
    key: int | None
    session: WorkerSession | None
    version: int
    #: what is served, in the tail's dtype; and the session as it is, to return to
    delta: Delta
    kept: Kept | None
    sum_1: Tensor
    #: commits that it is to judge
    commits: int = 0
    done: int = 0


class Guard:
    def __init__(self, config: GuardConfig, tail: Tail | Head, probe: Probe, versions: Versions, clock: Clock):
        self.config, self.tail, self.probe, self.versions, self.clock = config, tail, probe, versions, clock
        #: commits since the last trial of each session
        self.commits: dict[int, int] = {}
        #: sessions that have made so many that they are to be tried, the longest-waiting first
        self.line: dict[int, None] = {}
        self.task: Task | None = None
        #: tokens that the last `run` took, by whose delta it tried
        self.had: dict[int | None, int] = {}
        self.outcomes: deque[tuple[Task, Tensor, Any]] = deque()
        #: nats per token under the base model, once it is known
        self.base_loss: float | None = None
        self.failures = 0

    def committed(self, key: int) -> None:
        """A chunk of the session has been learned."""
        self._count(key, self.commits.get(key, 0) + 1)

    def untried(self, key: int) -> int:
        """Commits of the session that no trial has seen; kept with its file, so that it does not escape by leaving memory."""
        tasks = (self.task, *(task for task, *_ in self.outcomes))
        return self.commits.get(key, 0) + sum(task.commits for task in tasks if task is not None and task.key == key)

    def resume(self, key: int, untried: int) -> None:
        """The session has come back."""
        if untried:
            self._count(key, untried)

    def failed(self) -> None:
        """A trial could not be made. After three in a row there are no more: learning must not wait for what cannot be."""
        task, self.task = self.task, None
        if task is not None and task.key is not None:  # it stays due
            self._count(task.key, self.commits.get(task.key, 0) + task.commits)
        self.failures += 1
        if self.failures == 3:
            logger.error("vllm-ttt: the guard does not work and is switched off; deltas are no longer tried")
            self.config = self.config.model_copy(update={"every": 0})
            self.commits.clear()
            self.line.clear()

    @property
    def on(self) -> bool:
        """Whether deltas are tried, as soon as there is a text."""
        return self.config.every > 0

    def due(self, under_way: Mapping[int, int] = MappingProxyType({})) -> set[int]:
        """Sessions that must not learn before their trial has begun.

        Args:
            under_way: sessions whose chunks are being learned, and how many: each may become a commit.
        """
        if not self.probe.ready:
            return set()
        soon = {key for key, count in under_way.items() if self.commits.get(key, 0) + count >= self.config.every > 0}
        return self.line.keys() | soon

    @property
    def busy(self) -> bool:
        """Whether there is something to try, or the outcome of a trial is on its way."""
        return bool(self.outcomes) or (self.probe.ready and (self.task is not None or bool(self.line)))

    def run(self, tokens: int, deltas: Deltas, unsettled: frozenset[int], first: frozenset[int] = frozenset()) -> int:
        """Try deltas for as long as learning ``tokens`` tokens would take; returns how many that took.

        Args:
            deltas: the masters. unsettled: sessions whose version is not known yet; they wait. first: after what has begun, try
                these alone, and nothing where none of them is due; empty: all that are due, the longest-waiting first.
        """
        left, self.had = tokens, {}
        if first and not first & self.due():
            return 0
        while left > 0 and self.probe.ready:
            try:
                if (task := self.task or self._begin(deltas, unsettled, first)) is None:
                    break
                rows = self.probe.next(task.done, left * ROWS_PER_TOKEN)
                self.tail.ranks.note(task.key or 0, rows.start, rows.stop)
                task.sum_1 = task.sum_1 + self.probe.loss(self.tail, task.delta, rows)
            except Exception:
                self.failed()
                raise
            took = -(-len(rows) // ROWS_PER_TOKEN)
            left, self.had[task.key] = left - took, self.had.get(task.key, 0) + took
            task.done += len(rows)
            if task.done == self.probe.rows:
                self.outcomes.append((task, to_host(task.sum_1), self.clock.mark()))
                self.task = None
            if self.probe.whole:
                break  # a request that comes meanwhile waits for one piece, and not for all of them
        return tokens - max(left, 0)

    def arrived(self, wait: bool = False) -> list[float]:
        """Of each trial that has come home, or ``wait`` for all, the sum of its losses, in order; `collect` takes them in."""
        return arrived(self.outcomes, lambda x: x[2], lambda x: x[1].item(), self.clock, len(self.outcomes) if wait else 0)

    def collect(self, sessions: dict[int, WorkerSession], sums: list[float] | None = None) -> list[Trial]:
        """Trials whose outcome is known. A good version is kept; of a bad one the trial says where to return to.

        Args:
            sums: what `arrived` says on the first rank; None: here.
        """
        trials = []
        for total in self.arrived() if sums is None else sums:
            task, _, mark = self.outcomes.popleft()
            self.clock.wait(mark)
            loss, self.failures = total / self.probe.rows, 0
            if task.key is None:
                self.base_loss = loss
                continue
            assert self.base_loss is not None
            assert task.kept is not None
            if sessions.get(task.key) is not task.session or task.session is None or task.session.version < task.version:
                continue  # reset or rolled back meanwhile
            regression = loss - self.base_loss
            bad = not math.isfinite(regression) or regression > self.config.max_regression
            if bad:
                trials.append(Trial(task.key, task.version, regression, self.versions.last_good(task.key)))
            else:
                self.versions.add_good(task.key, task.version, task.kept)
                trials.append(Trial(task.key, task.version, regression, None))
        return trials

    def drop(self, key: int) -> None:
        """The session is the base model again, or has returned to what was tried."""
        self.commits.pop(key, None)
        self.line.pop(key, None)
        if self.task is not None and self.task.key == key:
            self.task = None

    def _count(self, key: int, commits: int) -> None:
        if self.config.every:
            self.commits[key] = commits
            if commits >= self.config.every:
                self.line.setdefault(key)
            else:
                self.line.pop(key, None)

    def _begin(self, deltas: Deltas, unsettled: frozenset[int], first: frozenset[int]) -> Task | None:
        """Put the next delta on trial. Where it cannot be, its session is due as before."""
        key = next((key for key in self.line if key not in unsettled and (not first or key in first)), None)
        if key is None:
            return None
        zero = torch.zeros(1, device=self.probe.t_P.device)
        if self.base_loss is None:
            if any(task.key is None for task, *_ in self.outcomes):
                return None  # its outcome is on its way
            self.task = Task(None, None, 0, self.tail.zeros(1, self.tail.head_VD.dtype), None, zero)
            return self.task
        session = deltas.session(key)
        dtype, device = self.tail.head_VD.dtype, self.tail.head_VD.device
        master = deltas.read(key).delta
        delta = master.by(*(x.to(device, dtype, copy=True) for x in master.tensors()))
        self.task = Task(key, session, session.version, delta, keep(deltas, key), zero, self.commits[key])
        del self.commits[key], self.line[key]
        return self.task
