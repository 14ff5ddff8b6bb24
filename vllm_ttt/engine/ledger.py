"""What the engine core knows of each session. Plain data, no vLLM: the scheduler reads and writes it."""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from vllm_ttt.engine.life.states import Life, State
from vllm_ttt.engine.limits.limits import Allowance
from vllm_ttt.engine.limits.quotas import Quotas
from vllm_ttt.engine.prefix.history import History
from vllm_ttt.engine.prefix.keys import Epoch
from vllm_ttt.engine.storage.audit import Audit
from vllm_ttt.engine.storage.records import STANDING, Row, Version
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.types import ChunkReport, SessionKey

#: Why a session is frozen by its owner.
ASKED_FOR = "asked for"
#: Of so many sessions that have learned nothing it is remembered that somebody named them.
NAMES = 64


_CACHE = ("tokens", "explained", "nats")


def cache_summary(cache: dict[str, float]) -> dict[str, float | None]:
    """What is said of a session's cache, from what `Session.cache` has counted."""
    tokens = cache.get("tokens")
    if not tokens:
        return {"cache_share": None, "cache_gain": None}
    return {"cache_share": round(cache["explained"] / tokens, 5), "cache_gain": round(cache["nats"] / tokens, 5)}


@dataclass(slots=True)
class Open:
    """A learning request that is not settled: some of it may still be waiting for its step."""

    #: order of arrival
    arrival: int
    #: pairs of its prompt, which have been counted as sent
    sent: int = 0
    #: pairs that have been learned, history included, and pairs of which it is known what became of them
    learned: int = 0
    done: int = 0
    #: its prefixes in the session's history
    prefixes: list[bytes] = field(default_factory=list)

    def note(self, chunk: ChunkReport) -> None:
        self.done = max(self.done, chunk.end)
        if chunk.skipped not in ("short", "full", "unread", "error"):  # those are left to the next turn; others had theirs
            self.learned = max(self.learned, chunk.end)


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
    #: that have named it
    asked: int = 0
    created: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.time)
    losses: deque[dict[str, Any]] = field(default_factory=deque)
    #: of chunks that were learned beside its cache: tokens, how many of them the cache explains, and nats that it has gained
    cache: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_CACHE, 0.0))
    history: History = field(default_factory=History)
    #: by request id, in order of arrival
    open: dict[str, Open] = field(default_factory=dict)
    #: requests in the engine
    requests: set[str] = field(default_factory=set)
    #: whether all of them wait behind others who wait for a place in memory
    yields: bool = False
    #: why it uses the delta and learns nothing until it is unfrozen; None: it learns
    frozen: str | None = None
    #: nats per token by which its delta made the guard's text worse when it was last tried
    probe_regression: float | None = None
    #: what it may still have learned
    allowance: Allowance = field(default_factory=Allowance)
    #: what the state dir calls it
    uid: str = field(default_factory=lambda: secrets.token_hex(16))
    #: where it is, its generation, and what is to be done with it
    life: Life = field(default_factory=Life)
    #: the newest version on disk
    saved: Version | None = None
    #: why it could not be saved or read lately, for its owner
    error: str | None = None
    #: of its blocks in the prefix cache
    epoch: Epoch = field(default_factory=Epoch)
    #: the adapter that it began with; "": the base model; None: nobody has named one yet
    model: str | None = None
    #: whether it takes a place of its key
    claimed: bool = False
    #: the uid under which the audit log knows it
    noted: str = ""

    @property
    def unsaved(self) -> bool:
        """Whether its delta is not, or not like this, on disk."""
        return self.life.unsaved

    @property
    def idle(self) -> bool:
        """Whether nobody needs it."""
        return not (self.requests or self.open or self.life.queue)

    @property
    def resting(self) -> bool:
        """Whether it may leave memory: nobody needs it, or they all wait for others first."""
        return self.idle or (self.yields and not self.life.queue and self.open.keys() <= self.requests)

    @property
    def home(self) -> State:
        """Where it is while it is not in memory."""
        return State.ON_DISK if self.saved is not None else State.NEW

    @property
    def blank(self) -> bool:
        """Whether it has never learned anything, and its owner has asked for nothing: it is only a name."""
        return not self.life.learned_at and self.saved is None and self.frozen is None and self.life.recorded_at < 0

    def to_state(self) -> dict[str, Any]:
        """What is kept of the session with each version, for JSON; `from_state` takes it back."""
        return {
            "version": self.version,
            "tokens_seen": self.tokens_learned + self.tokens_skipped.total(),  # of what still waits nothing is kept
            "tokens_learned": self.tokens_learned,
            "tokens_skipped": dict(self.tokens_skipped),
            "requests": self.asked,
            "losses": list(self.losses),
            "cache": self.cache,
            "frozen": self.frozen,
            "probe_regression": self.probe_regression,
            "model": self.model,
            "allowance": self.allowance.to_state(),
            "history": self.history.to_state({p: opened.learned for opened in self.open.values() for p in opened.prefixes}),
        }

    def standing(self) -> dict[str, Any]:
        """What of its state holds whichever version its delta has."""
        return _standing(self.to_state())

    def from_state(self, state: dict[str, Any]) -> None:
        """Take over what `to_state` said; a key that is missing keeps what a fresh session has."""
        self.version = state.get("version", 0)
        self.tokens_seen = state.get("tokens_seen", 0)
        self.tokens_learned = state.get("tokens_learned", 0)
        self.tokens_skipped = Counter(state.get("tokens_skipped", {}))
        self.asked = state.get("requests", 0)
        self.losses = deque(state.get("losses", ()), maxlen=self.recent)
        self.cache = {name: float(state.get("cache", {}).get(name, 0)) for name in _CACHE}
        self.frozen = state.get("frozen")
        self.probe_regression = state.get("probe_regression")
        self.model = state.get("model")
        self.allowance = Allowance.from_state(state["allowance"]) if "allowance" in state else Allowance()
        self.history = History.from_state(state.get("history", ()), self.version)

    def state_at(self, version: int) -> dict[str, Any]:
        """`to_state` as it is where the session, of which nothing is being learned, returns to ``version``."""
        history = History.from_state(self.history.to_state(), self.version)
        history.back_to(version)
        return {**self.to_state(), "version": version, "history": history.to_state()}

    def row(self, newest: Version | None = None) -> Row:
        """As the state dir records it now."""
        return Row(self.uid, self.key, self.created, self.last_used, self.to_state(), newest)

    def record(self, chunk: ChunkReport) -> None:
        """Count a chunk that was learned or skipped, and remember its losses."""
        if chunk.version != self.version:
            self.version = chunk.version
            self.life.learned()
        if (opened := self.open.get(chunk.request)) is not None:
            opened.note(chunk)
        if chunk.skipped is None:
            self.tokens_learned += chunk.tokens
        else:
            self.tokens_skipped[chunk.skipped] += chunk.tokens
        if math.isnan(chunk.loss):
            return
        if chunk.cache_loss is not None and chunk.cache_share is not None:
            found = chunk.tokens, chunk.tokens * chunk.cache_share, chunk.tokens * (chunk.loss - chunk.cache_loss)
            self.cache = {name: self.cache[name] + more for name, more in zip(_CACHE, found, strict=True)}
        self.losses.append(
            {
                "version": chunk.version,
                "tokens": chunk.tokens,
                "loss": round(chunk.loss, 5) if math.isfinite(chunk.loss) else None,
                "frozen_loss": None if chunk.base_loss is None else round(chunk.base_loss, 5),
                "cache_loss": None if chunk.cache_loss is None else round(chunk.cache_loss, 5),
                "cache_share": None if chunk.cache_share is None else round(chunk.cache_share, 5),
                "rate": round(chunk.rate, 7),
                "skipped": chunk.skipped,
            }
        )
        while len(self.losses) > self.recent:
            self.losses.popleft()

    def refuse(self, tokens: int, reason: str, seen: bool = False) -> None:
        """A prompt that is answered and not learned; ``seen``: it has been counted as sent already."""
        self.tokens_seen += 0 if seen else tokens
        self.tokens_skipped[reason] += tokens

    def back_to(self, version: int, saved: Version | None = None) -> None:
        """The worker has made its delta what it was at ``version``; ``saved``: the state dir has it like this."""
        self.version = version
        self.history.back_to(version)
        self.epoch.begin(version)
        self.life.returned()
        if saved is not None:
            self.saved, self.error = saved, None
            self.life.saved_at = self.life.generation

    def copy(self, source: Session) -> None:
        """The worker has made its delta what that of ``source`` is."""
        self.from_state(source.to_state())
        self.life.learned()

    def become(self, state: dict[str, Any], saved: Version | None) -> None:
        """The state dir has it like this now, and its delta is nowhere else. Requests that wait for it stay with it."""
        self.from_state(state)
        self.open = {name: opened for name, opened in self.open.items() if name in self.requests}
        self.tokens_seen += sum(opened.sent for opened in self.open.values())
        self.life.returned()
        self.life.saved_at = self.life.generation
        self.saved, self.error = saved, None
        self.epoch.begin(self.version)

    def summary(self) -> dict[str, Any]:
        return {
            "session_id": self.key.name,
            "version": self.version,
            "tokens_seen": self.tokens_seen,
            "tokens_learned": self.tokens_learned,
            "tokens_skipped": dict(self.tokens_skipped),
            **cache_summary(self.cache),
            "frozen": self.frozen is not None,
            "frozen_reason": self.frozen,
            "probe_regression": self.probe_regression,
            "requests_open": len(self.requests),
            "created": self.created,
            "last_used": self.last_used,
        }


class Ledger:
    """Sessions that are in memory, or that somebody waits for, by key and by adapter id; least recently used first.

    With a store, all others are on disk and come back when they are asked for.
    """

    def __init__(self, first_adapter: int, limit: int, quotas: Quotas, recent: int, store: Store | None = None):
        """``limit``: sessions in memory. ``quotas``: who may have how many. ``recent``: chunk losses kept of each."""
        self.next_adapter, self.limit, self.quotas, self.recent, self.store = first_adapter, limit, quotas, recent, store
        self.audit = Audit()
        self.sessions: dict[SessionKey, Session] = {}
        self.by_adapter: dict[int, Session] = {}
        #: sessions that were blank when they were last used, in that order
        self.names: dict[SessionKey, Session] = {}

    def find(self, key: SessionKey) -> Session | None:
        """The session of that key, or None; one that is on disk gets its place in the ledger.

        Raises RequestError (409) where the state dir is shared and this server does not have the session.
        """
        if self.store is not None and self.store.leases is not None:
            self.store.leases.check(key)
        session = self.peek(key)
        return self._enter(session) if session is not None and key not in self.sessions else session

    def peek(self, key: SessionKey) -> Session | None:
        """The same, to look at: one that is on disk stays out of the ledger."""
        if (session := self.sessions.get(key)) is not None or self.store is None:
            return session
        row = self.store.find(key)
        return None if row is None else self.from_row(row)

    def open(self, key: SessionKey, learns: bool = True) -> Session:
        """The session of that key, made where there is none.

        Args:
            learns: whether it may learn something; else a name that is new takes no place of its key.
        Raises:
            RequestError: 429, there is no room for another session that learns; 503, the audit log cannot be written.
        """
        self.audit.check()
        session = self.find(key)
        if session is None:
            if learns:
                self.quotas.check(key.tenant)
            session = self._enter(Session(key, self.next_adapter, self.recent))
        if learns:
            self.claim(session)
        session.last_used, session.asked = time.time(), session.asked + 1
        session.life.touch()
        self.sessions[key] = self.sessions.pop(key)
        return session

    def record(self, session: Session, chunk: ChunkReport) -> None:
        """Count a chunk of the session that was learned or skipped."""
        session.record(chunk)
        if chunk.skipped is None:
            self.audit.note("learn", session, request=chunk.request, tokens=chunk.tokens, version=chunk.version)

    def claim(self, session: Session) -> None:
        """The session takes a place of its key, unless it has one. Raises RequestError (429) where there is none."""
        if not session.claimed:
            self.quotas.check(session.key.tenant)
            self.quotas.add(session.key.tenant)
            session.claimed = True
            self.audit.created(session)

    def give_back(self, session: Session) -> None:
        """The session takes no place of its key any more."""
        if session.claimed:
            self.quotas.add(session.key.tenant, -1)
            session.claimed = False

    def is_a_name(self, session: Session) -> list[Session]:
        """Nobody uses the session, and it is blank: it takes no place. Returns those whose name need not be remembered now."""
        self.give_back(session)
        self.names.pop(session.key, None)
        self.names[session.key] = session
        past = [self.names.pop(next(iter(self.names))) for _ in range(len(self.names) - NAMES)]
        return [s for s in past if self.sessions.get(s.key) is s and s.idle and s.blank]

    def reserve(self) -> int:
        """An adapter id that is no session's."""
        self.next_adapter += 1
        return self.next_adapter - 1

    def remove(self, session: Session) -> None:
        """It is no more."""
        self.forget(session)
        self.give_back(session)

    def renew(self, session: Session) -> None:
        """What the worker knows as its adapter is not the session any more: it gets another one."""
        del self.by_adapter[session.adapter]
        session.adapter = self.reserve()
        self.by_adapter[session.adapter] = session

    def forget(self, session: Session) -> None:
        """It is not in memory any more. Of one that has learned nothing, that is all there was."""
        if session.blank:
            self.give_back(session)
        del self.sessions[session.key]
        del self.by_adapter[session.adapter]

    def of_tenant(self, tenant: str | None) -> list[Session]:
        """Those in the ledger, of one tenant or of all."""
        return [s for k, s in self.sessions.items() if tenant is None or k.tenant == tenant]

    def from_row(self, row: Row) -> Session:
        """A session as the state dir has it. It is not in the ledger, and its adapter id is not taken, before `_enter`."""
        session = Session(row.key, self.next_adapter, self.recent, created=row.created, last_used=row.last_used, uid=row.uid)
        # What was counted beyond the newest version was not saved in time: it did not happen.
        newest = row.newest.state if row.newest else {}
        same = row.state.get("version", 0) == newest.get("version", 0)
        session.from_state({**(row.state if same else newest), **_standing(row.state)})
        session.saved = row.newest
        session.life, session.claimed = Life(session.home, recorded_at=0), True
        if row.problem:
            session.error = f"what was recorded of it is damaged ({row.problem}); this is what can be read"
        return session

    def _enter(self, session: Session) -> Session:
        self.quotas.of(session.key.tenant)  # counted before anything of it can go
        self.next_adapter += 1
        self.sessions[session.key] = self.by_adapter[session.adapter] = session
        return session


def _standing(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in STANDING if key in state}
