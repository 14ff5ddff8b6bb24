"""Steps over several layers through pages, pool and masters: as the trainer asks for them, and padded as CUDA graphs are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deep_gradient import tail_of
from test_worker_compute import Eager

from vllm_ttt.config import parse_config
from vllm_ttt.eval.deep_oracle import DeepOracle
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.backlog import Backlog, Chunk
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.compute import Compute
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.measuring import Measuring
from vllm_ttt.worker.micro_step import Delta, accumulate
from vllm_ttt.worker.past import Before, PastPool
from vllm_ttt.worker.probe import Probe
from vllm_ttt.worker.step_view import Rows

pytestmark = pytest.mark.unit

CHUNK = 16
CONFIG = parse_config({"adapt": {"layers": 3, "rank": 8}, "learn": {"chunk": CHUNK, "max_loss": 2}}, "deep")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> DeepOracle:
    folder: Path = tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=4)
    return DeepOracle(folder, CONFIG, dtype=torch.float32)


def whole(backlog: Backlog, chunks: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and weights of a step that learns all of each chunk."""
    flat = backlog.rows_of([(chunk, 0, chunk.rows) for chunk in chunks])
    weight = torch.zeros(flat.shape)
    for s, chunk in enumerate(chunks):
        weight[s, : chunk.rows] = 1 / chunk.rows
    return flat, weight


class Engine:
    """What the worker has for two sessions, each with a request of 45 tokens that has been read."""

    def __init__(self, oracle: DeepOracle):
        torch.manual_seed(0)
        self.tail = tail_of(oracle)
        D, Q, wide = self.tail.wo_DQ.shape[0], self.tail.wo_DQ.shape[1], oracle.stack.layers[0].k.shape[0]
        kv = lambda: [torch.randn(128, wide) for _ in self.tail.attentions]  # noqa: E731
        self.capture: Any = SimpleNamespace(keys=kv(), values=kv())
        self.h, self.a, self.t = torch.randn(128, D), torch.randn(128, Q), torch.randint(0, 300, (128,))
        self.backlog = Backlog(16, CHUNK, 2, self.h, self.a)
        self.deltas = Deltas(self.tail, 3, CONFIG.learn.scales)
        self.pool = PastPool(16, CHUNK, self.capture, wide // oracle.stack.E)
        self.compute = Compute(self.tail, CONFIG.learn, self.backlog, self.deltas)
        for key in (7, 8):
            row = self.deltas.row(key)
            for x in self.deltas.masters.tensors():
                x[row] = torch.randn(x[row].shape, generator=torch.Generator().manual_seed(key)) * 0.05
            self.backlog.start(f"r{key}", RequestPlan(key, 45, learn=True, learn_output=False))
        view = [Rows(f"r{key}", 50 * i, 0, self.t[50 * i : 50 * i + 44]) for i, key in enumerate((7, 8))]
        self.pool.take(view, self.backlog, self.capture)
        self.backlog.take(view, self.h, self.a)

    def chunks(self, *which: int) -> list[Chunk]:
        return [list(self.backlog.queues[key])[i] for key, i in zip((7, 8), which, strict=False)]

    def score(self, chunks: list[Chunk]) -> list[torch.Tensor]:
        flat, weight = whole(self.backlog, chunks)
        rows = torch.tensor([self.deltas.rows[chunk.session] for chunk in chunks])
        self.compute.score(flat, weight, rows, torch.zeros(len(chunks), dtype=torch.bool), Before(self.pool, chunks))
        return [self.compute.loss_R[rows], *(x[rows] for x in self.deltas.grads.tensors())]

    def graph(self, function: Any, shape: tuple[int, int, int], copies: int = 1) -> Eager:
        """Stands where a captured graph stands; what comes before is told by six tensors."""
        S, C, room = shape

        def run(_: None, *values: torch.Tensor) -> torch.Tensor:
            past = Before(self.pool, ()).past(S * copies, C, room * copies)
            own = past.by(*values[-6:])
            own.layout.lengths = own.layout.starts_k.diff().sub(C).tolist()  # SDPA reads them on the host
            return function(own, *values[:-6])

        return Eager(run)


@pytest.mark.parametrize("which", [(0,), (2, 0), (1, 2)])
def test_a_padded_step_learns_the_same(oracle: DeepOracle, which: tuple[int, ...]) -> None:
    plain, padded = Engine(oracle), Engine(oracle)
    for shape in ((2, CHUNK, 20), (3, CHUNK, 100)):
        padded.compute.score_graphs[shape] = padded.graph(padded.compute._score, shape)  # type: ignore[assignment]
    expected, found = plain.score(plain.chunks(*which)), padded.score(padded.chunks(*which))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    graphs: Any = padded.compute.score_graphs
    taken = [shape for shape, graph in graphs.items() if graph.shapes]
    assert taken == [(2, CHUNK, 20) if which == (0,) else (3, CHUNK, 100)], "the smallest that has room for the past"


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_chunks_are_measured_whole(oracle: DeepOracle, padded: bool) -> None:
    engine = Engine(oracle)
    measuring = Measuring(CONFIG.learn, engine.compute, engine.backlog, engine.deltas, Clock(torch.device("cpu")), engine.pool)
    if padded:
        shape, measure = (3, CHUNK, 100), engine.compute._measure
        engine.compute.measure_graphs[shape] = engine.graph(measure, shape, 3)  # type: ignore[assignment]
    assert measuring.sessions() == {7, 8}
    assert measuring.run(13) == 13, "12 rows under 3 scales cost 12: two sessions need 24, and each is measured whole"
    assert not measuring.sessions()
    assert sorted(measuring.collect()) == [7, 8]
    for i, chunk in enumerate(engine.chunks(2, 2)):
        at = slice(50 * i + 32, 50 * i + 44)
        weight = torch.zeros(1, 12)
        weight[:, ::2] = 1 / 6
        past = Before(engine.pool, [chunk]).past(1, 12)
        delta = Delta(*(x.clone() for x in engine.deltas.read(chunk.session).tensors()))
        frozen, served = (
            accumulate(
                engine.tail, delta.times(s), engine.h[None, at], engine.a[None, at], engine.t[None, at], weight, None, past
            )
            for s in (0.0, chunk.scale or 0.0)
        )
        assert chunk.measured is not None
        assert chunk.measured[0] == pytest.approx(frozen.item(), rel=1e-4)
        assert chunk.measured[1] == pytest.approx(served.item(), abs=5e-4), "the parabola through three scales"
        assert frozen.item() != pytest.approx(served.item(), abs=1e-3)


def test_the_guard_tries_piece_by_piece(oracle: DeepOracle) -> None:
    """The rows of a piece see one another, and no other piece."""
    engine = Engine(oracle)
    probe = Probe(40, engine.h, engine.a, engine.pool)
    plans = {name: RequestPlan(99, n, learn=False, learn_output=False, probe=True) for name, n in (("p", 21), ("q", 19))}
    for name, plan in plans.items():
        probe.start(name, plan)
    rows = lambda name, first, position, count: Rows(name, first, position, engine.t[first : first + count])  # noqa: E731
    probe.take([rows("p", 0, 0, 12), rows("q", 30, 0, 18)], engine.h, engine.a)
    probe.take([rows("p", 12, 12, 9)], engine.h, engine.a)
    for name in plans:
        assert not probe.ready
        probe.finish(name)
    assert (probe.ready, probe.rows) == (True, 38)
    assert (probe.next(0, 5), probe.next(20, 5), probe.next(38, 5)) == (range(20), range(20, 38), range(0))
    delta = Delta(*(x.clone() for x in engine.deltas.read(7).tensors()))
    for piece, first in ((range(20), 0), (range(20, 38), 30)):
        at, n = slice(first, first + len(piece)), len(piece)
        past = Before(engine.pool, ()).past(1, n)
        expected = accumulate(
            engine.tail, delta, engine.h[None, at], engine.a[None, at], engine.t[None, at], torch.ones(1, n), None, past
        )
        torch.testing.assert_close(probe.loss(engine.tail, delta, piece), expected)


def test_a_piece_that_was_not_read_to_its_end_is_not_tried(oracle: DeepOracle) -> None:
    engine = Engine(oracle)
    probe = Probe(40, engine.h, engine.a, engine.pool)
    for name in ("p", "q"):
        probe.start(name, RequestPlan(99, 11, learn=False, learn_output=False, probe=True))
    probe.take([Rows("p", 0, 0, engine.t[:10]), Rows("q", 10, 0, engine.t[10:14])], engine.h, engine.a)
    probe.finish("q")
    probe.finish("p")
    assert probe.pieces == [range(10)]
