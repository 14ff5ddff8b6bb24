"""The comparisons of docs/eval.md, over anything that can score a request.

p2: every session sends different documents of one domain, each in a fresh context; the last tokens of each are scored.
p3: every session sends one document again and again; all its tokens are scored.
long: p2 with many documents.
Each is run in several arms, one after another, the sessions of an arm side by side: see ARMS.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vllm_ttt.errors import ConfigError, TTTError
from vllm_ttt.eval.measures import Measures, Reading, measure
from vllm_ttt.eval.ngrams import mix
from vllm_ttt.eval.retrieval import recent, retrieve
from vllm_ttt.eval.texts import LENGTH, Documents, Sessions, interactions, long, repeats

#: p2 and long score this many tokens at the end of a window: those before give the frozen model its chance at the context.
SCORED = 768

#: In this order. "frozen": no session; "retrieval" and "context": what BM25 finds, or the last documents, before the request;
#: "ngrams": the frozen model and the session's n-grams; "ttt": a session; "ttt_ngrams": a session and its n-grams.
ARMS = ("frozen", "retrieval", "context", "ngrams", "ttt", "ttt_ngrams")
#: p3 leaves them out: they would find the document itself.
NOT_AGAIN = ("retrieval", "context")

#: Documents that "context" puts before a request, where the server's context has room.
CONTEXT_DOCUMENTS = 7

#: called with each request that was answered
Progress = Callable[[], None]


class Scorer(Protocol):
    """The oracle is one (curves.py): it gives the loss of every token but the first."""

    max_model_len: int

    def score(self, ids: list[int], session: str | None = None) -> Awaitable[list[float]]: ...

    def forget(self, session: str) -> Awaitable[None]: ...


@runtime_checkable
class Reader(Protocol):
    """A scorer that knows the model's first choices, too; ``Client`` is one."""

    def read(self, ids: list[int], session: str | None = None) -> Awaitable[Reading]: ...


@dataclass
class Result:
    """``arms[arm][interaction][session]``, for the arms that were run."""

    domains: list[str]
    arms: dict[str, list[list[Measures]]] = field(default_factory=dict)

    def nats(self, arm: str) -> list[list[float]]:
        """Mean loss per token, ``[interaction][session]``; empty where the arm was not run."""
        return [[m.nats for m in row] for row in self.arms.get(arm, [])]

    @property
    def frozen(self) -> list[list[float]]:
        return self.nats("frozen")

    @property
    def retrieval(self) -> list[list[float]]:
        return self.nats("retrieval")

    @property
    def ttt(self) -> list[list[float]]:
        return self.nats("ttt")


def plan(protocol: str, docs: Documents, sessions: int, count: int) -> Sessions:
    """What the sessions of a protocol send; ``count`` is the number of interactions, passes or documents."""
    return {"p2": interactions, "p3": repeats, "long": long}[protocol](docs, sessions, count)


def arms_of(protocol: str, arms: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``arms`` that a protocol has, in the order in which they are run."""
    return tuple(arm for arm in ARMS if arm in arms and not (protocol == "p3" and arm in NOT_AGAIN))


def requests(protocol: str, work: Sessions, arms: tuple[str, ...]) -> int:
    """How many times ``run`` will say that it has come further."""
    total = 0
    for windows in work.windows:
        counts = {"frozen": len({tuple(w) for w in windows}), "retrieval": len(windows) - 1, "context": len(windows) - 1}
        total += sum(counts.get(arm, len(windows)) for arm in arms_of(protocol, arms))
    return total


async def run(
    protocol: str,
    scorer: Scorer,
    work: Sessions,
    arms: tuple[str, ...] = ("frozen", "retrieval", "ttt"),
    tick: Progress = lambda: None,
    context_documents: int = CONTEXT_DOCUMENTS,
) -> Result:
    """Run ``arms`` (some of ARMS, "frozen" among them) of a protocol one after another, an arm's sessions side by side.

    Raises:
        ConfigError: the server's context is too short for a window.
        ServerError: from the scorer.
    """
    if scorer.max_model_len < LENGTH + 2:
        raise ConfigError(f"the server's --max-model-len is {scorer.max_model_len}; a window needs at least {LENGTH + 2}")
    last, result = LENGTH if protocol == "p3" else SCORED, Result(work.domains)
    readings: dict[str, list[list[Reading]]] = {}
    for arm in arms_of(protocol, arms):
        one = _Arm(arm, scorer, tick, context_documents)
        given = readings.get(MADE_OF.get(arm, ""), [[]] * len(work.windows))
        sessions = zip(work.domains, work.windows, given, strict=True)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one.run(*session)) for session in sessions]
        except ExceptionGroup as errors:  # all sessions meet the same trouble: one of them tells it
            raise errors.exceptions[0] from None
        readings[arm] = [task.result() for task in tasks]
        measured = [
            [measure(ids, reading, last) for ids, reading in zip(windows, read, strict=True)]
            for windows, read in zip(work.windows, readings[arm], strict=True)
        ]
        result.arms[arm] = [list(row) for row in zip(*measured, strict=True)]
    return result


def put_before(
    arm: str, earlier: list[list[int]], window: list[int], room: int, documents: int = CONTEXT_DOCUMENTS
) -> list[int]:
    """Token ids that "retrieval" or "context" puts before a request; they fit ``room``."""
    return retrieve(earlier, window, room) if arm == "retrieval" else recent(earlier, documents, room)


#: arm: the arm whose readings it needs, of its first requests or of all
MADE_OF = {"retrieval": "frozen", "context": "frozen", "ngrams": "frozen", "ttt_ngrams": "ttt"}


@dataclass
class _Arm:
    """One arm of a protocol; ``run`` gives the readings of one session's windows."""

    name: str
    scorer: Scorer
    tick: Progress
    context_documents: int

    async def run(self, domain: str, windows: list[list[int]], given: list[Reading]) -> list[Reading]:
        if self.name == "frozen":
            return await self._frozen(windows)
        if self.name == "ttt":
            return await self._ttt(domain, windows)
        if self.name in NOT_AGAIN:
            return given[:1] + [await self._after(windows[:i], windows[i]) for i in range(1, len(windows))]
        mixed = await asyncio.to_thread(mix, windows, given)
        for _ in windows:
            self.tick()
        return mixed

    async def _frozen(self, windows: list[list[int]]) -> list[Reading]:
        known: dict[tuple[int, ...], Reading] = {}
        for window in windows:
            if tuple(window) not in known:
                known[tuple(window)] = await self._read(window)
        return [known[tuple(window)] for window in windows]

    async def _after(self, earlier: list[list[int]], window: list[int]) -> Reading:
        room = self.scorer.max_model_len - 1 - len(window)
        before = put_before(self.name, earlier, window, room, self.context_documents)
        return (await self._read(before + window)).last(LENGTH)

    async def _ttt(self, domain: str, windows: list[list[int]]) -> list[Reading]:
        label = "".join(c if c.isascii() and c.isalnum() else "-" for c in domain)[:64]
        session = f"eval-{label}-{secrets.token_hex(6)}"
        try:
            return [await self._read(window, session) for window in windows]
        finally:
            with contextlib.suppress(TTTError):  # what happened before is what matters
                await self.scorer.forget(session)

    async def _read(self, ids: list[int], session: str | None = None) -> Reading:
        if isinstance(self.scorer, Reader):
            reading = await self.scorer.read(ids, session)
        else:
            reading = Reading(await self.scorer.score(ids, session))
        self.tick()
        return reading
