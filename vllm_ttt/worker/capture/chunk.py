"""A chunk of captured tokens, and how far the reading of its request is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.memory import SMALLEST_SHARE


@dataclass(slots=True, eq=False)
class Chunk:
    """Up to ``chunk`` consecutive pairs of one request, in one page."""

    session: int
    request: str
    page: int
    #: its first pair
    first: int
    rows: int = 0
    #: the blocks of its request in vLLM's KV cache: the same list, which grows
    blocks: list[int] = field(default_factory=list)
    #: ranges (first, end) of its rows whose next token is not learned
    left_out: list[tuple[int, int]] = field(default_factory=list)
    #: the tokens up to its first row's, LONGEST at most, BREAK for those that are not learned; None: it joins no cache
    before: Tensor | None = None

    @property
    def end(self) -> int:
        return self.first + self.rows

    @property
    def cost(self) -> int:
        """Of its step, in tokens."""
        return max(self.rows, SMALLEST_SHARE)

    @property
    def out(self) -> int:
        """Rows whose next token is not learned."""
        return sum(end - first for first, end in self.left_out)


@dataclass(slots=True, eq=False)
class Reading:
    """What has been captured of a running request."""

    plan: RequestPlan
    #: the first pair that has not been captured; history and recomputed ones before it are not captured
    next: int
    #: its blocks in vLLM's KV cache, as vLLM numbers them
    blocks: list[int] = field(default_factory=list)
    open: Chunk | None = None
    #: something of it, be it history, has been read since it was begun, or begun anew
    begun: bool = False
    #: pairs before this one have been learned, or said not to be
    known: int = 0
    #: pairs before this one had been captured when it was preempted
    seen: int = 0
    #: the whole prompt has gone through the model
    prompt_read: bool = False
    #: chunks that wait for their step, the open one apart
    unlearned: int = 0
    #: nothing more will be captured
    closed: bool = False
    #: it has been said that nobody reads its blocks any more
    released: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether more will be captured, or the prompt is still being read: under one delta, also where nothing more of it is
        learned."""
        return not self.closed or not self.prompt_read


def weights_of(chunks: list[Chunk], longest: int) -> Tensor:
    """[S, longest]: what each row weighs in the mean loss of its chunk; nothing what is left out, nor what fills up a chunk
    that is shorter than the longest."""
    weight = torch.zeros(len(chunks), longest)
    for s, chunk in enumerate(chunks):
        weight[s, : chunk.rows] = 1.0 / (chunk.rows - chunk.out)
        for first, end in chunk.left_out:
            weight[s, first:end] = 0.0
    return weight
