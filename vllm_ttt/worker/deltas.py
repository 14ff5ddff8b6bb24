"""The masters: each session's B in float32. LoRA slots hold copies; this is the truth.

A session that is being learned has a row of device tensors; the others live in host memory, and rows are handed out in
order of last use.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_ttt.worker.clock import Clock, copy_to_host
from vllm_ttt.worker.micro_step import MODULES, Delta, Tail


@dataclass(slots=True)
class Session:
    """A session as the worker knows it."""

    #: updates committed to the master, as far as their outcome is known
    version: int = 0
    #: B of what is being served, float32, while it is not the master: the slot follows when a prompt has been read
    serving: Delta | None = None
    #: the version of ``serving``
    serving_version: int = 0
    #: what is being served is this times B
    scale: float = 1.0
    #: the scale that its losses speak for, and those losses in nats, by `learn.scales` (worker/scale.py)
    chosen: float = 1.0
    losses: list[float] = field(default_factory=list)
    #: the most that the prompt of its latest request allows
    ceiling: float = math.inf
    #: norm of B relative to W, by MODULES
    norms: list[float] = field(default_factory=lambda: [0.0] * len(MODULES))
    #: the master while it has no row: [1, out, R] float32 on the host; None: all zero
    host: Delta | None = None

    #: marks the end of the copy to ``host``, which must not be read before; None: it is there
    copied: Any = None

    def to_state(self) -> dict[str, Any]:
        """What a file says of the session besides B, for JSON; `Deltas.revive` takes it back."""
        ceiling = None if math.isinf(self.ceiling) else self.ceiling
        return {
            "version": self.version, "norms": self.norms, "chosen": self.chosen, "losses": self.losses, "ceiling": ceiling
        }  # fmt: skip

    @property
    def served(self) -> int:
        """The version that is being served."""
        return self.version if self.serving is None else self.serving_version

    @property
    def wanted(self) -> float:
        """The scale with which the session should be served."""
        return min(self.chosen, self.ceiling)


class Deltas:
    """Masters [rows, out, R] float32, and the gradient that a chunk accumulates, of the same shape."""

    def __init__(self, tail: Tail, rows: int, scales: Sequence[float] = (1.0,)):
        """``rows`` sessions on the device, and one spare row that belongs to none: padding of a batch is written there.

        Args:
            scales: `learn.scales`; a fresh session has no reason to prefer any.
        """
        self.tail, self.scales = tail, scales
        self.clock = Clock(tail.head_VD.device)
        self.masters = Delta.zeros(tail, rows + 1)
        self.grads = Delta.zeros(tail, rows + 1)
        self.spare = rows
        self.sessions: dict[int, Session] = {}
        self.free = list(range(rows - 1, -1, -1))
        #: session -> row, least recently used first
        self.rows: OrderedDict[int, int] = OrderedDict()
        #: sessions whose gradient is being accumulated: their rows stay
        self.pinned: set[int] = set()
        self.evictions = 0

    def session(self, key: int) -> Session:
        if key not in self.sessions:
            self.sessions[key] = self.fresh()
        return self.sessions[key]

    def fresh(self) -> Session:
        """A session that has learned nothing, so that no scale is better than another."""
        scale = sum(self.scales) / len(self.scales)
        return Session(scale=scale, chosen=scale, losses=[0.0] * len(self.scales))

    def revive(self, state: dict[str, Any]) -> Session:
        """The session of which `Session.to_state` said that, without its B, which becomes ``host``."""
        session = self.fresh()
        session.version, session.norms = int(state["version"]), [float(x) for x in state["norms"]]
        session.chosen, session.ceiling = float(state["chosen"]), math.inf if (c := state["ceiling"]) is None else float(c)
        if len(state["losses"]) == len(self.scales):  # else `learn.scales` has changed
            session.losses = [float(x) for x in state["losses"]]
        session.scale = session.wanted
        return session

    def row(self, key: int) -> int | None:
        """The session's row, brought in where it has none; None where every row is pinned."""
        if key in self.rows:
            self.rows.move_to_end(key)
            return self.rows[key]
        if not self.free and not self._evict():
            return None
        session, row = self.session(key), self.free.pop()
        self.rows[key] = row
        for i, x in enumerate(self.masters.tensors()):
            if session.host is None:
                x[row].zero_()
            else:
                x[row].copy_(session.host.tensors()[i][0], non_blocking=True)  # in the stream that wrote it
        session.host = session.copied = None
        return row

    def begin_chunk(self, key: int) -> None:
        """Keep the session's row until `end_chunk`."""
        self.pinned.add(key)

    def end_chunk(self, key: int) -> None:
        self.pinned.discard(key)

    def read(self, key: int) -> Delta:
        """The session's master as [1, out, R] float32: a view of its row, or its copy on the host."""
        if key in self.rows:
            row = self.rows[key]
            return Delta(*(x[row : row + 1] for x in self.masters.tensors()))
        session = self.session(key)
        if session.copied is not None:
            self.clock.wait(session.copied)
            session.copied = None
        return session.host or Delta.zeros(self.tail, 1)

    def drop(self, key: int) -> None:
        """Forget the session: it is the base model again."""
        self.sessions.pop(key, None)
        self.pinned.discard(key)
        if key in self.rows:
            self.free.append(self.rows.pop(key))

    def copy(self, key: int, to: int) -> None:
        """Make ``to``, which has no row, what ``key`` is now."""
        source = self.session(key)
        target = self.sessions[to] = self.revive(source.to_state())
        if key in self.rows:
            target.host, target.copied = self._to_host(key)
        else:
            target.host, target.copied = source.host, source.copied  # what lies on the host is never written to

    def bytes_per_session(self) -> int:
        return sum(x[0].numel() * x.element_size() for x in self.masters.tensors())

    def _evict(self) -> bool:
        key = next((k for k in self.rows if k not in self.pinned), None)
        if key is None:
            return False
        session = self.sessions[key]
        session.host, session.copied = self._to_host(key)
        self.free.append(self.rows.pop(key))
        self.evictions += 1
        return True

    def _to_host(self, key: int) -> tuple[Delta, Any]:
        """A copy of the session's row, and the mark behind it: nobody waits for it here."""
        return Delta(*(copy_to_host(x) for x in self.read(key).tensors())), self.clock.mark()
