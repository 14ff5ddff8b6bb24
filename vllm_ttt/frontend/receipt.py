"""What the answer to one HTTP request will say about its session, collected while vLLM generates."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_ttt.errors import RequestError


@dataclass(slots=True)
class Call:
    """One ``AsyncLLM.generate`` of the request; a list of prompts makes several."""

    version: int | None = None
    tokens_learned: int = 0
    finished: bool = False
    #: why the engine would not have it
    refused: RequestError | None = None

    def note(self, ttt: dict[str, Any]) -> None:
        """Take over what the engine says with an output: ``{"version": int, "tokens_learned": int}``."""
        self.version = ttt["version"]
        self.tokens_learned = ttt["tokens_learned"]


@dataclass(slots=True)
class Receipt:
    #: the session as the client calls it; None: the request has no session (yet)
    session: str | None = None
    calls: list[Call] = field(default_factory=list)

    def open(self) -> Call:
        self.calls.append(Call())
        return self.calls[-1]

    @property
    def finished(self) -> bool:
        """Whether everything that was asked of the engine so far has been generated."""
        return bool(self.calls) and all(call.finished for call in self.calls)

    @property
    def begun(self) -> bool:
        """Whether the engine has begun to answer."""
        return any(call.version is not None for call in self.calls)

    @property
    def refused(self) -> RequestError | None:
        """What the engine refused, where it has not begun to answer."""
        return None if self.begun else next((call.refused for call in self.calls if call.refused), None)

    @property
    def retry_after(self) -> int | None:
        """Seconds after which what was refused may be asked again, where it is known."""
        return next((c.refused.retry_after for c in self.calls if c.refused and c.refused.retry_after is not None), None)

    def answer(self) -> dict[str, Any] | None:
        """The ``ttt`` object, or None where there is no session or the engine has said nothing about it."""
        known = [call.version for call in self.calls if call.version is not None]
        if self.session is None or not known:
            return None
        learned = sum(call.tokens_learned for call in self.calls)
        return {"session_id": self.session, "version": min(known), "tokens_learned": learned}


#: Set by AnswerMiddleware for the time of one HTTP request. Tasks that vLLM starts meanwhile inherit it.
current: ContextVar[Receipt | None] = ContextVar("vllm_ttt_receipt", default=None)
