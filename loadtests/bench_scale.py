"""Processor time of what a learned request costs beside its forward: its micro-steps, its measurement, a share of a trial.

    python loadtests/bench_scale.py --requests 20

The worker's own code on tensors of the demo model's shape, without vLLM, one thread: processor time, not the clock, so that it
means something on a machine that does other things too. loadtests/bench_cpu.py has whole requests.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from vllm_ttt.config import TTTConfig
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.backlog import Backlog
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.compute import Compute
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.measuring import Measuring
from vllm_ttt.worker.micro_step import Tail
from vllm_ttt.worker.probe import Probe
from vllm_ttt.worker.step_view import Rows

#: Of demo/model: hidden size, attention output, intermediate size, vocabulary.
D, Q, F, V = 384, 384, 1024, 8192
TOKENS = 1024


class Learner:
    """One session, and the steps of a request on it."""

    def __init__(self, config: TTTConfig):
        rank, draw = config.adapt.rank, lambda *shape: (0.05 * torch.randn(*shape)).bfloat16()
        ones, norm = torch.ones(D), dict.fromkeys("ogud", 10.0)
        heads = draw(rank, Q), draw(rank, D), draw(rank, F)
        tail = Tail(draw(D, Q), draw(2 * F, D), draw(D, F), draw(V, D), ones, ones, 1e-5, 1e-5, *heads, norm)
        self.h, self.a, self.t = draw(TOKENS + 1, D), draw(TOKENS + 1, Q), torch.randint(0, V, (TOKENS + 1,))
        self.backlog = Backlog(8, config.learn.chunk, config.learn.min_chunk, self.h, self.a)
        self.deltas = Deltas(tail, 1, config.learn.scales)
        self.compute = Compute(tail, config.learn, self.backlog, self.deltas)
        self.measuring = Measuring(config.learn, self.compute, self.backlog, self.deltas, Clock(torch.device("cpu")))
        self.probe = Probe(config.guard.probe_tokens, self.h, self.a)
        self.probe.pieces = [range(config.guard.probe_tokens)]
        self.tail, self.row = tail, torch.tensor([self.deltas.row(1)])

    def read(self) -> None:
        self.backlog.start("r", RequestPlan(1, TOKENS + 1, learn=True, learn_output=False))
        self.backlog.take([Rows("r", 0, 0, self.t[1:])], self.h, self.a)
        self.backlog.finish("r")

    def measure(self) -> None:
        self.measuring.run(10**6)
        self.measuring.collect()

    def learn(self) -> None:
        while self.backlog.queues:
            chunk = self.backlog.heads()[0]
            rows, n = chunk.page * self.backlog.chunk + torch.arange(chunk.rows)[None], chunk.rows
            self.compute.score(rows, torch.full((1, n), 1 / n), self.row, torch.zeros(1, dtype=torch.bool))
            self.compute.apply(self.row, torch.ones(1))
            self.backlog.advance(chunk)

    def try_it(self) -> None:
        delta, step = self.deltas.read(1).to(self.tail.wo_DQ.dtype), 1536
        for first in range(0, self.probe.rows, step):
            self.probe.loss(self.tail, delta, self.probe.next(first, step))


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    learner, times = Learner(TTTConfig()), {"learn": [], "measure": [], "try_it": []}
    for _ in range(args.requests + 2):
        learner.read()
        for name in ("measure", "learn", "try_it"):
            times[name].append(seconds(getattr(learner, name)))
    learn, measure, trial = (1e3 * median(times[name][2:]) for name in ("learn", "measure", "try_it"))
    commits = TTTConfig().guard.every / (TOKENS / TTTConfig().learn.chunk)
    print("| of a request of 1,024 tokens | processor ms | of its learning |\n| --- | --- | --- |")
    print(f"| its four micro-steps | {learn:.0f} | |")
    print(f"| its measurement | {measure:.0f} | {measure / learn:.1%} |")
    share = trial / commits
    print(f"| its share of a trial ({trial:.0f} ms every {commits:g} requests) | {share:.0f} | {share / learn:.1%} |")


if __name__ == "__main__":
    main()
