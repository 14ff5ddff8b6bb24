"""A request of a session while it is in the engine; and n samples of one prompt, which arrive as one."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vllm.lora.request import LoRARequest
from vllm.v1.request import Request, RequestStatus

from vllm_ttt.config import LearnConfig
from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.limits.stops import AnswerText
from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTER_PATH, SAMPLES, ChunkReport, Knobs

if TYPE_CHECKING:
    from vllm_ttt.engine.limits.trust import Trust

#: Of so many requests with n > 1 whose first sample has left, or was refused, that is remembered for those still to come.
_REMEMBERED = 64


@dataclass(slots=True)
class Attached:
    """A request of a session, while it is in the engine."""

    request: Request
    session: Session
    knobs: Knobs
    #: whether its prompt is learned, by itself
    prompt_learned: bool
    #: order of arrival; the children of a request with n > 1 share it
    arrival: int
    prompt: int
    #: for all but the first of n samples of one prompt: the first, which alone learns, and says what all of them say
    first: Attached | None = None
    started: bool = False
    #: the first pair to learn, known from the start on; those before are history
    start: int = 0
    #: `History.changes` when it was asked for that
    asked: int = -1
    #: of its prompt, in the session's history
    prefixes: list[bytes] = field(default_factory=list)
    #: ranges of its pairs that repeat themselves
    repetitive: list[tuple[int, int]] = field(default_factory=list)
    #: ranges of its pairs whose next token a pattern of the operator's matches, or stands for an image
    filtered: list[tuple[int, int]] = field(default_factory=list)
    #: pairs that are in one of those ranges
    left_out: int = 0
    #: tokens that have been generated
    outputs: int = 0
    #: (version, tokens) of its chunks that have been learned
    learned: list[tuple[int, int]] = field(default_factory=list)
    #: the guard has stopped its session: the tokens of it that the session still has; None: it has not
    kept: int | None = None
    #: its answer's text, where a stop string is looked for
    text: AnswerText | None = None
    #: a stop string has come: tokens before it
    stopped: int | None = None
    #: the version that serves its first token
    version: int = 0
    #: since when it has been held, time.monotonic(); None: it never was
    held: float | None = None
    #: it is served from vLLM's LoRA slots
    in_slots: bool = True

    def take_adapter(self) -> None:
        """Give the request its session's adapter: another one, where the session was changed while the request waited."""
        if not self.in_slots:
            return
        lora, adapter = self.request.lora_request, self.session.adapter
        if lora is None or lora.lora_int_id != adapter:
            self.request.lora_request = LoRARequest(f"ttt:{adapter}", adapter, f"{ADAPTER_PATH}{adapter}")

    def note(self, chunk: ChunkReport) -> None:
        """What became of one of its chunks."""
        if chunk.skipped is None:
            self.learned.append((chunk.version, chunk.tokens))
        if self.knobs.interleave and not self.outputs:
            self.version = chunk.version

    def stop(self, version: int) -> None:
        """The guard has returned its session to ``version``: nothing more of this request, which has started, is learned."""
        self.knobs, self.kept = self.knobs.without_learning, sum(tokens for at, tokens in self.learned if at <= version)

    def look_at(self, trust: Trust, tokens: Sequence[int], start: int) -> None:
        """Before it is learned: what of its prompt, from pair ``start`` on, is not."""
        self.repetitive = trust.repetitive(distinct(self.request, tokens), start)
        self.filtered = _union((*trust.filter.pairs(tokens), *placeholders(self.request)))
        ranges = ((max(first, start), end) for first, end in (*self.repetitive, *self.filtered))
        self.left_out = len({pair for ends in ranges for pair in range(*ends)})

    def look_back(self) -> None:
        """Before it starts: what of its prompt is history. Asked in each step in which there is no room for it."""
        history, tokens = self.session.history, self.request.prompt_token_ids or ()
        if self.request.request_id in self.session.open and self.asked != history.changes:
            self.start, self.asked = history.known(distinct(self.request, tokens)), history.changes

    def accepted(self, learn: LearnConfig) -> int:
        """Tokens of the request that have been accepted for learning so far; their steps may be pending."""
        if self.first is not None:
            return self.first.accepted(learn)
        if self.kept is not None:
            return self.kept
        tokens = 0
        if self.prompt_learned:
            tokens = accept(self.prompt - 1 - self.start, learn) - self.left_out
        return tokens + (accept(self.shown, learn) if self.knobs.learn_output else 0)

    @property
    def shown(self) -> int:
        """Tokens that have been generated, up to a stop string."""
        return self.outputs if self.stopped is None else self.stopped

    def readable(self, tokens: int, computed: int, chunk: int, whole: bool) -> int:
        """How many of the next ``tokens`` of its interleaved prompt may be read: to the end of the first chunk that is not
        learned.

        Args:
            computed: how many come before them. whole: an image is read in one piece, since the model attends within it both
                ways: the prompt is read up to it, or to its end where it comes next.
        """
        opened = self.session.open.get(self.request.request_id)
        if opened is None:
            return tokens
        end = self.start + (max(opened.done - self.start, 0) // chunk + 1) * chunk
        for feature in self.request.mm_features if whole else ():
            first, length = feature.mm_position.offset, feature.mm_position.length
            if first < end < first + length:
                end = first if computed < first else first + length
        return tokens if end >= self.prompt - 1 else max(0, min(tokens, end - computed))

    def remember_answer(self) -> None:
        """What was generated is learned, and history when the client sends it back within the next prompt."""
        opened = self.session.open.get(self.request.request_id)
        if opened is None:
            return
        tokens = distinct(self.request, list(self.request.all_token_ids)[: self.prompt + self.shown])
        opened.prefixes += self.session.history.add_answer(tokens, self.prompt)


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (first, end) in order, none of which meets another."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            first, end = found[-1][0], max(end, found.pop()[1])
        found.append((first, end))
    return found


def placeholders(request: Request) -> list[tuple[int, int]]:
    """Ranges (first, end) of a prompt's pairs whose next token stands for a part of an image, or of what else is no text."""
    places = [feature.mm_position for feature in request.mm_features]
    return [(max(place.offset - 1, 0), place.offset + place.length - 1) for place in places if place.offset + place.length > 1]


def distinct(request: Request, tokens: Sequence[int]) -> Sequence[int]:
    """``tokens`` of a request, with numbers drawn from its images in place of what stands for them, which any image has."""
    if not request.mm_features:
        return tokens
    told = list(tokens)
    for feature in request.mm_features:
        first, length = feature.mm_position.offset, feature.mm_position.length
        drawn = hashlib.shake_128((feature.mm_hash or feature.identifier).encode()).digest(4 * length)
        told[first : first + length] = array("I", drawn)
    return told


class Sample(NamedTuple):
    """Which sample of which request with n > 1 a request is."""

    number: int
    parent: str
    n: int


@dataclass(slots=True)
class Samples:
    """n samples of one prompt, which answer from one version: none is served with another until all have begun."""

    first: Attached
    #: those that have neither begun nor left
    waiting: set[int]
    #: how many have not arrived
    missing: int
    begun: bool = False


class Arrivals:
    """Numbers requests in the order in which they arrive, and keeps samples of one request together."""

    def __init__(self, in_slots: bool = True) -> None:
        """``in_slots``: whether sessions are served from vLLM's LoRA slots."""
        self.number, self.in_slots = 0, in_slots
        #: by parent
        self.samples: dict[str, Samples] = {}
        #: those of ``samples`` whose first has left; with short answers, before the second arrives
        self.left: deque[str] = deque()
        #: those of which some have begun and others have not
        self.beginning: dict[str, Samples] = {}
        #: by parent, why the first was refused: so are those that are still to come
        self.refused: dict[str, RequestError] = {}

    def arriving(self, request: Request) -> int:
        """How many requests come with this one: with the first of n samples all, and with the others none. Raises RequestError
        where the first was refused."""
        if (sample := sample_of(request)) is None:
            return 1
        if sample.parent in self.refused:
            raise self.refused[sample.parent]
        return 0 if sample.number else sample.n

    def attach(self, request: Request, session: Session, knobs: Knobs) -> Attached:
        """The request with its number; of n samples the first alone learns."""
        self.number += 1
        attached = Attached(
            request, session, knobs, knobs.learn, self.number, request.num_prompt_tokens, in_slots=self.in_slots
        )
        if (sample := sample_of(request)) is None:
            return attached
        if sample.number == 0:
            self.samples[sample.parent] = Samples(attached, set(range(sample.n)), sample.n - 1)
            return attached
        attached.knobs, attached.prompt_learned = knobs.without_learning, False
        if (together := self.samples.get(sample.parent)) is not None:
            attached.first, attached.arrival = together.first, together.first.arrival
            together.missing -= 1
        return attached

    def begin(self, attached: Attached) -> None:
        """The request is scheduled for the first time."""
        if (sample := sample_of(attached.request)) is not None and (together := self.samples.get(sample.parent)) is not None:
            together.begun = True
            self._begins_no_more(sample, together)

    def leave(self, request: Request, refused: RequestError | None = None) -> None:
        """The request has left the engine, or was ``refused``."""
        if (sample := sample_of(request)) is None:
            return
        if refused is not None and sample.number == 0:
            self.refused[sample.parent] = refused
            if len(self.refused) > _REMEMBERED:
                del self.refused[next(iter(self.refused))]
        if (together := self.samples.get(sample.parent)) is None:
            return
        if together.missing and request.status == RequestStatus.FINISHED_ABORTED:
            together.waiting.clear()  # its client has left: the others need not come
        self._begins_no_more(sample, together)
        if sample.number == 0:
            self.left.append(sample.parent)
            if len(self.left) > _REMEMBERED:
                forgotten = self.left.popleft()
                self.samples.pop(forgotten, None)
                self.beginning.pop(forgotten, None)

    def _begins_no_more(self, sample: Sample, together: Samples) -> None:
        together.waiting.discard(sample.number)
        if together.begun and together.waiting:
            self.beginning[sample.parent] = together
        else:
            self.beginning.pop(sample.parent, None)

    def still(self) -> list[int]:
        """Sessions that are to be served as they are, until all samples of a request have begun."""
        return [together.first.session.adapter for together in self.beginning.values()]


def sample_of(request: Request) -> Sample | None:
    """None: the request is one of its own.

    vLLM calls sample i of a request ``i_REQUEST`` (v1/engine/parallel_sampling.py), and a request by what its client calls it
    and a suffix. A client may use any name, also one of that form: the client's name alone tells the two apart.
    """
    named = getattr(request, "ttt_named", None)  # patches/engine.py
    index, _, parent = request.request_id.partition("_")
    if named is None or not index.isdecimal() or not parent.startswith(named):
        return None
    params = request.sampling_params
    n = ((params.extra_args if params is not None else None) or {}).get(SAMPLES)
    return None if n is None else Sample(int(index), parent, n)


def accept(pairs: int, learn: LearnConfig) -> int:
    """How many of so many consecutive pairs are learned: all but a rest that is too short."""
    rest = pairs % learn.chunk
    return pairs - rest if rest < learn.min_chunk else pairs
