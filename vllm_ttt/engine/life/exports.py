"""Adapters on their way to a client, and copies on their way to another engine: a few at once, since each holds a copy of its
session; and so many adapters of each tenant."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.operations import Steps
from vllm_ttt.engine.life.orders import Orders
from vllm_ttt.engine.storage.provenance import provenance
from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTERS_AT_ONCE, ENOUGH_ADAPTERS, FileOrder, FileReport

#: Exports that the worker is asked for at once.
AT_ONCE = 2


class Exports:
    def __init__(self, orders: Orders):
        self.orders = orders
        #: those whose turn has yet to come
        self.waiting: deque[Future] = deque()
        self.under_way = 0
        self.counts: Counter[str] = Counter()
        self.thread = ThreadPoolExecutor(1, "ttt-identity")
        self.identity: Future | None = None

    def admit(self, tenant: str) -> None:
        """Count one more of the tenant, until `answered`. Raises RequestError (429) where it has enough."""
        if self.counts[tenant] >= ADAPTERS_AT_ONCE:
            raise RequestError(ENOUGH_ADAPTERS, 429)
        self.counts[tenant] += 1

    def answered(self, tenant: str) -> None:
        self.counts[tenant] -= 1
        if not self.counts[tenant]:
            del self.counts[tenant]

    def write(self, session: Session, path: str, identity: Callable[[], dict[str, Any]], key: str) -> Steps:
        """Part of an operation: write the adapter of a session that is in memory; returns what the front end is told.

        Args:
            identity: of the model and the settings; asked once, on a thread.
            key: what the file is sealed with; the front end is told.
        """
        if self.identity is None:
            self.identity = self.thread.submit(identity)
        model = yield self.identity
        states: list[dict[str, Any]] = []
        yield from self.turn()
        try:
            order = FileOrder("export", session.adapter, path, metadata={"session_id": session.key.name}, key=key)
            # The ledger has counted what the delta holds then, and nothing that came later.
            report: FileReport = yield self.orders.ask(order, lambda _: states.append(session.to_state()))
        finally:
            self.end_turn()
        if report.outcome != "done":
            raise RequestError(f"session {session.key.name!r} could not be written: {report.error}", 507)
        rate = report.metadata.get("rate")
        told = provenance(model, session.key.name, states[0], float(rate) if rate else None, report.digest)
        told["version"] = report.version
        return {"path": path, "bytes": report.bytes, "version": report.version, "provenance": told, "key": key}

    def turn(self) -> Steps:
        """Part of an operation: wait until the worker may be asked for one more copy, until `end_turn`."""
        turn: Future = Future()
        self.waiting.append(turn)
        yield turn

    def end_turn(self) -> None:
        self.under_way -= 1

    @property
    def busy(self) -> bool:
        """Whether it is the turn of one that waits, or it is still to be said which model this is."""
        return (bool(self.waiting) and self.under_way < AT_ONCE) or (self.identity is not None and not self.identity.done())

    def step(self) -> None:
        """Let those go on whose turn it is."""
        while self.waiting and self.under_way < AT_ONCE:
            self.under_way += 1
            self.waiting.popleft().set_result(None)
