"""Adapters on their way to a client: a few at once, since each holds a copy of its session, and so many of each tenant."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future

from vllm_ttt.engine.ledger import Session
from vllm_ttt.errors import RequestError
from vllm_ttt.types import FileOrder, FileReport

#: Exports that the worker is asked for at once.
AT_ONCE = 2
#: Exports of one tenant that wait for their answer.
PER_TENANT = 4


class Exports:
    def __init__(self, order: Callable[[FileOrder], None]):
        """``order`` sends an order to the worker with the next step."""
        self.order = order
        self.waiting: deque[tuple[Session, str, Future]] = deque()
        #: by the path of the file
        self.under_way: dict[str, tuple[Session, Future]] = {}
        self.counts: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.under_way)

    def admit(self, tenant: str) -> None:
        """Count one more of the tenant, until `answered`. Raises RequestError (429) where it has enough."""
        if self.counts[tenant] >= PER_TENANT:
            message = f"a key may wait for {PER_TENANT} adapters at once; ask again when one of them has come"
            raise RequestError(message, 429)
        self.counts[tenant] += 1

    def answered(self, tenant: str) -> None:
        self.counts[tenant] -= 1
        if not self.counts[tenant]:
            del self.counts[tenant]

    def export(self, session: Session, path: str) -> Future:
        """Resolves to the FileReport of an adapter at ``path``, of a session that is in memory and pinned."""
        future: Future = Future()
        self.waiting.append((session, path, future))
        return future

    def step(self) -> None:
        """Begin those whose turn it is."""
        while self.waiting and len(self.under_way) < AT_ONCE:
            session, path, future = self.waiting.popleft()
            self.under_way[path] = session, future
            self.order(FileOrder("export", session.adapter, path, metadata={"session_id": session.key.name}))

    def read(self, report: FileReport) -> None:
        """Take in how far an export has come."""
        if report.outcome == "taken":
            return
        session, future = self.under_way.pop(report.path)
        if report.outcome == "done":
            future.set_result(report)
        else:
            future.set_exception(RequestError(f"session {session.key.name!r} could not be written: {report.error}", 507))
