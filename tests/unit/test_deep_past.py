"""The pool of keys and values, and the keys of blocks: by session and epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.engine.blocks import BlockKeys
from vllm_ttt.engine.ledger import Session
from vllm_ttt.geometry import Geometry
from vllm_ttt.types import ChunkReport, RequestPlan, SessionKey
from vllm_ttt.worker import memory
from vllm_ttt.worker.backlog import Backlog
from vllm_ttt.worker.past import Before, PastPool
from vllm_ttt.worker.step_view import Rows

pytestmark = pytest.mark.unit

CHUNK, LAYERS, HEADS, WIDTH, BATCH = 8, 2, 2, 6, 160


class Device:
    """A batch's buffers, a backlog and a pool. The key at position p of request n is 1000 n + p and a tenth of its layer; the
    value is the negative of the key."""

    def __init__(self, pages: int):
        self.capture: Any = SimpleNamespace(
            keys=[torch.zeros(BATCH, WIDTH) for _ in range(LAYERS)], values=[torch.zeros(BATCH, WIDTH) for _ in range(LAYERS)]
        )
        self.h, self.a = torch.zeros(BATCH, 2), torch.zeros(BATCH, 2)
        self.backlog = Backlog(32, CHUNK, 2, self.h, self.a)
        self.pool = PastPool(pages, CHUNK, self.capture, HEADS)

    def view(self, *parts: tuple[int, int, int]) -> list[Rows]:
        """Of (request, first position, rows)."""
        rows, first = [], 3  # the batch begins with rows of others
        for number, position, count in parts:
            for layer in range(LAYERS):
                x = 1000.0 * number + torch.arange(position, position + count) + layer / 10
                self.capture.keys[layer][first : first + count] = x[:, None]
                self.capture.values[layer][first : first + count] = -x[:, None]
            rows.append(Rows(f"r{number}", first, position, torch.arange(position + 1, position + 1 + count)))
            first += count
        return rows

    def take(self, *parts: tuple[int, int, int]) -> None:
        view = self.view(*parts)
        self.pool.take(view, self.backlog, self.capture)
        self.backlog.take(view, self.h, self.a)

    def start(self, number: int, prompt: int, start: int = 0, learn: bool = True, output: bool = False) -> None:
        self.backlog.start(f"r{number}", RequestPlan(number, prompt, learn, output, start))

    def check(self) -> None:
        """Every queued chunk finds all that comes before it, and nothing else."""
        chunks = [chunk for queue in self.backlog.queues.values() for chunk in queue]
        past = Before(self.pool, chunks).past(len(chunks), CHUNK)
        assert list(past.layout.lengths) == [chunk.first for chunk in chunks]
        for layer in range(LAYERS):
            keys, values = past.served(layer)
            assert keys.shape[1:] == (HEADS, WIDTH // HEADS)
            expected = [1000.0 * c.session + torch.arange(c.first) + layer / 10 for c in chunks]
            assert torch.equal(keys[:, 0, 0], torch.cat(expected))
            assert torch.equal(values, -keys)
        positions = [torch.arange(c.first, c.first + CHUNK).clamp(max=c.end - 1) for c in chunks]
        assert torch.equal(past.positions_T, torch.cat(positions))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 30))
def test_a_chunk_finds_its_past(parts: list[int], start: int, again: int) -> None:
    """However a prompt is cut into steps, with history before what is learned, and after a preemption."""
    device, prompt = Device(32), sum(parts) + 2
    device.start(1, prompt, min(start, prompt - 1))
    device.start(2, 40)
    at = 0
    for i, count in enumerate(parts):
        device.take((1, at, count), (2, 2 * i, 2))
        at += count
    if again:  # preempted: computed again from the first token on, in one step, and one token more
        device.take((1, 0, min(again, at)))
        device.take((1, min(again, at), at - min(again, at) + 1))
    if device.backlog.queues:
        device.check()


def test_pages_come_back() -> None:
    """When the last chunk has been learned, or the request is given up; not before."""
    device = Device(16)
    device.start(1, 20)
    device.start(2, 20, learn=False)
    device.take((1, 0, 20), (2, 0, 20))
    assert set(device.pool.held) == {"r1"}, "a request that learns nothing holds nothing"
    assert len(device.pool.free) == 13
    device.backlog.finish("r1", 19)
    for _ in range(3):
        device.pool.sweep(device.backlog)
        device.check()
        device.backlog.advance(device.backlog.heads()[0])
    device.pool.sweep(device.backlog)
    assert len(device.pool.free) == 16

    device.start(3, 40)
    device.take((3, 0, 12))
    device.backlog.drop_session(3)
    device.pool.sweep(device.backlog)
    assert (len(device.pool.free), device.pool.held) == (16, {})


def test_the_answer_keeps_its_prompt() -> None:
    device = Device(16)
    device.start(1, 10, output=True)
    device.take((1, 0, 10))
    while device.backlog.queues:
        device.backlog.advance(device.backlog.heads()[0])
    device.pool.sweep(device.backlog)
    device.take((1, 10, 9))
    assert device.backlog.heads()[0].first == 9
    device.check()


def test_what_the_pool_lacks_is_said_before_it_is_taken() -> None:
    device = Device(4)
    for number in (1, 2, 3):
        device.start(number, 60)
    device.take((1, 0, 10), (2, 0, 8))
    assert device.pool.lacking(device.view((1, 10, 6), (2, 8, 8)), device.backlog) == []
    assert device.pool.lacking(device.view((1, 10, 7), (2, 8, 8), (3, 0, 1)), device.backlog) == ["r3", "r2"]
    device.take((1, 10, 6), (2, 8, 8))
    assert device.pool.free == []


def test_pool_and_batch_are_counted_as_needed() -> None:
    geometry = Geometry(layer=4, rank=8, seed=0, hidden=32, attention=48, feed_forward=64, layers=4, keys=24)
    token = 3 * 2 * 24 * 2
    adapt = {"layers": 4, "rank": 8, "kv_pool_gib": 1000 * token / 2**30}
    config = parse_config({"adapt": adapt, "learn": {"chunk": 256}, "sessions": {"resident": 2}}, "deep")
    assert memory.past_pages(geometry, config, 2, 4096) == 1000 // 256
    assert memory.past_pages(geometry, config, 2, 300) == 1000 // 256
    assert memory.past_pages(geometry, config, 2, 200) == 2, "no more than all resident sessions can fill"
    needs = memory.needs(geometry, config, 40, 2, 96, 4096, 2)
    assert [v for k, v in needs.items() if k.startswith("keys and values")] == [3 * 256 * token, 40 * token]
    masters = next(v for k, v in needs.items() if k.startswith("masters"))
    assert masters == 3 * (6 * 4 * 8 * (2 * 32 + 2 * 64) + 4)


# Blocks


class Request:
    """What the keys of blocks touch of vLLM's Request."""

    def __init__(self, session: Session):
        self.lora_request = SimpleNamespace(lora_name="n", lora_int_id=session.adapter, lora_path=f"/ttt/{session.adapter}")
        self.block_hashes, self.hashed = ["stale"], 0

    def update_block_hashes(self) -> None:
        self.hashed += 1
        self.block_hashes.append(self.lora_request.lora_path)


class LoRA(SimpleNamespace):
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str):
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


@pytest.fixture
def session() -> Session:
    return Session(SessionKey("-", "s"), 70, 8)


def request_of(session: Session) -> Any:
    request = Request(session)
    request.lora_request = LoRA(**vars(request.lora_request))
    return request


def entered(keys: BlockKeys, session: Session, exact: bool = True) -> str:
    request = request_of(session)
    keys.enter(request, session, exact)
    path = request.lora_request.lora_path
    assert request.block_hashes == (["stale"] if path == "/ttt/70" else [path]), "hashed anew where the key changed"
    return path


def learn(keys: BlockKeys, session: Session, tokens: int = 512, skipped: str | None = None, rate: float = 0.012) -> None:
    version = session.version + (skipped is None)
    chunk = ChunkReport(session.adapter, "r", tokens, 1.0, None, skipped, tokens, version, rate)
    keys.learned(session, chunk)
    session.record(chunk)


def deep(kv_epoch: float) -> BlockKeys:
    return BlockKeys(parse_config({"schedule": {"kv_epoch": kv_epoch}}, "deep"))


def test_version_0_is_the_base_model(session: Session) -> None:
    keys = deep(0.05)
    assert entered(keys, session) == "/ttt/70"
    learn(keys, session)
    first = entered(keys, session)
    assert first.startswith("/ttt/70/")
    session.version = 0  # rolled back to the beginning
    assert entered(keys, session) == "/ttt/70"


@pytest.mark.parametrize(("kv_epoch", "lives"), [(0.0, 1), (0.05, 3), (1.0, 58)])
def test_an_epoch_lasts_as_long_as_the_delta_is_near(session: Session, kv_epoch: float, lives: int) -> None:
    """A full chunk moves it by 0.012 + 0.015 * 0.35 at most."""
    keys = deep(kv_epoch)
    paths = []
    for _ in range(3 * lives):
        learn(keys, session)
        paths.append(entered(keys, session))
    assert len(set(paths)) == 4 if lives > 1 else 3
    learn(keys, session, skipped="loss")
    assert entered(keys, session) == paths[-1], "what was skipped moved nothing"


def test_a_short_chunk_moves_less(session: Session) -> None:
    keys = deep(0.05)
    learn(keys, session)
    before = entered(keys, session)
    for _ in range(10):
        learn(keys, session, tokens=32)
    assert entered(keys, session) == before


def test_a_larger_rate_moves_it_sooner(session: Session) -> None:
    """What a chunk says is the rate that its step had."""
    keys = deep(0.05)
    learn(keys, session, rate=0.002)
    before = entered(keys, session)
    for _ in range(5):
        learn(keys, session, rate=0.002)
    assert entered(keys, session) == before
    learn(keys, session, rate=0.05)
    assert entered(keys, session) != before


def test_what_changes_the_version_otherwise_begins_an_epoch(session: Session) -> None:
    keys = deep(10.0)
    learn(keys, session)
    learn(keys, session)
    before = entered(keys, session)
    session.version = 1  # rolled back
    after = entered(keys, session)
    learn(keys, session)
    assert session.version == 2
    assert entered(keys, session) == after != before
    session.version = 9
    learn(keys, session)
    assert entered(keys, session) not in (before, after)


def test_while_the_delta_moves_keys_are_nobodys(session: Session) -> None:
    keys = deep(0.05)
    learn(keys, session)
    assert len({entered(keys, session, exact=False) for _ in range(3)} | {entered(keys, session)}) == 4
    request = request_of(session)
    keys.enter(request, session, True)
    hashes = list(request.block_hashes)
    keys.leave(request, session)
    path = request.lora_request.lora_path
    assert path != entered(keys, session)
    assert request.block_hashes == hashes, "what was computed before stays where it is"
    keys.leave(request, session)
    assert request.lora_request.lora_path == path


@pytest.mark.parametrize("config", [parse_config(None, "last"), parse_config({"adapt": {"layers": 1}}, "deep")])
def test_one_layer_needs_none_of_it(config: TTTConfig, session: Session) -> None:
    keys = BlockKeys(config)
    learn(keys, session)
    request = request_of(session)
    keys.enter(request, session, False)
    keys.leave(request, session)
    assert request.lora_request.lora_path == "/ttt/70"
    assert (request.hashed, session.epoch.number) == (0, 0)
