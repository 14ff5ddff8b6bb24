"""Keys and values of requests that are being learned, as they were served: what their chunks attend to (preset `deep`).

A bounded pool of pages, each as many rows as a chunk. A request holds pages for all that has been read of it, from its first
token on, until the last of its chunks has been learned. vLLM's own KV cache cannot serve: its blocks are freed, and used anew,
before a chunk has had its turn, and on the CPU backend they are packed for the kernel that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_ttt.worker.attention import Layout
from vllm_ttt.worker.backlog import Backlog, Chunk
from vllm_ttt.worker.capture import Capture
from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.qkv import Past
from vllm_ttt.worker.step_view import Rows


@dataclass(slots=True)
class Held:
    """One request: its pages, and how many tokens of it are there."""

    pages: list[int] = field(default_factory=list)
    tokens: int = 0


class PastPool:
    def __init__(self, pages: int, rows: int, capture: Capture, kv_heads: int):
        """``pages`` pages of ``rows`` rows, like the rows of the capture's buffers of keys and values."""
        self.rows, self.kv_heads = rows, kv_heads
        self.keys = [x.new_zeros(pages * rows, x.shape[1]) for x in capture.keys]
        self.values = [x.new_zeros(pages * rows, x.shape[1]) for x in capture.values]
        self.pages = pages
        self.free = list(range(pages - 1, -1, -1))
        self.held: dict[str, Held] = {}

    def take(self, view: list[Rows], backlog: Backlog, capture: Capture) -> None:
        """Keep the rows of requests that learn, each position once. The pages must be there: see `lacking`."""
        source, target = [], []
        for rows, skip in self._new(view, backlog):
            held = self.held.setdefault(rows.request, Held())
            count = len(rows.next_tokens) - skip
            positions = torch.arange(held.tokens, held.tokens + count)
            held.tokens += count
            while len(held.pages) * self.rows < held.tokens:
                held.pages.append(self.free.pop())
            source.append(torch.arange(rows.first + skip, rows.first + skip + count))
            target.append(self._where(held, positions))
        if not source:
            return
        device = self.keys[0].device
        source_N, target_N = to_device(torch.cat(source), device), to_device(torch.cat(target), device)
        for pool, buffer in zip((*self.keys, *self.values), (*capture.keys, *capture.values), strict=True):
            pool.index_copy_(0, target_N, buffer.index_select(0, source_N))

    def lacking(self, view: list[Rows], backlog: Backlog) -> list[str]:
        """Requests of the batch that the pool has no room for, given those before them; the last come first."""
        lacking, free = [], len(self.free)
        for rows, skip in self._new(view, backlog):
            held = self.held.get(rows.request, Held())
            total = held.tokens + len(rows.next_tokens) - skip
            free -= -(-total // self.rows) - len(held.pages)
            if free < 0:
                lacking.append(rows.request)
        return lacking[::-1]

    def sweep(self, backlog: Backlog) -> None:
        """Free the pages of requests of which nothing more will be learned."""
        if not self.held:
            return
        waiting = {chunk.request for queue in backlog.queues.values() for chunk in queue}
        reading = {name for name, r in backlog.readings.items() if not r.closed}
        for request in [name for name in self.held if name not in waiting and name not in reading]:
            self.free += self.held.pop(request).pages

    def where(self, chunk: Chunk) -> Tensor:
        """Rows of the pool for everything before the chunk."""
        if not chunk.first:
            return torch.zeros(0, dtype=torch.int64)
        held = self.held[chunk.request]
        assert held.tokens >= chunk.first, "tokens before the chunk have not been captured"
        return self._where(held, torch.arange(chunk.first))

    def _new(self, view: list[Rows], backlog: Backlog) -> list[tuple[Rows, int]]:
        """Rows of requests that learn, with how many of them are there already: a preempted request is computed again."""
        found = []
        for rows in view:
            reading = backlog.readings.get(rows.request)
            if reading is None or reading.closed or not reading.plan.learn:
                continue
            held = self.held.get(rows.request)
            skip = (held.tokens if held else 0) - rows.position
            assert skip >= 0, "tokens of a request that learns were not computed"
            if skip < len(rows.next_tokens):
                found.append((rows, skip))
        return found

    def _where(self, held: Held, positions: Tensor) -> Tensor:
        """Rows of the pool for positions of a request."""
        return torch.tensor(held.pages)[positions // self.rows] * self.rows + positions % self.rows


@dataclass
class Before:
    """What some chunks attend to besides themselves."""

    pool: PastPool
    chunks: Sequence[Chunk]

    @property
    def rows(self) -> int:
        return sum(chunk.first for chunk in self.chunks)

    def times(self, copies: int) -> Before:
        """Each chunk so many times."""
        return Before(self.pool, [chunk for chunk in self.chunks for _ in range(copies)])

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
                source.append(self.pool.where(chunk))
            positions.append(torch.arange(first, first + rows).clamp(max=last))
        source_P = torch.cat((*source, torch.zeros((room or self.rows) - self.rows, dtype=torch.int64)))
        pool = self.pool
        return Past(Layout.of(lengths, rows, room), torch.cat(positions), source_P, pool.keys, pool.values, pool.kv_heads)
