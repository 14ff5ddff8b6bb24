"""A request of a session while it is in the engine; and n samples of one prompt, which arrive as one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from vllm_ttt.config import LearnConfig
from vllm_ttt.engine.history import BLOCK
from vllm_ttt.engine.ledger import Session
from vllm_ttt.types import ADAPTER_PATH, Knobs

#: Child of a request with n > 1: index and parent (vllm/v1/engine/parallel_sampling.py).
_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)


@dataclass(slots=True)
class Attached:
    """A request of a session, while it is in the engine."""

    request: Request
    session: Session
    knobs: Knobs
    #: whether its prompt is learned, by itself or, with n > 1, by the first of its siblings
    prompt_learned: bool
    #: order of arrival; the children of a request with n > 1 share it
    arrival: int
    prompt: int
    started: bool = False
    #: the first pair to learn, known from the start on; those before are history
    start: int = 0
    #: `History.changes` when it was asked for that
    asked: int = -1
    #: ranges of its pairs that repeat themselves
    repetitive: list[tuple[int, int]] = field(default_factory=list)
    #: tokens that have been generated
    outputs: int = 0
    #: the version that serves its first token
    version: int = 0
    #: since when it has been held, time.monotonic(); None: it never was
    held: float | None = None

    def take_adapter(self) -> None:
        """Give the request its session's adapter: another one, where the session was changed while the request waited."""
        lora, adapter = self.request.lora_request, self.session.adapter
        if lora is None or lora.lora_int_id != adapter:
            self.request.lora_request = LoRARequest(f"ttt:{adapter}", adapter, f"{ADAPTER_PATH}{adapter}")

    def accepted(self, learn: LearnConfig) -> int:
        """Tokens of the request that have been accepted for learning so far; their steps may be pending."""
        tokens = 0
        if self.prompt_learned:
            tokens = accept(self.prompt - 1 - self.start, learn) - sum(end - first for first, end in self.repetitive)
        return tokens + (accept(self.outputs, learn) if self.knobs.learn_output else 0)

    def readable(self, chunk: int) -> int | None:
        """Tokens of its interleaved prompt that may be read: to the end of the first chunk that is not learned. None: all."""
        opened = self.session.open.get(self.request.request_id)
        if opened is None:
            return None
        end = self.start + (max(opened.done - self.start, 0) // chunk + 1) * chunk
        return end if end < self.prompt - 1 else None

    def remember_answer(self) -> None:
        """What was generated is learned, and history when the client sends it back within the next prompt."""
        opened = self.session.open.get(self.request.request_id)
        if opened is None:
            return
        end = self.prompt + self.outputs
        tokens = list(self.request.all_token_ids)[:end]
        lengths = [*range(self.prompt + BLOCK, end, BLOCK), end]
        opened.prefixes += self.session.history.add(tokens, lengths, end - 1)


class Arrivals:
    """Numbers requests in the order in which they arrive."""

    def __init__(self) -> None:
        self.number = 0
        #: parent of n samples -> its number
        self.parents: dict[str, int] = {}

    def arrive(self, request_id: str, knobs: Knobs) -> tuple[int, Knobs]:
        """The request's number, and its knobs: of n samples the first alone learns."""
        self.number += 1
        child = _CHILD.fullmatch(request_id)
        if child is None:
            return self.number, knobs
        index, parent = child.groups()
        if index == "0":
            self.parents[parent] = self.number
            return self.number, knobs
        return self.parents.get(parent, self.number), Knobs(learn=False)

    def leave(self, request_id: str) -> None:
        if (child := _CHILD.fullmatch(request_id)) is not None and child.group(1) == "0":
            self.parents.pop(child.group(2), None)


def first_of(request_id: str) -> str | None:
    """For all but the first of n samples of one prompt: the id of the first."""
    child = _CHILD.fullmatch(request_id)
    return None if child is None or child.group(1) == "0" else f"0_{child.group(2)}"


def accept(pairs: int, learn: LearnConfig) -> int:
    """How many of so many consecutive pairs are learned: all but a rest that is too short."""
    rest = pairs % learn.chunk
    return pairs - rest if rest < learn.min_chunk else pairs
