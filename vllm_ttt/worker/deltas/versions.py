"""Earlier masters of each session, in host memory, to which it can return."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from vllm_ttt.worker.delta import State
from vllm_ttt.worker.deltas.masters import Deltas, WorkerSession
from vllm_ttt.worker.ngrams.ngrams import NGrams


class Kept(NamedTuple):
    """A session as it was at a version."""

    #: on the host; None: fresh
    state: State | None
    #: as in `WorkerSession`; None: fresh
    rate: float | None = None
    norms: list[float] | None = None
    ngrams: NGrams | None = None


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
            return Kept(None)
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


def keep(deltas: Deltas, key: int) -> Kept:
    """The session as it is, its state a copy on the host, which may be read once a later mark is done."""
    session = deltas.session(key)
    return Kept(deltas.to_host(key), session.rate, session.norms, session.ngrams)


def restore(deltas: Deltas, key: int, version: int, kept: Kept) -> WorkerSession:
    """Make the session what it was; what has been kept stays as it is."""
    session, fresh = deltas.session(key), deltas.fresh()
    if key in deltas.rows:
        deltas.put(key, kept.state)
    else:
        session.host, session.copied = kept.state, None
    session.version = version
    session.rate = fresh.rate if kept.rate is None else kept.rate
    session.norms = list(fresh.norms if kept.norms is None else kept.norms)
    session.ngrams = kept.ngrams
    return session


def _bytes(kept: Kept) -> int:
    return (0 if kept.state is None else kept.state.bytes) + (0 if kept.ngrams is None else kept.ngrams.stream.nbytes)
