"""Steps over several layers, replayed from CUDA graphs, beside the same steps launched one by one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHUNK, BLOCK, KEYS, PROMPTS = 256, 16, (7, 8, 9), (1500, 300, 700)


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
    """Three sessions with a prompt each, all of it read: random keys and values, in rows like those of Flash Attention."""

    def __init__(self, layers: int | str) -> None:
        from caches import Rows as InRows
        from caches import attention, bound
        from test_gradient import tail_of

        from vllm_ttt.config import parse_config
        from vllm_ttt.eval.oracle import Oracle
        from vllm_ttt.types import RequestPlan
        from vllm_ttt.worker.capture.backlog import Backlog
        from vllm_ttt.worker.capture.step_view import Rows
        from vllm_ttt.worker.deltas.masters import Deltas
        from vllm_ttt.worker.learn.compute import Compute
        from vllm_ttt.worker.step.attention import choose

        config = parse_config({"adapt": {"layers": layers}, "learn": {"chunk": CHUNK, "max_loss": 2}}, "deep")
        oracle = Oracle(Path(__file__).parents[2] / "demo" / "model", config, dtype=torch.bfloat16)
        tail = on_device(tail_of(oracle, torch.bfloat16))
        tail.__post_init__()
        tail.kernel = choose(torch.device("cuda"), torch.bfloat16)
        torch.manual_seed(0)
        qkv, blocks = tail.attentions[0], sum(-(-prompt // BLOCK) for prompt in PROMPTS)
        new = lambda: torch.zeros(blocks + 1, BLOCK, qkv.kv_heads, 2 * qkv.head, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        kv_caches = [new().transpose(1, 2) for _ in tail.attentions]
        attentions = [attention(f"l{i}", InRows(), x) for i, x in enumerate(kv_caches)]
        self.cache = bound(attentions, torch.bfloat16, BLOCK)
        for x in kv_caches:
            x.normal_()
        draw = lambda width: torch.randn(sum(PROMPTS), width).bfloat16().cuda()  # noqa: E731
        h, a = draw(tail.wo_DQ.shape[0]), draw(tail.wo_DQ.shape[1])
        t = torch.randint(0, 8000, (sum(PROMPTS) + 1,)).cuda()
        self.backlog = Backlog(16, CHUNK, 8, h, a)
        self.deltas = Deltas(tail, 4, config.learn.rate)
        self.compute = Compute(tail, config.learn, self.backlog, self.deltas)
        view, first, given = [], 0, 1
        for key, prompt in zip(KEYS, PROMPTS, strict=True):
            self.deltas.row(key)
            for x in self.deltas.read(key).delta.tensors():
                x.copy_(0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(key)))
            self.backlog.start(f"r{key}", RequestPlan(key, prompt, learn=True, learn_output=False))
            count = -(-prompt // BLOCK)
            self.backlog.note_blocks(f"r{key}", range(given, given + count), anew=True)
            tokens = t[first : first + prompt]
            view.append(Rows(f"r{key}", first, 0, tokens[1:], tokens[:-1]))
            first, given = first + prompt, given + count
        self.backlog.take(view, h, a)

    def step(self, which: dict[int, int]) -> list[torch.Tensor]:
        """Of chunk ``which[key]`` of each session: losses under the base model, what a step says, and masters after it."""
        from test_deep_compute import whole

        from vllm_ttt.worker.capture.past import PastSource

        chunks = [list(self.backlog.queues[key])[i] for key, i in which.items()]
        flat, weight = whole(self.backlog, chunks)
        rows, source = torch.tensor([self.deltas.rows[key] for key in which]), PastSource(self.cache, chunks)
        share = torch.tensor([chunk.rows / CHUNK for chunk in chunks])
        base = self.compute.base_loss(flat, weight, source).clone()
        values = self.compute.step(flat, weight, rows, share, source).clone()
        return [base, values, *(x[rows.cuda()] for x in self.deltas.masters.delta.tensors())]

    def capture(self) -> None:
        """Graphs of steps, of some of the shapes of these tests; the others are launched."""
        from vllm_ttt.worker.capture.past import PastSource

        def timed(run: Any) -> float:
            run()
            torch.cuda.synchronize()
            return 0.0

        self.compute.warm_up([(1, CHUNK), (2, CHUNK), (4, 128)], timed, PastSource(self.cache, ()))
        assert self.compute.step_graphs, "nothing was captured"


@pytest.mark.parametrize("layers", [4, "all"])
def test_a_replayed_step_is_the_launched_one(layers: int | str) -> None:
    with torch.inference_mode():  # as the worker's hooks run
        plain, replayed = Worker(layers), Worker(layers)
        replayed.capture()
        assert replayed.compute.base_graphs
        assert not plain.compute.step_graphs
        for which in ({7: 0}, {7: 5}, {7: 3, 8: 1}, {7: 1, 8: 0, 9: 1}, {9: 2}, {8: 1, 9: 0}, {7: 0}):
            expected, found = plain.step(which), replayed.step(which)
            for one, other in zip(found, expected, strict=True):
                assert other.isfinite().all()
                error = ((one - other).norm() / other.norm().clamp(min=1e-9)).item()
                assert error < 0.02, (which, error)  # the order of bf16 sums
