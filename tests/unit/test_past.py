"""What comes before a chunk is read from vLLM's own cache; a preempted request is captured again, and learned once."""

from __future__ import annotations

import math

import pytest
import torch
from caches import BLOCK, bound, cpu_attention, write
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.chunk import Chunk
from vllm_ttt.worker.capture.past import PastSource
from vllm_ttt.worker.capture.step_view import Rows

pytestmark = pytest.mark.unit

CHUNK, LAYERS, HEADS, WIDTH, BATCH = 8, 2, 2, 32, 160


class Device:
    """A backlog, and vLLM's cache of keys and values. The key at position p of request n is 100 n + p and a tenth of its layer;
    the value is the negative of the key."""

    def __init__(self, blocks: int = 24):
        self.attentions = [cpu_attention(f"layer{i}", blocks, HEADS, WIDTH) for i in range(LAYERS)]
        self.cache = bound(self.attentions)
        self.free = list(range(1, blocks))
        self.h, self.a = torch.zeros(BATCH, 2), torch.zeros(BATCH, 2)
        self.backlog = Backlog(32, CHUNK, 2, self.h, self.a)
        #: by request, its blocks
        self.blocks: dict[str, list[int]] = {}

    def take(self, *parts: tuple[int, int, int]) -> None:
        """A batch of (request, first position, rows)."""
        rows, first = [], 3  # the batch begins with rows of others
        for number, position, count in parts:
            name = f"r{number}"
            blocks = self.blocks.setdefault(name, [])
            new = [self.free.pop(0) for _ in range(-(-(position + count) // BLOCK) - len(blocks))]
            self.backlog.note_blocks(name, [*blocks, *new] if not blocks else new, anew=not blocks)
            blocks += new
            slots = torch.tensor([blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(position, position + count)])
            for layer, attn in enumerate(self.attentions):
                key = self.key(number, position, count, layer)
                write(attn, key, -key, slots)
            tokens = torch.arange(position, position + count + 1)
            rows.append(Rows(name, first, position, tokens[1:], tokens[:-1]))
            first += count
        self.backlog.take(rows, self.h, self.a)

    def preempt(self, number: int) -> None:
        """Its blocks are others' from now on."""
        for block in (given := self.blocks.pop(f"r{number}")):
            for attn in self.attentions:
                attn.kv_cache[block] = math.nan
        self.free += given
        self.backlog.preempt(f"r{number}")

    @staticmethod
    def key(number: int, position: int, count: int, layer: int) -> torch.Tensor:
        x = 100.0 * number + torch.arange(position, position + count) + layer / 10
        return x[:, None, None].expand(-1, HEADS, WIDTH).contiguous()

    def start(self, number: int, prompt: int, start: int = 0, learn: bool = True, output: bool = False) -> None:
        self.backlog.start(f"r{number}", RequestPlan(number, prompt, learn, output, start))

    def check(self) -> None:
        """Every queued chunk finds all that comes before it, and nothing else."""
        chunks = [chunk for queue in self.backlog.queues.values() for chunk in queue]
        past = PastSource(self.cache, chunks).past(len(chunks), CHUNK)
        assert list(past.layout.lengths) == [chunk.first for chunk in chunks]
        for layer in range(LAYERS):
            keys, values = past.served(layer, torch.float32)
            assert torch.equal(keys, torch.cat([self.key(c.session, 0, c.first, layer) for c in chunks]))
            assert torch.equal(values, -keys)
        positions = [torch.arange(c.first, c.first + CHUNK).clamp(max=c.end - 1) for c in chunks]
        assert torch.equal(past.positions_T, torch.cat(positions))
        for chunk in chunks:
            expected = torch.arange(chunk.first, chunk.end)
            assert torch.equal(self.backlog.x_PC[chunk.page, : chunk.rows], expected)
            assert torch.equal(self.backlog.t_PC[chunk.page, : chunk.rows], expected + 1)

    def learn(self) -> Chunk:
        """The next chunk's step."""
        self.check()
        chunk = self.backlog.heads()[0]
        self.backlog.advance(chunk)
        self.backlog.settle(chunk)
        return chunk


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 3), st.integers(0, 2),
    st.integers(1, 60),
)  # fmt: skip
def test_each_pair_is_learned_once_over_its_past(parts: list[int], start: int, learned: int, times: int, again: int) -> None:
    """However a prompt is cut into steps, with history before what is learned, and preempted when some of it is learned."""
    device, prompt = Device(), sum(parts) + 2
    start = min(start, prompt - 1)
    device.start(1, prompt, start)
    device.start(2, 40)
    at, pairs = 0, []

    def learn(count: int) -> None:
        while count and any(chunk.session == 1 for chunk in device.backlog.heads()):
            chunk = device.learn()
            if chunk.session == 1:
                pairs.extend(range(chunk.first, chunk.end))
                count -= 1

    for i, count in enumerate(parts):
        device.take((1, at, count), (2, 2 * i, 2))
        at += count
    for _ in range(times):
        learn(learned)
        device.preempt(1)
        device.take((2, 2 * len(parts), 2))  # others are served meanwhile, and get its blocks
        parts.append(2)
        for first in range(0, at, again):
            device.take((1, first, min(again, at - first)))
    device.take((1, at, prompt - 1 - at))
    device.backlog.finish("r1", prompt - 1)
    learn(99)
    rest = (prompt - 1 - start) % CHUNK
    end = prompt - 1 - (rest if rest < 2 else 0)
    assert pairs == list(range(start, end))
    short = [chunk for chunk in device.backlog.short if chunk.session == 1]
    assert sum(chunk.rows for chunk in short) == prompt - 1 - end, "what is too short is said once"
    assert device.backlog.settled() == [("r1", 1)]
    assert device.backlog.released() == ["r1"]
    assert device.backlog.released() == [], "said once"


def test_an_answer_is_computed_again_after_a_preemption() -> None:
    """The prompt has been learned; of the answer, what waits is forgotten and captured again."""
    device = Device()
    device.start(1, 10, output=True)
    device.take((1, 0, 10))
    while device.backlog.queues:
        device.learn()
    for position in range(10, 21):
        device.take((1, position, 1))
    assert device.learn().first == 9
    device.take((1, 21, 6))
    device.preempt(1)
    assert not device.backlog.queues
    assert not device.backlog.reading_sessions(), "nothing of it is being read: the slot may follow"
    device.take((1, 0, 27))
    device.take((1, 27, 1))
    device.backlog.finish("r1", 28)
    learned = [device.learn() for _ in range(2)]
    assert [(chunk.first, chunk.end) for chunk in learned] == [(17, 25), (25, 28)]


def test_what_ends_before_it_is_computed_again_is_said_to_be_lost() -> None:
    device = Device()
    device.start(1, 30)
    device.take((1, 0, 30))
    device.learn()
    device.preempt(1)
    device.backlog.finish("r1", 29)
    assert [(chunk.first, chunk.end) for chunk in device.backlog.lost] == [(8, 29)]
    assert device.backlog.settled() == [("r1", 1)]
    assert device.backlog.room == 32


def test_blocks_that_are_wanted_back() -> None:
    """Of a request that has left: what waits is given up."""
    device = Device()
    device.start(1, 30)
    device.take((1, 0, 30))
    device.backlog.finish("r1", 29)
    device.learn()
    assert device.backlog.waits(["r1"])
    assert device.backlog.released() == []
    device.backlog.preempt("r1")
    assert not device.backlog.waits(["r1"])
    assert [(chunk.first, chunk.rows) for chunk in device.backlog.lost] == [(8, 8), (16, 8), (24, 5)]
    assert device.backlog.released() == ["r1"]
    assert device.backlog.room == 32


def test_a_preempted_reader_changes_nothing() -> None:
    device = Device()
    device.start(1, 30, learn=False)
    device.take((1, 0, 20))
    device.preempt(1)
    device.take((1, 0, 30))
    device.backlog.finish("r1")
    assert (device.backlog.queues, device.backlog.lost, device.backlog.closing) == ({}, [], {})
