"""A session's rate and last update go where its delta goes: whatever happens to it between two chunks, it learns on as if
nothing had. With the real trainer and files, and vLLM's slots left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_worker_compute import D, F, Q, R, V, make
from torch import Tensor

from vllm_ttt.config import parse_config
from vllm_ttt.geometry import Geometry
from vllm_ttt.types import ChunkReport, FileOrder, RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.deltas import delta_file
from vllm_ttt.worker.deltas.delta_file import UPDATE
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.files import Files
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.worker import TTTWorkerMixin

pytestmark = pytest.mark.unit

CHUNK, RATE = 16, 0.01
A, B = 7, 8


class Server:
    """A worker of sessions whose requests are ``CHUNK`` tokens of a text that depends on their number alone."""

    def __init__(self, modules: tuple[str, ...] = ("o_proj", "gate_up_proj", "down_proj"), rows: int = 3, every: int = 1):
        adapt = {"layers": 1, "rank": R, "modules": modules}
        learn = {"chunk": CHUNK, "min_chunk": 1, "max_loss": 2.0, "rate": RATE, "adapt_rate": 2}
        config = parse_config(
            {"adapt": adapt, "learn": learn, "guard": {"every": 0}, "sessions": {"version_every": every, "keep_versions": 9}}
        )
        self.tail = make(config.adapt.letters).tail
        self.h, self.a = torch.zeros(CHUNK, D), torch.zeros(CHUNK, Q)
        self.backlog = Backlog(8, CHUNK, 1, self.h, self.a)
        self.deltas = Deltas(self.tail, rows, config.learn.rate)
        slots: Any = SimpleNamespace(write=lambda *_: None, drop=lambda _: None, holds=lambda _: False)
        self.trainer = Trainer(self.tail, config, self.backlog, self.deltas, slots, Probe(1, self.h, self.a))
        geometry = Geometry(0, R, 0, D, Q, F, modules=modules)
        self.files, self.sent = Files(self.trainer, geometry, "tiny"), 0
        self.worker: Any = SimpleNamespace(trainer=self.trainer, backlog=self.backlog)

    def learn(self, key: int, *numbers: int, noise: bool = False) -> list[ChunkReport]:
        """Requests one after another; of ``noise``, which is not finite, nothing is learned."""
        for number in numbers:
            self.sent += 1
            draw = torch.Generator().manual_seed(number)
            self.h.normal_(generator=draw)
            self.a.normal_(generator=draw)
            tokens = torch.randint(0, V, (CHUNK,), generator=draw)
            if noise:
                self.h.fill_(torch.nan)
            name = f"r{self.sent}"
            self.backlog.start(name, RequestPlan(key, CHUNK + 1, learn=True, learn_output=False))
            self.backlog.take([Rows(name, 0, 0, tokens)], self.h, self.a)
            self.backlog.finish(name, CHUNK)
            self.trainer.learn(CHUNK)
            self.trainer.collect(wait=True)
        return self.trainer.take_report().chunks

    def order(self, **order: Any) -> Any:
        """What has become of a file order."""
        self.files.step([FileOrder(**order)])
        while not self.files.idle:
            self.files.step([])
        return self.files.take_reports()[-1]

    def told(self, key: int) -> dict[str, Any]:
        """What `GET /v1/ttt/sessions/{id}` says of it."""
        self.worker.trainer.slots.holds = lambda _: False
        return TTTWorkerMixin.ttt_session(self.worker, key)

    def state(self, key: int) -> list[Tensor]:
        """B, last update and rate; the worker knows the rate as the device has it."""
        found = self.deltas.read(key)
        assert self.deltas.session(key).rate == found.rate_S.item() == self.told(key)["rate"]
        return [x.clone() for x in found.tensors()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def straight(*numbers: int, **server: Any) -> list[Tensor]:
    """Of a session that nothing happens to."""
    alone = Server(**server)
    alone.learn(A, *numbers)
    return alone.state(A)


def test_it_is_reported_with_each_chunk() -> None:
    server = Server()
    assert server.told(A)["rate"] == RATE, "of one that has learned nothing"
    chunks = server.learn(A, 1, 1, 2)
    assert [c.skipped for c in chunks] == [None] * 3
    rates = [c.rate for c in chunks]
    assert rates[0] == pytest.approx(RATE), "there is no update before the first chunk"
    assert rates[1] > 1.1 * RATE, "the same text again"
    assert len({*rates}) == 3
    assert server.told(A)["rate"] == rates[-1]


def test_a_skipped_chunk_leaves_it_and_the_last_update() -> None:
    server = Server()
    server.learn(A, 1, 2)
    before = server.state(A)
    (chunk,) = server.learn(A, 3, noise=True)
    assert chunk.skipped == "nonfinite"
    assert chunk.rate == before[-1].item()
    assert same(server.state(A), before)
    server.learn(A, 4)
    assert same(server.state(A), straight(1, 2, 4))


@pytest.mark.parametrize("modules", [("o_proj", "down_proj"), ("o_proj", "gate_up_proj", "down_proj"), ("gate_up_proj",)])
def test_eviction_to_the_host(modules: tuple[str, ...]) -> None:
    """Two sessions that have one row between them, in turns."""
    server = Server(modules, rows=1)
    for number in (1, 2, 1, 3):
        server.learn(A, number)
        server.learn(B, number + 10)
    assert server.deltas.evictions == 7
    assert server.deltas.session(A).host is not None
    assert same(server.state(A), straight(1, 2, 1, 3, modules=modules))
    assert same(server.state(B), straight(11, 12, 11, 13, modules=modules))


@pytest.mark.parametrize("modules", [("o_proj", "down_proj"), ("o_proj", "gate_up_proj", "down_proj"), ("gate_up_proj",)])
def test_a_file(tmp_path: Path, modules: tuple[str, ...]) -> None:
    """Saved by one server and loaded by another, it learns on."""
    server, path = Server(modules), tmp_path / "s.safetensors"
    server.learn(A, 1, 2)
    saved = server.order(action="save", session=A, path=str(path))
    assert (saved.outcome, saved.version) == ("done", 2)
    tensors, metadata = delta_file.load(path, saved.checksum, server.files.geometry)
    dtypes = {name.endswith(UPDATE): x.dtype for name, x in tensors.items()}
    assert dtypes == {False: torch.float32, True: torch.bfloat16}
    assert {n.removesuffix(UPDATE) for n in tensors} == set(server.files.geometry.shapes)
    state = json.loads(metadata["state"])
    assert (state["version"], state["rate"]) == (2, server.told(A)["rate"])
    assert len(state["norms"]) == len(server.tail.modules)

    again = Server(modules)
    assert again.order(action="load", session=B, path=str(path), checksum=saved.checksum).outcome == "done"
    assert same(again.state(B), straight(1, 2, modules=modules))
    assert again.told(B)["norm"] == server.told(A)["norm"]
    again.learn(B, 3)
    assert same(again.state(B), straight(1, 2, 3, modules=modules))


def test_a_fork() -> None:
    """Of a session on the device, and of one on the host."""
    server = Server(rows=1)
    server.learn(A, 1, 2)
    server.deltas.copy(A, B)
    server.learn(B, 3)
    assert server.deltas.session(A).host is not None
    server.deltas.copy(A, 9)
    server.learn(A, 4)
    server.learn(9, 5)
    for key, last in ((A, 4), (B, 3), (9, 5)):
        assert same(server.state(key), straight(1, 2, last))


def test_a_rollback_returns_to_the_kept_one() -> None:
    server = Server(every=2)
    chunks = server.learn(A, 1, 1, 2, 3)
    assert server.trainer.versions.of(A) == [0, 2, 4]
    assert server.trainer.roll_back(A, 2)
    assert server.told(A)["rate"] == chunks[1].rate != chunks[3].rate
    assert same(server.state(A), straight(1, 1))
    server.learn(A, 4)
    assert same(server.state(A), straight(1, 1, 4))
    assert server.trainer.roll_back(A, 0)
    assert server.told(A)["rate"] == pytest.approx(RATE), "the base model begins anew"
    server.learn(A, 1)
    assert same(server.state(A), straight(1))


def test_a_reset_begins_anew() -> None:
    server = Server()
    server.learn(A, 1, 2)
    server.trainer.drop(A)
    assert server.told(A)["rate"] == RATE
    server.learn(A, 3)
    assert same(server.state(A), straight(3))


def test_an_imported_adapter_starts_at_the_servers_rate(tmp_path: Path) -> None:
    """Its file says none, and has no last update: the first chunk has the configured rate, and the second one moves it."""
    server, path = Server(), tmp_path / "s.safetensors"
    server.learn(A, 1, 1)
    tensors = server.files._named(server.deltas.read(A).delta)
    tensors |= {name + UPDATE: torch.zeros_like(b, dtype=torch.bfloat16) for name, b in tensors.items()}
    metadata = {"state": json.dumps({"version": 2, "norms": [0.0] * 4, "rate": None})}
    checksum = delta_file.write(path, delta_file.encode(tensors, metadata))
    assert server.order(action="load", session=B, path=str(path), checksum=checksum).outcome == "done"
    assert server.told(B)["rate"] == pytest.approx(RATE)
    first, second = server.learn(B, 1, 1)
    assert first.rate == pytest.approx(RATE)
    assert second.rate > RATE * 1.01
    assert (first.version, second.version) == (3, 4)
