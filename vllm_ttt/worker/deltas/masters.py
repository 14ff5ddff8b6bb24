"""The masters: each session's `State`. LoRA slots hold copies of its B; this is the truth.

A session that is being learned has a row of device tensors; the others live in host memory, and rows are handed out in
order of last use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_ttt.worker.clock import Clock, copy_to_host
from vllm_ttt.worker.delta import Delta, State
from vllm_ttt.worker.ngrams.ngrams import NGrams
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.micro_step import Tail


@dataclass(slots=True)
class WorkerSession:
    """A session as the worker knows it."""

    #: updates committed to the master, as far as their outcome is known
    version: int = 0
    #: the rate of its next step, likewise
    rate: float = 0.0
    #: norm of B relative to W, by adapted module; empty for a fresh session
    norms: list[float] = field(default_factory=list)
    #: chunks whose step has been launched since the session came to memory
    steps: int = 0
    #: B of what is being served, [1, ...] float32 on the host, while it is not the master: the slot follows when a prompt has
    #: been read; and the mark before which it must not be read
    serving: Delta | None = None
    serving_copied: Any = None
    #: the version of ``serving``
    serving_version: int = 0
    #: its own cache; None: it remembers nothing. What it was when ``serving`` was
    ngrams: NGrams | None = None
    serving_ngrams: NGrams | None = None
    #: the master while it has no row, on the host; None: a fresh one
    host: State | None = None
    #: marks the end of the copy to ``host``, which must not be read before; None: it is there
    copied: Any = None

    def to_state(self) -> dict[str, Any]:
        """What a file says of the session besides its tensors, for JSON; `Deltas.revive` takes it back."""
        state: dict[str, Any] = {"version": self.version, "norms": self.norms, "rate": self.rate}
        return state if self.ngrams is None else {**state, "cache": self.ngrams.to_state()}

    @property
    def served(self) -> int:
        """The version that is being served."""
        return self.version if self.serving is None else self.serving_version

    @property
    def served_ngrams(self) -> NGrams | None:
        """The cache that is being served, which keeps step with the delta."""
        return self.ngrams if self.serving is None else self.serving_ngrams


class Deltas:
    """``masters``: the states of sessions on the device, one row each."""

    def __init__(self, tail: Tail | Head, rows: int, rate: float):
        """``rows`` sessions on the device, and one spare row that belongs to none: padding of a batch is written there.

        Args:
            rate: of a fresh session.
        """
        self.tail, self.rate, self.spare = tail, rate, rows
        self.clock = Clock(tail.head_VD.device)
        self.masters = self.fresh_state(rows + 1)
        self.sessions: dict[int, WorkerSession] = {}
        self.free = list(range(rows - 1, -1, -1))
        #: session -> row, least recently used first
        self.rows: OrderedDict[int, int] = OrderedDict()
        self.evictions = 0

    def session(self, key: int) -> WorkerSession:
        if key not in self.sessions:
            self.sessions[key] = self.fresh()
        return self.sessions[key]

    def fresh(self) -> WorkerSession:
        """A session that has learned nothing."""
        return WorkerSession(rate=self.rate, norms=[0.0] * len(self.tail.modules))

    def fresh_state(self, sessions: int) -> State:
        """On the device."""
        rates = torch.full((sessions,), self.rate, device=self.tail.head_VD.device)
        return State(self.tail.zeros(sessions), self.tail.zeros(sessions, torch.bfloat16), rates)

    def fresh_on_host(self) -> State:
        """Of one session. It takes no memory of the device, which vLLM may have filled."""
        like = self.masters.row(self.spare)
        fresh = like.by(*(torch.zeros_like(x, device="cpu") for x in like.tensors()))
        fresh.rate_S.fill_(self.rate)
        return fresh

    def revive(self, state: dict[str, Any]) -> WorkerSession:
        """The session of which `WorkerSession.to_state` said that, without its tensors, which become ``host``."""
        rate = self.rate if state["rate"] is None else float(state["rate"])  # None: it was imported
        return WorkerSession(int(state["version"]), rate, [float(x) for x in state["norms"]])

    def row(self, key: int, keep: Container[int] = ()) -> int | None:
        """The session's row, brought in where it has none; None where every row belongs to one of the sessions ``keep``."""
        if key in self.rows:
            self.rows.move_to_end(key)
            return self.rows[key]
        if not self.free and not self._evict(keep):
            return None
        session, row = self.session(key), self.free.pop()
        try:
            self._write(row, session.host)
        except Exception:
            self.free.append(row)
            raise
        self.rows[key] = row  # not before: what is in it is another session's
        session.host = session.copied = None
        return row

    def put(self, key: int, state: State | None) -> None:
        """Make the session's row what ``state`` is, in the stream of the steps; None: fresh."""
        self._write(self.rows[key], state)

    def _write(self, row: int, state: State | None) -> None:
        own = self.masters.row(row)
        if state is None:
            for x in own.tensors():
                x.zero_()
            own.rate_S.fill_(self.rate)
            return
        for x, given in zip(own.tensors(), state.tensors(), strict=True):
            x.copy_(given, non_blocking=True)

    def read(self, key: int) -> State:
        """The session's master: a view of its row, or its copy on the host."""
        if key in self.rows:
            return self.masters.row(self.rows[key])
        session = self.session(key)
        if session.copied is not None:
            self.clock.wait(session.copied)
            session.copied = None
        return session.host or self.fresh_state(1)

    def drop(self, key: int) -> None:
        """Forget the session: it is the base model again."""
        self.sessions.pop(key, None)
        if key in self.rows:
            self.free.append(self.rows.pop(key))

    def copy(self, key: int, to: int) -> None:
        """Make ``to``, which has no row, what ``key`` is now."""
        source = self.session(key)
        target = self.sessions[to] = self.revive(source.to_state())
        target.ngrams = source.ngrams
        if key in self.rows:
            target.host, target.copied = self.to_host(key), self.clock.mark()
        else:
            target.host, target.copied = source.host, source.copied  # what lies on the host is never written to

    def to_host(self, key: int) -> State | None:
        """A copy of the session's master, to be read once a later mark is done: nobody waits for it here. None: fresh."""
        if key not in self.rows:
            return self.session(key).host  # never written to
        master = self.read(key)
        return master.by(*map(copy_to_host, master.tensors()))

    def bytes_per_session(self) -> int:
        return self.masters.row(0).bytes

    def _evict(self, keep: Container[int]) -> bool:
        key = next((k for k in self.rows if k not in keep), None)
        if key is None:
            return False
        session = self.sessions[key]
        session.host, session.copied = self.to_host(key), self.clock.mark()
        self.free.append(self.rows.pop(key))
        self.evictions += 1
        return True
