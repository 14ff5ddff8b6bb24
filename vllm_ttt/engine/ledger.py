"""What the engine core knows of each session. Plain data, no vLLM: the scheduler reads and writes it."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from vllm_ttt.engine.familiar import Past
from vllm_ttt.engine.limits import Allowance
from vllm_ttt.errors import RequestError
from vllm_ttt.types import ChunkReport, SessionKey


@dataclass(slots=True)
class Session:
    """One session. ``adapter`` is its LoRA id, which is how the worker knows it."""

    key: SessionKey
    adapter: int
    recent: int
    version: int = 0
    tokens_seen: int = 0
    tokens_learned: int = 0
    tokens_skipped: Counter[str] = field(default_factory=Counter)
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    losses: deque[dict[str, Any]] = field(default_factory=deque)
    #: why it learns no more; None: it learns
    frozen: str | None = None
    #: nats per token by which its delta made the guard's text worse when it was last tried
    probe_regression: float | None = None
    #: what it may still have learned
    allowance: Allowance = field(default_factory=Allowance)
    #: what its prompts are compared with
    past: Past = field(default_factory=Past)
    #: learning requests that are not settled yet, in order of arrival: request id -> arrival number
    open: dict[str, int] = field(default_factory=dict)
    #: requests in the engine
    requests: set[str] = field(default_factory=set)

    def record(self, chunk: ChunkReport) -> None:
        """Count a chunk that was learned or skipped, and remember its losses."""
        if chunk.skipped is None:
            self.tokens_learned += chunk.tokens
        else:
            self.tokens_skipped[chunk.skipped] += chunk.tokens
        if math.isnan(chunk.loss):
            return
        self.losses.append(
            {
                "version": chunk.version,
                "tokens": chunk.tokens,
                "loss": round(chunk.loss, 5) if math.isfinite(chunk.loss) else None,
                "frozen_loss": None if chunk.frozen_loss is None else round(chunk.frozen_loss, 5),
                "served_loss": None if chunk.served_loss is None else round(chunk.served_loss, 5),
                "scale": None if chunk.scale is None else round(chunk.scale, 4),
                "skipped": chunk.skipped,
            }
        )
        while len(self.losses) > self.recent:
            self.losses.popleft()

    def refuse(self, tokens: int, reason: str, seen: bool = False) -> None:
        """A prompt that is answered and not learned; ``seen``: it has been counted as sent already."""
        self.tokens_seen += 0 if seen else tokens
        self.tokens_skipped[reason] += tokens

    def summary(self) -> dict[str, Any]:
        return {
            "session_id": self.key.name,
            "version": self.version,
            "tokens_seen": self.tokens_seen,
            "tokens_learned": self.tokens_learned,
            "tokens_skipped": dict(self.tokens_skipped),
            "frozen": self.frozen,
            "probe_regression": self.probe_regression,
            "requests_open": len(self.requests),
            "created": self.created,
            "last_used": self.last_used,
        }


class Ledger:
    """All sessions, by key and by adapter id."""

    def __init__(self, first_adapter: int, limit: int, per_key: int, recent: int):
        """``limit``: sessions in all. ``per_key``: sessions of one tenant. ``recent``: chunk losses kept of each."""
        self.next_adapter, self.limit, self.per_key, self.recent = first_adapter, limit, per_key, recent
        self.tenants: Counter[str] = Counter()
        self.sessions: dict[SessionKey, Session] = {}
        self.by_adapter: dict[int, Session] = {}

    def find(self, key: SessionKey) -> Session | None:
        return self.sessions.get(key)

    def open(self, key: SessionKey) -> Session:
        """The session of that key, made where there is none; raises RequestError (429) where there is room for no other."""
        session = self.sessions.get(key)
        if session is None:
            if len(self.sessions) >= self.limit:
                raise RequestError(
                    f"this server keeps at most {self.limit} sessions (sessions.host_gib); delete one first", 429
                )
            if self.tenants[key.tenant] >= self.per_key:
                raise RequestError(f"a key has at most {self.per_key} sessions (sessions.per_key); delete one first", 429)
            self.tenants[key.tenant] += 1
            session = Session(key, self.next_adapter, self.recent)
            self.next_adapter += 1
            self.sessions[key] = self.by_adapter[session.adapter] = session
        session.last_used = time.time()
        return session

    def reserve(self) -> int:
        """An adapter id that is no session's."""
        self.next_adapter += 1
        return self.next_adapter - 1

    def remove(self, session: Session) -> None:
        del self.sessions[session.key]
        self.tenants[session.key.tenant] -= 1
        del self.by_adapter[session.adapter]

    def of_tenant(self, tenant: str) -> list[Session]:
        return [s for k, s in self.sessions.items() if k.tenant == tenant]
