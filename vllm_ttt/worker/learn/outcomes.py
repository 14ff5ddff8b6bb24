"""A step while it is under way: what it learns, and what it has done, on its way to the host."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vllm_ttt.worker.capture.chunk import Chunk
from vllm_ttt.worker.clock import Clock, arrived
from vllm_ttt.worker.deltas.versions import Kept
from vllm_ttt.worker.ngrams.caches import Text


@dataclass(slots=True)
class Tile:
    """A chunk that is to be learned, and the row of its session's master."""

    chunk: Chunk
    row: int


@dataclass(slots=True)
class Outcome:
    """What a step did, on its way to the host."""

    chunks: list[Chunk]
    #: what `Compute.step` returns
    values: Tensor
    #: [chunks], losses under the base model; NaN where they were not measured
    base_loss: Tensor
    mark: Any = None
    #: the sessions as they are after it, where that is to be kept
    kept: list[Kept | None] = field(init=False)
    #: of each chunk that joins its session's cache
    texts: list[Text | None] = field(init=False)

    def __post_init__(self) -> None:
        self.kept, self.texts = [None] * len(self.chunks), [None] * len(self.chunks)


def known_of(outcomes: deque[Outcome], clock: Clock, wait: bool) -> list[tuple[list[list[float]], list[float]]]:
    """Of each step whose outcome has arrived, its values chunk by chunk, and base losses. ``wait``: as `Trainer.collect`."""
    return arrived(
        outcomes, lambda x: x.mark, lambda x: (x.values.T.tolist(), x.base_loss.tolist()), clock, len(outcomes) if wait else 0
    )
