"""Earlier masters of each session, in host memory, to which it can return."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from vllm_ttt.worker.clock import copy_to_host
from vllm_ttt.worker.deltas import Deltas, Session
from vllm_ttt.worker.micro_step import Delta


class Kept(NamedTuple):
    """A session as it was at a version."""

    #: B, [1, out, R] float32 on the host; None: all zero
    delta: Delta | None
    #: norms of B relative to W, by MODULES, and the losses that chose the scale
    norms: list[float]
    losses: list[float]


class Versions:
    """The last ``keep`` of each session, one every ``every`` commits; version 0 needs no keeping."""

    def __init__(self, keep: int, every: int, limit: int):
        """``limit``: bytes for all of them; where it is reached, the session that has most gives its oldest."""
        self.keep, self.every, self.limit = keep, every, limit
        self.kept: dict[int, OrderedDict[int, Kept]] = {}
        #: the last version of each session that the guard found good, and the session then; kept whatever the limits are
        self.good: dict[int, tuple[int, Kept]] = {}
        self.commits: dict[int, int] = {}
        self.bytes = 0

    def due(self, key: int) -> bool:
        """Whether the commit that is being made should be kept; call it once for each."""
        self.commits[key] = (self.commits.get(key, 0) + 1) % self.every
        return self.keep > 0 and self.commits[key] == 0

    def add(self, key: int, version: int, kept: Kept) -> None:
        mine = self.kept.setdefault(key, OrderedDict())
        if version == 0 or version in mine:
            return
        mine[version] = kept
        self.bytes += _bytes(kept)
        while len(mine) > self.keep:
            self._forget(key)
        while self.bytes > self.limit:
            self._forget(max(self.kept, key=lambda k: len(self.kept[k])))

    def of(self, key: int) -> list[int]:
        """Versions that the session can return to, oldest first."""
        return sorted({0, *self.kept.get(key, ()), self.last_good(key)})

    def add_good(self, key: int, version: int, kept: Kept) -> None:
        self.good[key] = version, kept

    def last_good(self, key: int) -> int:
        return self.good[key][0] if key in self.good else 0

    def find(self, key: int, version: int) -> Kept | None:
        if version == 0:
            return Kept(None, [], [])
        if key in self.good and self.good[key][0] == version:
            return self.good[key][1]
        return self.kept.get(key, {}).get(version)

    def cut(self, key: int, version: int) -> None:
        """Forget what came after ``version``."""
        while self.kept.get(key) and next(reversed(self.kept[key])) > version:
            self._forget(key, last=True)
        if self.last_good(key) > version:
            del self.good[key]
        self.commits[key] = 0

    def drop(self, key: int) -> None:
        while self.kept.get(key):
            self._forget(key)
        self.kept.pop(key, None)
        self.good.pop(key, None)
        self.commits.pop(key, None)

    def _forget(self, key: int, last: bool = False) -> None:
        _, kept = self.kept[key].popitem(last=last)
        self.bytes -= _bytes(kept)


def snapshot(deltas: Deltas, key: int) -> Delta | None:
    """A copy of the session's master on the host, which may be read once a later mark is done."""
    if key not in deltas.rows:
        return deltas.session(key).host  # never written to
    return Delta(*(copy_to_host(x) for x in deltas.read(key).tensors()))


def restore(deltas: Deltas, key: int, version: int, kept: Kept) -> Session:
    """Make the session what it was; what has been kept stays as it is."""
    session, delta = deltas.session(key), kept.delta
    if key in deltas.rows:
        for i, x in enumerate(deltas.read(key).tensors()):
            x.zero_() if delta is None else x.copy_(delta.tensors()[i])
    else:
        session.host, session.copied = delta, None
    fresh = deltas.fresh()
    session.version = version
    session.norms, session.losses = list(kept.norms or fresh.norms), list(kept.losses or fresh.losses)
    return session


def _bytes(kept: Kept) -> int:
    return 0 if kept.delta is None else sum(x.numel() * x.element_size() for x in kept.delta.tensors())
