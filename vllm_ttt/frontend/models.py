"""What the routes under /v1/ttt answer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


#: For readers of the schema: `check_session_id` checks, and says what is allowed.
SESSION_ID_SCHEMA: dict[str, Any] = {"pattern": r"^(?!\.{1,2}$)[A-Za-z0-9._:-]{1,128}$"}
#: JSON has no NaN: what was not finite is null.
Loss = Annotated[float | None, BeforeValidator(_finite)]


class _Model(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class _Request(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", strict=True)


class ChunkLoss(_Model):
    """One chunk of what the session sent."""

    version: int
    """The session's version after the chunk. The chunk was scored under the version before."""
    tokens: int
    """Tokens in the chunk."""
    loss: Loss
    """Mean loss before the chunk was learned, nats per token; null: it was not finite."""
    frozen_loss: Loss = None
    """Mean loss of the same chunk under the base model. Every fourth chunk has it; null in the others."""
    cache_loss: Loss = None
    """Mean loss with the session's cache mixed in; null: the chunk was learned without a cache."""
    cache_share: Loss = None
    """Share of the tokens that the cache explains. The model with its delta explains the others."""
    rate: Loss = None
    """The session's rate after the chunk."""
    skipped: str | None = None
    """Why it was not learned: `loss`, `nonfinite`, `short`, `repetition`, `filter`, `rollback`, `frozen`, `full`, `unread` or
    `error`; null: it was."""


class SessionSummary(_Model):
    """A session without its history."""

    session_id: str
    """As the client calls it."""
    version: int
    """Number of updates that the delta has had; 0: the base model."""
    tokens_seen: int
    """Tokens of the session's prompts and answers."""
    tokens_learned: int
    """Tokens of the chunks that were learned."""
    tokens_skipped: dict[str, int]
    """Tokens that were not learned, by reason."""
    tokens_pending: int
    """Tokens that wait to be learned."""
    cache_tokens: int | None = None
    """Tokens that its cache remembers; null: the session is not in memory."""
    cache_share: Loss = None
    """Share of all learned tokens that the cache explains; null: the session has no cache."""
    cache_gain: Loss = None
    """Nats per token that the cache gains over the model with its delta alone."""
    requests_open: int
    """Requests of the session that are waiting or running."""
    created: float
    """When the session was first named, seconds since 1970."""
    last_used: float
    """When the session was last named, seconds since 1970."""
    norm: dict[str, Loss]
    """Frobenius norm of the delta relative to that of the weight, by module."""
    tier: Literal["slot", "memory", "disk", "new"]
    """Where the delta is: in one of vLLM's LoRA slots, in memory without one, or on disk alone; new: there is none yet."""
    rate: Loss = None
    """Length of its next step, relative to the norm of the weight; null: the session is not in memory."""
    bytes: int
    """Memory that the session takes, or the size of its newest file where it is on disk alone."""
    frozen: bool = False
    """Whether the session is frozen: it answers with its delta, and learns nothing until it is unfrozen."""
    frozen_reason: str | None = None
    """Why it is frozen: `asked for`, or what the guard found; null: it is not."""
    probe_regression: Loss = None
    """Nats per token by which its delta made the guard's probe worse at the last trial; null: not tried yet."""
    saved_version: int | None = None
    """The newest version in the state dir; null: there is none."""
    saved: float | None = None
    """When that version was saved, seconds since 1970."""
    error: str | None = None
    """What went wrong when the session was last saved or read; null: nothing."""
    tenant: str | None = None
    """Whose session it is, as the state dir names the API key. Only the admin key's list of all sessions has it."""


class SessionDetail(SessionSummary):
    """A session."""

    losses: list[ChunkLoss]
    """The most recent chunks, oldest first."""
    versions: list[int] = []
    """Versions to which the session can be rolled back; 0 is the base model."""


class Rollback(_Request):
    """Where to roll back to."""

    version: Annotated[int, Field(ge=0, lt=2**31)]
    """One of the session's `versions`; 0 is the base model."""


class Fork(_Request):
    """The session to be made."""

    to: Annotated[str, Field(json_schema_extra=SESSION_ID_SCHEMA)]
    """Its id, which no session of this API key has."""


class Sessions(_Model):
    """The sessions of the API key that asks."""

    sessions: list[SessionSummary]
    """Most recently used first."""
    next: str | None = None
    """What to send as `after` for the next page; null: this is the last."""


class RemovedFile(_Model):
    """The file of a version that was removed with its session."""

    version: int
    """Which version of the session."""
    bytes: int
    """Its size."""
    sha256: str
    """Of the file."""
    digest: str | None = None
    """Of the delta in it; null: it was saved by an earlier release."""


class Deleted(_Model):
    """The receipt of a session that is no more."""

    session_id: str
    """As the client called it."""
    deleted: Literal[True] = True
    """Always true; an unknown session is a 404."""
    version: int
    """Updates that it had when it was removed."""
    tokens_learned: int
    """Tokens that it had learned."""
    digest: str | None = None
    """SHA-256 of its delta when it was removed; null: it had learned nothing."""
    bytes: int
    """Of all its files."""
    files: list[RemovedFile]
    """Its versions in the state dir, oldest first."""
    files_left: list[str] = []
    """Files that could not be removed; the next start of the server removes them."""
    database_wiped: bool
    """Whether no byte of its rows is left in the database. false: a full disk or a reader of it was in the way."""
    time: float
    """When it was done, seconds since 1970."""


class ErrorInfo(_Model):
    """What is wrong, in OpenAI's shape."""

    message: str
    """What is wrong and what is allowed."""
    type: str
    """The kind of error."""
    param: str | None = None
    """The field that is wrong."""
    code: int
    """The HTTP status."""


class ErrorResponse(_Model):
    """The body of an answer that is not 2xx."""

    error: ErrorInfo
    """The error."""
