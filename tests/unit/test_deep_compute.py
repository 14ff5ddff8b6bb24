"""Steps over several layers through pages, cache and masters: as the trainer asks for them, and padded as CUDA graphs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from caches import Rows as InRows
from caches import attention, bound
from test_gradient import tail_of
from test_worker_compute import Eager

from vllm_ttt.config import parse_config
from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.chunk import Chunk
from vllm_ttt.worker.capture.past import PastSource
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.compute import Compute
from vllm_ttt.worker.step.micro_step import accumulate

pytestmark = pytest.mark.unit

CHUNK = 16
CONFIG = parse_config({"adapt": {"layers": 3, "rank": 8}, "learn": {"chunk": CHUNK, "max_loss": 2}}, "deep")


@pytest.fixture(scope="module", params=[4, 3], ids=["above a captured layer", "from the embedding on"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder: Path = tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=request.param)
    return Oracle(folder, CONFIG, dtype=torch.float32)


def whole(backlog: Backlog, chunks: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights of a step that learns all of each chunk."""
    flat = backlog.rows_of(chunks)
    weight = torch.zeros(flat.shape)
    for s, chunk in enumerate(chunks):
        weight[s, : chunk.rows] = 1 / chunk.rows
    return flat, weight


class Engine:
    """What the worker has for two sessions, each with a request of 45 tokens that has been read."""

    def __init__(self, oracle: Oracle):
        torch.manual_seed(0)
        self.tail = tail_of(oracle)
        D, Q, qkv = self.tail.wo_DQ.shape[0], self.tail.wo_DQ.shape[1], self.tail.attentions[0]
        kv_caches = [torch.zeros(8, CHUNK, qkv.kv_heads, 2 * qkv.head).transpose(1, 2) for _ in self.tail.attentions]
        self.cache = bound([attention(f"l{i}", InRows(), x) for i, x in enumerate(kv_caches)], block=CHUNK)
        for x in kv_caches:
            x.normal_()
        self.h, self.a, self.t = torch.randn(128, D), torch.randn(128, Q), torch.randint(0, 300, (129,))
        self.backlog = Backlog(16, CHUNK, 2, self.h, self.a)
        self.deltas = Deltas(self.tail, 3, CONFIG.learn.rate)
        self.compute = Compute(self.tail, CONFIG.learn, self.backlog, self.deltas)
        for key in (7, 8):
            self.deltas.row(key)
            master = self.deltas.read(key)
            for x in (*master.delta.tensors(), *master.last.tensors()):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(key)) * 0.2)
            self.backlog.start(f"r{key}", RequestPlan(key, 45, learn=True, learn_output=False))
            self.backlog.note_blocks(f"r{key}", [key - 2, key - 4, key - 6], anew=True)
        self.backlog.take([self.rows(f"r{key}", 50 * i, 0, 44) for i, key in enumerate((7, 8))], self.h, self.a)

    def rows(self, name: str, first: int, position: int, count: int) -> Rows:
        tokens = self.t[first : first + count + 1]
        return Rows(name, first, position, tokens[1:], tokens[:-1])

    def chunks(self, *which: int) -> list[Chunk]:
        return [list(self.backlog.queues[key])[i] for key, i in zip((7, 8), which, strict=False)]

    def step(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        """Losses under the base model; what a step says of the chunks, and the masters of their sessions after it."""
        flat, weight = whole(self.backlog, chunks)
        source = PastSource(self.cache, chunks)
        rows = torch.tensor([self.deltas.rows[chunk.session] for chunk in chunks])
        share = torch.tensor([chunk.rows / CHUNK for chunk in chunks])
        base = self.compute.base_loss(flat, weight, source).clone()
        values = self.compute.step(flat, weight, rows, share, source).clone()
        return [base, values, *(x[rows] for x in self.deltas.masters.tensors())]

    def graph(self, function: Any, shape: tuple[int, int, int]) -> Eager:
        """Stands where a captured graph stands; what comes before is told by six tensors."""
        S, C, room = shape

        def run(_: None, *values: torch.Tensor) -> torch.Tensor:
            past = PastSource(self.cache, ()).past(S, C, room)
            own = past.by(*values[-6:])
            own.layout.lengths = own.layout.starts_k.diff().sub(C).tolist()  # SDPA reads them on the host
            return function(own, *values[:-6])

        return Eager(run)


@pytest.mark.parametrize("which", [(0,), (2, 0), (1, 2)])
def test_a_padded_step_learns_the_same(oracle: Oracle, which: tuple[int, ...]) -> None:
    plain, padded = Engine(oracle), Engine(oracle)
    for shape in ((2, CHUNK, 20), (3, CHUNK, 100)):
        padded.compute.step_graphs[shape] = padded.graph(padded.compute._step, shape)  # type: ignore[assignment]
        padded.compute.base_graphs[shape] = padded.graph(padded.compute._base_loss, shape)  # type: ignore[assignment]
    masters = [x.clone() for x in plain.deltas.masters.tensors()]
    expected, found = plain.step(plain.chunks(*which)), padded.step(padded.chunks(*which))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-3, atol=1e-4)
    assert bool((expected[1][0] == 1).all()), "a chunk was not learned: the comparison would prove nothing"
    assert not torch.allclose(expected[0], expected[1][1], atol=1e-3), "the delta does nothing"
    rows = [plain.deltas.rows[chunk.session] for chunk in plain.chunks(*which)]
    for before, after in zip(masters, plain.deltas.masters.tensors(), strict=True):
        others = [row for row in range(3) if row not in rows]
        assert torch.equal(before[others], after[others])
        assert not any(torch.equal(before[row], after[row]) for row in rows if before[row].numel())
    for graphs in (padded.compute.step_graphs, padded.compute.base_graphs):
        held: Any = graphs
        taken = [shape for shape, graph in held.items() if graph.shapes]
        assert taken == [(2, CHUNK, 20) if which == (0,) else (3, CHUNK, 100)], "the smallest that has room for the past"


def test_the_guard_tries_piece_by_piece(oracle: Oracle) -> None:
    """The rows of a piece see one another, and no other piece."""
    engine = Engine(oracle)
    probe = Probe(40, engine.h, engine.a, engine.cache)
    plans = {name: RequestPlan(99, n, learn=False, learn_output=False, probe=True) for name, n in (("p", 21), ("q", 19))}
    for name, plan in plans.items():
        probe.start(name, plan)
    rows = engine.rows
    probe.take([rows("p", 0, 0, 12), rows("q", 30, 0, 18)], engine.h, engine.a)
    probe.take([rows("p", 12, 12, 9)], engine.h, engine.a)
    for name in plans:
        assert not probe.ready
        probe.finish(name)
    assert (probe.ready, probe.rows) == (True, 38)
    assert (probe.next(0, 5), probe.next(20, 5), probe.next(38, 5)) == (range(20), range(20, 38), range(0))
    delta = engine.deltas.read(7).delta
    for piece, first in ((range(20), 0), (range(20, 38), 30)):
        at, n = slice(first, first + len(piece)), len(piece)
        past = PastSource(engine.cache, ()).past(1, n)
        h, a = engine.tail.entering(engine.h[None, at], engine.a[None, at], engine.t[None, at])
        targets = engine.t[None, first + 1 : first + n + 1]
        expected = accumulate(engine.tail, delta, h, a, targets, torch.ones(1, n), None, past)
        torch.testing.assert_close(probe.loss(engine.tail, delta, piece), expected)


def test_a_piece_that_was_not_read_to_its_end_is_not_tried(oracle: Oracle) -> None:
    engine = Engine(oracle)
    probe = Probe(40, engine.h, engine.a, engine.cache)
    for name in ("p", "q"):
        probe.start(name, RequestPlan(99, 11, learn=False, learn_output=False, probe=True))
    probe.take([engine.rows("p", 0, 0, 10), engine.rows("q", 10, 0, 4)], engine.h, engine.a)
    probe.finish("q")
    probe.finish("p")
    assert probe.pieces == [range(10)]
