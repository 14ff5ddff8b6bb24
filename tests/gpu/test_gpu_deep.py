"""Steps over several layers, replayed from CUDA graphs, beside the same steps launched one by one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHUNK, KEYS, PROMPTS = 256, (7, 8, 9), (1500, 300, 700)


def on_device(part: Any) -> Any:
    """A Tail, a Block or a QKV, its tensors on the device."""
    if isinstance(part, torch.Tensor):
        return part.cuda()
    if isinstance(part, tuple | list):
        return type(part)(map(on_device, part))
    if not dataclasses.is_dataclass(part):
        return part
    moved = copy.copy(part)
    for field in dataclasses.fields(part):
        setattr(moved, field.name, on_device(getattr(part, field.name)))
    return moved


class Worker:
    """Three sessions with a prompt each, all of it read: random activations, keys and values."""

    def __init__(self) -> None:
        from test_deep_gradient import tail_of

        from vllm_ttt.config import parse_config
        from vllm_ttt.eval.deep_oracle import DeepOracle
        from vllm_ttt.types import RequestPlan
        from vllm_ttt.worker.attention import VarlenAttention
        from vllm_ttt.worker.backlog import Backlog
        from vllm_ttt.worker.compute import Compute
        from vllm_ttt.worker.deltas import Deltas
        from vllm_ttt.worker.past import PastPool
        from vllm_ttt.worker.step_view import Rows

        config = parse_config({"learn": {"max_loss": 2}}, "deep")
        oracle = DeepOracle(Path(__file__).parents[2] / "demo" / "model", config, dtype=torch.bfloat16)
        tail = on_device(tail_of(oracle, torch.bfloat16))
        tail.__post_init__()
        tail.kernel = VarlenAttention()
        torch.manual_seed(0)
        rows, wide = sum(PROMPTS), oracle.stack.layers[0].k.shape[0]
        draw = lambda width: torch.randn(rows, width).bfloat16().cuda()  # noqa: E731
        capture: Any = SimpleNamespace(keys=[draw(wide) for _ in tail.attentions], values=[draw(wide) for _ in tail.attentions])
        h, a, t = draw(tail.wo_DQ.shape[0]), draw(tail.wo_DQ.shape[1]), torch.randint(0, 8000, (rows,)).cuda()
        self.backlog = Backlog(16, CHUNK, 8, h, a)
        self.deltas = Deltas(tail, 4, config.learn.scales)
        self.pool = PastPool(16, CHUNK, capture, wide // oracle.stack.E)
        self.compute = Compute(tail, config.learn, self.backlog, self.deltas)
        view, first = [], 0
        for key, prompt in zip(KEYS, PROMPTS, strict=True):
            row = self.deltas.row(key)
            for x in self.deltas.masters.tensors():
                x[row] = 0.02 * torch.randn(x[row].shape, generator=torch.Generator().manual_seed(key)).cuda()
            self.backlog.start(f"r{key}", RequestPlan(key, prompt, learn=True, learn_output=False))
            view.append(Rows(f"r{key}", first, 0, t[first : first + prompt - 1]))
            first += prompt
        self.pool.take(view, self.backlog, capture)
        self.backlog.take(view, h, a)

    def step(self, which: dict[int, int], measure: bool) -> list[torch.Tensor]:
        """Of chunk ``which[key]`` of each session: losses and gradients, or losses under every scale."""
        from test_deep_compute import whole

        from vllm_ttt.worker.past import Before

        chunks = [list(self.backlog.queues[key])[i] for key, i in which.items()]
        flat, weight = whole(self.backlog, chunks)
        rows, before = torch.tensor([self.deltas.rows[key] for key in which]), Before(self.pool, chunks)
        if measure:
            return [self.compute.measure(flat, weight, rows, None, before).clone()]
        self.compute.score(flat, weight, rows, torch.zeros(len(chunks), dtype=torch.bool), before)
        rows = rows.cuda()
        return [x[rows].clone() for x in (self.compute.loss_R, *self.deltas.grads.tensors())]


@pytest.mark.parametrize("measure", [False, True], ids=["learn", "measure"])
def test_a_replayed_step_is_the_launched_one(measure: bool) -> None:
    from vllm_ttt.worker.past import Before

    def timed(run: Any) -> float:
        run()
        torch.cuda.synchronize()
        return 0.0

    with torch.inference_mode():  # as the worker's hooks run
        plain, replayed = Worker(), Worker()
        replayed.compute.warm_up([(1, CHUNK), (2, CHUNK), (4, 128)], timed, Before(replayed.pool, ()))
        assert replayed.compute.score_graphs, "nothing was captured"
        assert replayed.compute.measure_graphs
        assert not plain.compute.score_graphs
        for which in ({7: 0}, {7: 5}, {7: 3, 8: 1}, {9: 2}, {8: 1, 9: 0}, {7: 0}):
            expected, found = plain.step(which, measure), replayed.step(which, measure)
            for one, other in zip(found, expected, strict=True):
                assert other.isfinite().all()
                error = ((one - other).norm() / other.norm()).item()
                assert error < 0.01, (which, error)  # the order of bf16 sums
