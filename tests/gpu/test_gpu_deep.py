"""Steps over several layers, replayed from CUDA graphs, beside the same steps launched one by one."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
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
    """Three sessions with a prompt each, all of it read: random tokens, keys, values, deltas and last updates."""

    def __init__(self) -> None:
        from caches import BLOCK, Rows, attention, bound
        from test_gradient import tail_of

        from vllm_ttt.config import parse_config
        from vllm_ttt.eval.oracle import Oracle
        from vllm_ttt.types import RequestPlan
        from vllm_ttt.worker import step_view
        from vllm_ttt.worker.attention import VarlenAttention
        from vllm_ttt.worker.backlog import Backlog
        from vllm_ttt.worker.compute import Compute
        from vllm_ttt.worker.deltas import Deltas

        config = parse_config({"learn": {"max_loss": 2, "chunk": CHUNK}})
        oracle = Oracle(Path(__file__).parents[2] / "demo" / "model", config, dtype=torch.bfloat16)
        tail = on_device(tail_of(oracle, torch.bfloat16))
        tail.__post_init__()
        tail.kernel = VarlenAttention()
        torch.manual_seed(0)
        blocks = [-(-prompt // BLOCK) for prompt in PROMPTS]
        shape = 1 + sum(blocks), tail.attentions[0].kv_heads, BLOCK, 2 * tail.attentions[0].head
        attentions = [
            attention(f"layer{i}", Rows(), torch.randn(shape).bfloat16().cuda(), torch.bfloat16)
            for i in range(len(tail.attentions))
        ]
        self.cache = bound(attentions, torch.bfloat16)
        rows = sum(PROMPTS)
        h, t = torch.zeros(rows, 0).bfloat16().cuda(), torch.randint(0, 8000, (rows + 1,)).cuda()
        self.backlog = Backlog(16, CHUNK, 8, h, h)
        self.deltas = Deltas(tail, 4, config.learn.rate)
        self.compute = Compute(tail, config.learn, self.backlog, self.deltas)
        view, first, block = [], 0, 1
        for key, prompt, count in zip(KEYS, PROMPTS, blocks, strict=True):
            self.deltas.row(key)
            master = self.deltas.read(key)
            for x in (*master.delta.tensors(), *master.last.tensors()):
                x.copy_(0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(key)))
            self.backlog.start(f"r{key}", RequestPlan(key, prompt, learn=True, learn_output=False))
            self.backlog.note_blocks(f"r{key}", list(range(block, block + count)), anew=True)
            tokens = t[first : first + prompt]
            view.append(step_view.Rows(f"r{key}", first, 0, tokens[1:], tokens[:-1]))
            first, block = first + prompt, block + count
        self.backlog.take(view, h, h)

    def step(self, which: dict[int, int]) -> list[torch.Tensor]:
        """Of chunk ``which[key]`` of each session: losses under the base model, what a step says, and the masters after it."""
        from vllm_ttt.worker.past import Before

        chunks = [list(self.backlog.queues[key])[i] for key, i in which.items()]
        flat, weight = self.backlog.rows_of(chunks), torch.zeros(len(chunks), max(chunk.rows for chunk in chunks))
        for s, chunk in enumerate(chunks):
            weight[s, : chunk.rows] = 1 / chunk.rows
        rows, before = torch.tensor([self.deltas.rows[key] for key in which]), Before(self.cache, chunks)
        share = torch.tensor([chunk.rows / CHUNK for chunk in chunks])
        frozen = self.compute.frozen(flat, weight, before).clone()
        values = self.compute.step(flat, weight, rows, share, before).clone()
        return [frozen, *values, *self.deltas.masters.select(rows.to(values.device)).tensors()]


def test_a_replayed_step_is_the_launched_one() -> None:
    """Chunk after chunk: what differs is the order of sums in bfloat16."""
    from vllm_ttt.worker.past import Before

    def timed(run: Any) -> float:
        run()
        torch.cuda.synchronize()
        return 0.0

    with torch.inference_mode():  # as the worker's hooks run
        plain, replayed = Worker(), Worker()
        replayed.compute.warm_up([(1, CHUNK), (2, CHUNK), (4, 128)], timed, Before(replayed.cache, ()))
        assert replayed.compute.step_graphs, "nothing was captured"
        assert replayed.compute.frozen_graphs
        assert not plain.compute.step_graphs
        for which in ({7: 0}, {7: 5}, {7: 3, 8: 1}, {9: 2}, {8: 1, 9: 0}, {7: 0}):
            expected, found = plain.step(which), replayed.step(which)
            assert bool((expected[1] == 1).all()), "nothing was learned: the comparison would prove nothing"
            for one, other in zip(found, expected, strict=True):
                assert other.isfinite().all()
                if other.numel():
                    error = ((one.float() - other.float()).norm() / other.float().norm()).item()
                    assert error < 0.02, (which, error)
