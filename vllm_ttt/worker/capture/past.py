"""What the chunks of a step attend to besides themselves: the tokens of their requests that come before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_ttt.worker.capture.chunk import Chunk
from vllm_ttt.worker.capture.kv_cache import KVCache
from vllm_ttt.worker.step.attention import Layout
from vllm_ttt.worker.step.qkv import Past


@dataclass
class PastSource:
    """Some chunks of a step, and the cache that has what they attend to: from these comes the step's `Past`."""

    cache: KVCache
    chunks: Sequence[Chunk]

    @property
    def rows(self) -> int:
        return sum(chunk.first for chunk in self.chunks)

    def past(self, sessions: int, rows: int, room: int | None = None) -> Past:
        """For a step of so many sessions, the chunks' first and others without a past, and ``rows`` rows of each.

        Its tensors are on the host.

        Args:
            room: rows that the past is filled up to.
        """
        lengths, source, positions = [0] * sessions, [], []
        for s in range(sessions):
            first, last = 0, rows - 1
            if s < len(self.chunks):
                chunk = self.chunks[s]
                lengths[s] = first = chunk.first
                last = max(chunk.end - 1, first)  # the rotary embedding has no more positions for what fills up a chunk
                source.append(self.cache.slots(chunk.blocks, first))
            positions.append(torch.arange(first, first + rows).clamp(max=last))
        source_P = torch.cat((*source, torch.zeros((room or self.rows) - self.rows, dtype=torch.int64)))
        return Past(Layout.of(lengths, rows, room), torch.cat(positions), source_P, self.cache)
