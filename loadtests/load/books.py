"""What a client knows of its session from its own requests and their answers: so the version must be that, and no other.

The rule is README's: a request of n tokens has n - 1 to learn, those behind what an earlier request of the session began with;
they are cut into chunks of ``learn.chunk``, a rest shorter than ``learn.min_chunk`` is left, and each chunk that is learned is
a version.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

#: Why a whole request may be answered and not learned: the session was frozen, or had had its share of the hour.
REFUSED = frozenset({"frozen", "limit"})
#: Skipped without being scored: that, what was learned before, a rest that is too short, and what repeats itself.
NOT_SCORED = REFUSED | {"history", "short", "repetition"}


@dataclass(frozen=True)
class Rule:
    """Of the server, from GET /v1/ttt/config."""

    chunk: int
    min_chunk: int

    def accepted(self, pairs: int) -> int:
        """How many of so many consecutive pairs are learned."""
        rest = pairs % self.chunk
        return pairs - rest if rest < self.min_chunk else pairs

    def chunks(self, pairs: int) -> int:
        """In how many chunks they are learned."""
        return -(-self.accepted(pairs) // self.chunk)


@dataclass
class Book:
    """One session as its only client sees it, one request at a time."""

    name: str
    rule: Rule
    learn: bool = True
    #: chunks that must have been committed, and those that may have been besides: of requests that the client gave up
    chunks: int = 0
    doubtful: int = 0
    #: pairs sent, and of them those of requests that the client gave up
    sent: int = 0
    given_up: int = 0
    #: each prompt, and how many of its first pairs were learned: history to one that goes on from it
    past: list[tuple[list[int], int]] = field(default_factory=list)
    #: pairs of requests that were answered and not learned, and pairs of others that were not accepted
    refused: int = 0
    unaccepted: int = 0
    #: pairs that earlier prompts began with, and that were learned of those
    history: int = 0
    requests: int = 0
    #: answers that began before all earlier requests of the session had been learned
    behind: int = 0
    #: what did not agree, in words
    problems: list[str] = field(default_factory=list)

    def answered(self, prompt: list[int], usage: int, ttt: Any) -> None:
        """Enter an answer.

        Args:
            prompt: token ids.
            usage: ``usage.prompt_tokens``.
            ttt: the answer's object.
        """
        if usage != len(prompt):
            self.problems.append(f"request {self.requests}: prompt_tokens {usage}, not {len(prompt)}")
        if not isinstance(ttt, dict) or ttt.get("session_id") != self.name:
            self.problems.append(f"request {self.requests}: the answer's ttt is {ttt!r}")
            return
        # Chunks that were skipped are known to the server alone, until `check`.
        self.behind += ttt["version"] < self.chunks
        if ttt["version"] > self.chunks + self.doubtful:
            self.problems.append(f"request {self.requests}: version {ttt['version']}, but only {self.chunks} chunks were sent")
        self.requests += 1
        pairs = len(prompt) - 1
        start = max((n for ids, n in self.past if len(ids) <= pairs and prompt[: len(ids)] == ids), default=0)
        expected, given = self.rule.accepted(pairs - start) if self.learn else 0, ttt["tokens_learned"]
        if given > expected:
            self.problems.append(f"request {self.requests}: tokens_learned {given}, not {expected}")
        if not self.learn:
            return
        self.sent += pairs
        if given == 0 and expected:
            self.refused += pairs
            return
        self.unaccepted += expected - given
        self.history += start
        self.chunks += -(-given // self.rule.chunk)
        self.past.append((prompt, start + expected))

    def left(self, prompt: int) -> None:
        """Enter a request that the client gave up: any number of its chunks may have been learned."""
        self.requests += 1
        self.doubtful += self.rule.chunks(prompt - 1)
        self.given_up += prompt - 1

    def settled(self, session: dict[str, Any], before: dict[str, Any] | None) -> bool:
        """Whether nothing of the session is under way; ``before``: what it was when it was looked at last.

        Of requests that were given up before they began, no token is ever accounted for: then it must have come to rest.
        """
        if session["requests_open"] or session["tokens_pending"]:
            return False
        if self.given_up:
            return before is not None and {**before, "tier": None} == {**session, "tier": None}
        return session["tokens_learned"] + sum(session["tokens_skipped"].values()) == session["tokens_seen"]

    def check(self, session: dict[str, Any]) -> list[str]:
        """What does not agree with GET /v1/ttt/sessions/{id} of the session, at rest; [] where all does."""
        found, skipped = list(self.problems), Counter(session["tokens_skipped"])
        say = lambda what: found.append(f"{self.name}: {what}")  # noqa: E731
        version, losses = session["version"], session["losses"]
        # Where a chat's template or tokenizer changes the end of a prompt, more of it is history than whole prompts tell.
        more = max(0, skipped["history"] - self.history)
        if self.refused > sum(skipped[reason] for reason in REFUSED) or self.unaccepted > skipped["repetition"] + more:
            say(f"{self.refused} and {self.unaccepted} tokens were not accepted; the session says why of {dict(skipped)} only")
        if not self.sent <= session["tokens_seen"] <= self.sent + self.given_up:
            say(f"tokens_seen {session['tokens_seen']}; sent {self.sent}, and {self.given_up} given up")
        settled = session["tokens_learned"] + sum(skipped.values())
        if not session["tokens_seen"] - self.given_up <= settled <= session["tokens_seen"]:
            say(f"of {session['tokens_seen']} tokens seen, {settled} were learned or skipped")
        if rolled_back(session):
            # What it had learned after that version is gone: all that can be said is that it was there.
            if version > self.chunks + self.doubtful:
                say(f"version {version} after the guard's rollback; at most {self.chunks + self.doubtful} chunks were sent")
            return found
        unlearned = sum(1 for chunk in losses if chunk["skipped"] not in (None, *NOT_SCORED))
        if unlearned == 0 and any(skipped[reason] for reason in skipped.keys() - NOT_SCORED):
            say(f"skipped {dict(skipped)}, but no chunk says so")
        if unlearned == 0 and self.behind:
            say(f"{self.behind} answers did not wait for what had been sent before")
        if not self.chunks <= version + unlearned <= self.chunks + self.doubtful:
            counted = f"{self.chunks}" + (f" to {self.chunks + self.doubtful}" if self.doubtful else "")
            say(f"version {version} and {unlearned} chunks skipped; the client counted {counted}")
        return found


def rolled_back(session: dict[str, Any]) -> bool:
    """Whether the guard has returned the session to an earlier version."""
    return "back at version" in (session.get("frozen_reason") or "")
