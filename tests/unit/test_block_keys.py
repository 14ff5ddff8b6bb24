"""The keys of blocks: by session and epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.prefix.keys import BlockKeys
from vllm_ttt.types import ChunkReason, ChunkReport, SessionKey

pytestmark = pytest.mark.unit


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


def learn(
    keys: BlockKeys, session: Session, tokens: int = 512, skipped: ChunkReason | None = None, rate: float = 0.012
) -> None:
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
