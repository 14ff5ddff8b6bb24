"""The two comparisons of docs/algorithm.md, over anything that can score a request.

P2: every session sends different documents of one domain, each in a fresh context; the last tokens of each are scored.
P3: every session sends one document again and again; all its tokens are scored.
Each is run without a session (frozen), with retrieval in the prompt (P2 only), and in sessions (ttt).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

from vllm_ttt.errors import ConfigError, TTTError
from vllm_ttt.eval.retrieval import retrieve
from vllm_ttt.eval.texts import LENGTH, Documents, Sessions, interactions, repeats

#: P2 scores this many tokens at the end of a window: those before give the frozen model its chance at the context.
SCORED = 768

#: In this order; the first requests of "retrieval" are those of "frozen", which is therefore never left out.
ARMS = ("frozen", "retrieval", "ttt")

#: called with each request that was answered
Progress = Callable[[], None]


class Scorer(Protocol):
    """``Client`` is one; the oracle is another (curves.py)."""

    max_model_len: int

    def score(self, ids: list[int], session: str | None = None) -> Awaitable[list[float]]: ...

    def forget(self, session: str) -> Awaitable[None]: ...


@dataclass
class Result:
    """Mean NLL in nats per token, ``[interaction][session]``; ``retrieval`` and ``ttt`` are empty where not run."""

    domains: list[str]
    frozen: list[list[float]] = field(default_factory=list)
    retrieval: list[list[float]] = field(default_factory=list)
    ttt: list[list[float]] = field(default_factory=list)


def plan(protocol: str, docs: Documents, sessions: int, count: int) -> Sessions:
    """What the sessions of "p2" or "p3" send; ``count`` is the number of interactions or passes."""
    return {"p2": interactions, "p3": repeats}[protocol](docs, sessions, count)


def requests(protocol: str, work: Sessions, arms: tuple[str, ...]) -> int:
    """How many requests ``run`` will send."""
    total = 0
    for windows in work.windows:
        total += len({tuple(w) for w in windows}) if "frozen" in arms else 0
        total += len(windows) - 1 if "retrieval" in arms and protocol == "p2" else 0
        total += len(windows) if "ttt" in arms else 0
    return total


async def run(
    protocol: str, scorer: Scorer, work: Sessions, arms: tuple[str, ...] = ARMS, tick: Progress = lambda: None
) -> Result:
    """Run ``arms`` (some of ARMS, "frozen" among them) of a protocol one after another, an arm's sessions side by side.

    Raises:
        ConfigError: the server's context is too short for a window.
        ServerError: from the scorer.
    """
    if scorer.max_model_len < LENGTH + 2:
        raise ConfigError(f"the server's --max-model-len is {scorer.max_model_len}; a window needs at least {LENGTH + 2}")
    last = SCORED if protocol == "p2" else LENGTH
    result = Result(work.domains)
    for arm in arms:
        each = {"frozen": _frozen, "retrieval": _retrieval, "ttt": _ttt}[arm]
        if arm == "retrieval" and protocol == "p3":
            continue
        sessions = zip(work.domains, work.windows, strict=True)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(each(scorer, domain, windows, last, tick)) for domain, windows in sessions]
        except ExceptionGroup as errors:  # all sessions meet the same trouble: one of them tells it
            raise errors.exceptions[0] from None
        setattr(result, arm, [list(row) for row in zip(*(task.result() for task in tasks), strict=True)])
        if arm == "retrieval":
            result.retrieval.insert(0, list(result.frozen[0]))
    return result


async def _frozen(scorer: Scorer, _: str, windows: list[list[int]], last: int, tick: Progress) -> list[float]:
    known: dict[tuple[int, ...], float] = {}
    for window in windows:
        if tuple(window) not in known:
            known[tuple(window)] = await _mean(scorer, window, last)
            tick()
    return [known[tuple(window)] for window in windows]


async def _retrieval(scorer: Scorer, _: str, windows: list[list[int]], last: int, tick: Progress) -> list[float]:
    losses = []
    for i, window in enumerate(windows[1:], 1):
        room = scorer.max_model_len - 1 - len(window)
        losses.append(await _mean(scorer, retrieve(windows[:i], window, room) + window, last))
        tick()
    return losses


async def _ttt(scorer: Scorer, domain: str, windows: list[list[int]], last: int, tick: Progress) -> list[float]:
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in domain)[:64]
    session, losses = f"eval-{label}-{secrets.token_hex(6)}", []
    try:
        for window in windows:
            losses.append(await _mean(scorer, window, last, session))
            tick()
    finally:
        with contextlib.suppress(TTTError):  # what happened before is what matters
            await scorer.forget(session)
    return losses


async def _mean(scorer: Scorer, ids: list[int], last: int, session: str | None = None) -> float:
    return fmean((await scorer.score(ids, session))[-last:])
