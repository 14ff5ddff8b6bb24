"""What vLLM's processes say to each other about sessions: plain, small, picklable. Imports no torch and no vLLM.

frontend -> engine   ``Request.session_id`` holds ``SessionKey.wire()``; ``SamplingParams.extra_args`` the knobs
engine -> worker     ``SchedulerOutput.ttt`` holds a ``StepPlan``
worker -> engine     ``ModelRunnerOutput.ttt`` holds a ``StepReport``
engine -> frontend   ``EngineCoreOutput.kv_transfer_params["ttt"]`` holds ``{"version": int, "tokens_learned": int}``
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vllm_ttt.errors import RequestError

#: ``.`` and ``..`` would be lost in a URL: no route could name such a session.
SESSION_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:\-]{1,128}\Z")
#: Where the in-memory adapters of sessions pretend to lie: ADAPTER_PATH + adapter id. Nothing is ever read there.
ADAPTER_PATH = "/ttt/"
#: Key of ``extra_args`` that says of a sample of a request with n > 1 how many there are (patches/samples.py).
SAMPLES = "vllm_ttt.samples"
#: Why an adapter that is not a session's is refused, wherever it comes in; not with the preset head.
NO_ADAPTERS = (
    "no LoRA adapter is served beside --plugin ttt with the presets deep and last: they use vLLM's multi-LoRA slots for "
    "sessions, and an adapter would share their ids. Serve it with --ttt-preset head, or merge it into the model"
)
#: Adapters that a key may wait for: of an engine until it has written them, of an API server until they have been sent.
ADAPTERS_AT_ONCE = 4
ENOUGH_ADAPTERS = f"a key may wait for {ADAPTERS_AT_ONCE} adapters at once; ask again when one of them has come"
SESSION_ID_RULE = "1 to 128 characters of A-Z a-z 0-9 . _ : -, and neither . nor .. alone"


class SessionKey(NamedTuple):
    """A session as the engine knows it: two tenants may both have a session of the same name."""

    #: derived from the API key by the front end; never holds the key itself
    tenant: str
    #: what the client calls it
    name: str

    def wire(self) -> str:
        return f"{self.tenant}/{self.name}"

    @classmethod
    def from_wire(cls, text: str) -> SessionKey:
        tenant, _, name = text.partition("/")
        return cls(tenant, check_session_id(name))


def check_session_id(name: Any, param: str = "session_id") -> str:
    """Return ``name``, or raise RequestError (400) that says what a session id may be."""
    if not isinstance(name, str) or not SESSION_ID.match(name):
        raise RequestError(f"{param} must be {SESSION_ID_RULE}; got {shown(name)}", param=param)
    return name


def shown(value: Any) -> str:
    """``value`` as an error may show it: no longer than 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + " ..."


@dataclass(frozen=True, slots=True)
class Knobs:
    """The ``ttt_*`` keys of a request's ``vllm_xargs``."""

    #: learn the prompt; False: use the delta and learn nothing at all
    learn: bool = True
    #: learn the generated tokens too
    learn_output: bool = False
    #: read the prompt chunk by chunk, and learn each before the next is scored
    interleave: bool = False
    #: what the session's own n-grams say is mixed in, and the prompt joins them where it is learned
    cache: bool = True

    @property
    def without_learning(self) -> Knobs:
        """The same request, which learns nothing."""
        return Knobs(learn=False, cache=self.cache)

    @classmethod
    def parse(cls, xargs: dict[str, Any] | None, learn_output: bool = False, interleave: bool = False) -> Knobs:
        """Read ``vllm_xargs``. Raises RequestError (400) for an unknown ``ttt_*`` key or a value other than 0 or 1.

        Args:
            xargs: as the client sent them, or as the engine has them; keys without the prefix ``ttt_`` are none of these.
            learn_output, interleave: what those knobs are where the request does not say.
        """
        values = {"ttt_learn": True, "ttt_learn_output": learn_output, "ttt_interleave": interleave, "ttt_cache": True}
        for key, value in (xargs or {}).items():
            if not key.startswith("ttt_"):
                continue
            if key not in values:
                raise RequestError(f"unknown key {shown(key)} in vllm_xargs; allowed: {', '.join(values)}", param=key[:80])
            if isinstance(value, str | list | dict) or value not in (0, 1):
                raise RequestError(f"{key} must be 0 or 1; got {shown(value)}", param=key)
            values[key] = bool(value)
        learn = values["ttt_learn"]
        return cls(learn, learn and values["ttt_learn_output"], learn and values["ttt_interleave"], values["ttt_cache"])


@dataclass(slots=True)
class RequestPlan:
    """Sent to the worker once, with the first step that schedules a session's request."""

    #: the session's adapter id, which is how the worker knows the session
    session: int
    #: tokens in the prompt; pair i (the state at position i, the token at i + 1) is the prompt's where i < prompt - 1
    prompt: int
    learn: bool
    learn_output: bool
    #: the first pair to learn; those before are history
    start: int = 0
    #: the slot follows the master while the prompt is being read
    interleave: bool = False
    #: it reads a part of the guard's text, which has so many tokens to predict: they are kept, and nothing is learned; 0: not
    probe: int = 0
    #: the session's own n-grams are mixed in, and what is learned joins them
    cache: bool = False
    #: ranges (first, end) of pairs whose tokens repeat themselves: a chunk most of which is in one is not learned
    repetitive: list[tuple[int, int]] = field(default_factory=list)
    #: ranges (first, end) of pairs whose next token is not to be learned: their loss weighs nothing
    filtered: list[tuple[int, int]] = field(default_factory=list)


FileAction = Literal["save", "load", "export", "digest", "check", "drop"]


@dataclass(slots=True)
class FileOrder:
    """Engine to worker: move a session between the worker's memory and a file, say its digest, or check a file.

    Each but "drop" gets one final FileReport.
    """

    action: FileAction
    #: the session's adapter id
    session: int
    #: absolute; made by the engine, never by a client
    path: str = ""
    #: load, check: the sha256 that the file must have, hexadecimal
    checksum: str = ""
    #: load: path and sha256 of the last version that the guard found good, where that is another one
    good: tuple[str, str] | None = None
    #: save: further entries of the file's metadata
    metadata: dict[str, str] = field(default_factory=dict)
    #: save: an earlier version that the worker keeps; None: what the session is
    version: int | None = None
    #: export: what the file is sealed with, drawn for it alone, hexadecimal; "": it is not
    key: str = ""


@dataclass(slots=True)
class FileReport:
    """Worker to engine: how far an order has come."""

    action: FileAction
    session: int
    path: str
    #: "taken": a save has its snapshot, and the file is being written; the others are final. "damaged": the file is not what
    #: was saved; "failed": it could not be read or written; "gone": the version to be saved is not kept any more
    outcome: Literal["taken", "done", "failed", "damaged", "gone"]
    #: of the delta in the file
    version: int = 0
    #: taken: how many of the chunks in the same report the snapshot holds; the others came later
    chunks: int = 0
    #: save, done: the last version, up to that one, that the guard found good; 0: none
    good: int = 0
    bytes: int = 0
    #: sha256 of the file, hexadecimal
    checksum: str = ""
    #: save, export, digest: of the delta, whatever its file (worker/deltas/delta_file.py)
    digest: str = ""
    error: str = ""
    #: failed: the number of the system's error, where it was one
    errno: int = 0
    #: load: the metadata of the file
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class StepPlan:
    """Engine to worker, with a step."""

    #: request id -> plan, for requests that this step schedules for the first time
    started: dict[str, RequestPlan] = field(default_factory=dict)
    #: request id -> pairs that it has in all, for learning requests that have left the engine
    ended: dict[str, int] = field(default_factory=dict)
    #: whether the batch has rows of a session
    sessions: bool = False
    #: requests that have left the engine, and are to be learned before the batch runs: others need their blocks
    urgent: list[str] = field(default_factory=list)
    #: requests that have left the engine, and whose blocks others have now: what waits of them is given up
    lost: list[str] = field(default_factory=list)
    #: sessions of which the engine core has read that the guard has stopped them: from this step on it plans accordingly
    stopped: list[int] = field(default_factory=list)
    #: sessions whose slots do not change before this step's batch: samples of one request answer from one version
    still: list[int] = field(default_factory=list)
    #: sessions that a request waits for, which waits until what was sent earlier is learned; the longest-waiting first
    awaited: list[int] = field(default_factory=list)
    #: sessions to be written, read or forgotten, in this order
    files: list[FileOrder] = field(default_factory=list)


#: Why a chunk was not learned.
ChunkReason = Literal["loss", "nonfinite", "short", "repetition", "filter", "rollback", "frozen", "full", "unread", "error"]
#: Why nothing of a prompt, or not its beginning, was to be learned at all.
PromptReason = Literal["history", "limit"]
Reason = ChunkReason | PromptReason


@dataclass(slots=True)
class ChunkReport:
    """One chunk that was learned, or not."""

    session: int
    request: str
    tokens: int
    #: mean loss in nats per token under the delta before the update
    loss: float
    #: the same under the base model, where it was measured; what came before the chunk is as it was served
    base_loss: float | None
    #: None: learned. Otherwise why not
    skipped: ChunkReason | None
    #: the pair of the request that comes after its last one
    end: int
    #: the session's version after the chunk
    version: int
    #: the session's rate after the chunk
    rate: float = 0.0
    #: learned: the largest norm of the delta, by module, relative to its weight's
    norm: float | None = None
    #: learned beside the session's cache: the loss with that mixed in, and the share of the tokens that it explains
    cache_loss: float | None = None
    cache_share: float | None = None


@dataclass(slots=True)
class Trial:
    """What a session's delta does to the guard's text."""

    session: int
    version: int
    #: nats per token by which the text is worse than under the base model
    regression: float
    #: the version to which the session has been rolled back, to learn no more; None: it is good
    back_to: int | None


@dataclass(slots=True)
class StepReport:
    """Worker to engine, with a step's output."""

    chunks: list[ChunkReport] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    #: request id -> version of the delta that serves its first token
    began: dict[str, int] = field(default_factory=dict)
    #: (request id, session) of requests of which everything that is to be learned has been, and is being served
    settled: list[tuple[str, int]] = field(default_factory=list)
    #: requests that have left the engine, and whose blocks nobody reads any more
    released: list[str] = field(default_factory=list)
    #: sessions that are not served yet with the delta that they have: a prompt is still being read under the one before
    behind: frozenset[int] = frozenset()
    #: what has become of file orders, in the order in which it happened
    files: list[FileReport] = field(default_factory=list)
    #: captured tokens that wait for their step, and the pages of those that are complete
    pending: int = 0
    queued: int = 0
    #: whether the worker has work that needs another step, even where no request does
    busy: bool = False
