"""Times the step of the preset `deep` alone, on random weights of a model's shape: what a tile of so many sessions takes.

    python loadtests/bench_step.py [--sessions 1,2,4,8] [--chunk 512] [--past 0] [--fp8 back|both] [--profile]

The default shape is that of Qwen3-8B, all 36 layers, bf16, rank 64. A step is captured as a CUDA graph, as the worker does, and
replayed; a time is the median of some replays. Forward and backward are timed apart from the update of the masters. `--fp8` is
`learn.fp8`; `--profile` lists the kernels of the largest tile. On a CPU (`--device cpu --shape tiny`) it checks the script, not
a machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import parse_config
from vllm_ttt.worker.delta import State
from vllm_ttt.worker.step import attention, fp8
from vllm_ttt.worker.step.attention import Attention, Layout
from vllm_ttt.worker.step.block import Block
from vllm_ttt.worker.step.micro_step import Tail, accumulate
from vllm_ttt.worker.step.qkv import QKV, HeadNorm, Past
from vllm_ttt.worker.step.tail import make_projection
from vllm_ttt.worker.step.update import picked, update

#: layers, D, F, heads, heads of keys, width of a head, V
SHAPES = {
    "qwen3-8b": (36, 4096, 12288, 32, 8, 128, 151936),
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, 151936),
    "tiny": (2, 64, 128, 4, 2, 16, 512),
}
RANK = 64


class Served:
    """Random keys and values of any slot."""

    def __init__(self, heads: int, width: int, rows: int, device: torch.device, dtype: torch.dtype):
        self.kv = torch.randn(2, rows + 1, heads, width, device=device).to(dtype)

    def read(self, layer: int, slots_P: Tensor) -> tuple[Tensor, Tensor]:
        return self.kv[0].index_select(0, slots_P), self.kv[1].index_select(0, slots_P)


def make_tail(
    shape: str, device: torch.device, dtype: torch.dtype, kernel: Attention | None = None, join: bool = False
) -> Tail:
    L, D, F, H, G, E, V = SHAPES[shape]
    draw = lambda o, i: torch.randn(o, i, device=device, dtype=dtype) * i**-0.5  # noqa: E731
    ones = lambda n: torch.ones(n, device=device)  # noqa: E731

    def a_block() -> dict[str, Any]:
        wo, wgu, wd = draw(D, H * E), draw(2 * F, D), draw(D, F)
        norm = {m: w.float().norm().item() for m, w in zip("ogud", (wo, wgu[:F], wgu[F:], wd), strict=True)}
        return {"wo_DQ": wo, "wgu_2FD": wgu, "wd_DF": wd, "ln_D": ones(D), "eps": 1e-6, "norm": norm}

    def a_qkv() -> QKV:
        x = (H + 2 * G) * E
        table = torch.randn(8192 + 4096, E, device=device).to(dtype)
        norms = HeadNorm(ones(E), 1e-6), HeadNorm(ones(E), 1e-6)
        return QKV(draw(x, D), ones(D), 1e-6, H, G, E**-0.5, table, None, *norms)

    project = lambda width: make_projection(width, min(RANK, width), 0).to(device, dtype)  # noqa: E731
    ao, ad = project(H * E), project(F)

    def with_a(block: dict[str, Any]) -> dict[str, Any]:
        """As `build_tail` has it on CUDA: A lies below the weight."""
        joined = {"o": torch.cat((block["wo_DQ"], ao)), "d": torch.cat((block["wd_DF"], ad))}
        return {**block, "wo_DQ": joined["o"][:D], "wd_DF": joined["d"][:D], "joined": joined}

    own = with_a if join else lambda block: block
    return Tail(
        **own(a_block()), modules="od", head_VD=draw(V, D), lnf_D=ones(D), eps_f=1e-6,
        ao_RQ=ao, ai_RD=project(D), ad_RF=ad, lower=tuple(Block(**own(a_block())) for _ in range(L - 1)),
        attentions=tuple(a_qkv() for _ in range(L)), embedding_VD=draw(V, D), kernel=kernel or attention.choose(device, dtype),
    )  # fmt: skip


def in_fp8(tail: Tail, ways: str) -> None:
    """As `build_tail` has it with `learn.fp8`."""
    for block in tail.blocks:
        weights = {"o": block.wo_DQ, "gu": block.wgu_2FD, "d": block.wd_DF}
        block.back = {key: fp8.product(w.T, key) for key, w in weights.items()}
        if ways == "both":
            block.served = {key: fp8.product(w, key) for key, w in weights.items()}
    for x in tail.attentions:
        x.back = fp8.product(x.wqkv_XD.T, "qkv")
        x.served = fp8.product(x.wqkv_XD, "qkv") if ways == "both" else None


class Step:
    """What `Compute` does between its gather and its scatter, for S sessions whose states are given."""

    def __init__(self, tail: Tail, S: int, C: int, past: int, shape: str):
        device, dtype = tail.head_VD.device, tail.head_VD.dtype
        _, _, _, _, G, E, V = SHAPES[shape]
        self.tail, self.config = tail, parse_config({}, "deep").learn
        self.state = State(tail.zeros(S), tail.zeros(S, torch.bfloat16), torch.full((S,), 0.012, device=device))
        self.t = torch.randint(0, V, (S, C + 1), device=device)
        self.w, self.share = torch.full((S, C), 1 / C, device=device), torch.ones(S, device=device)
        positions = torch.arange(past, past + C).repeat(S)
        source = torch.arange(S * past) % 4096
        self.past = Past(Layout.of([past] * S, C), positions, source, Served(G, E, 4096, device, dtype)).to(device)
        self.grad, self.rows = tail.zeros(S), torch.arange(S, device=device)
        self.loss = torch.zeros(S, device=device)

    def gradient(self) -> None:
        for g in self.grad.tensors():
            g.zero_()
        served = picked(self.state.delta, self.rows, self.tail.head_VD.dtype)
        h = torch.nn.functional.embedding(self.t[:, :-1], self.tail.embedding_VD)  # type: ignore[arg-type]
        self.loss = accumulate(self.tail, served, h, None, self.t[:, 1:], self.w, self.grad, self.past)

    def advance(self) -> None:
        update(self.tail.norms, self.state, self.rows, self.grad, self.loss, self.share, self.config, 100.0)


def captured(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Callable[[], None], device: torch.device, runs: int) -> float:
    """Median seconds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(runs + 1):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sessions", default="1,2,4", help="chunks of a tile")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--past", default="0", help="tokens before each chunk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--fp8", choices=("none", "back", "both"), default="none")
    parser.add_argument("--attention", choices=attention.IMPLEMENTATIONS, help="default: what a worker would take")
    parser.add_argument("--join", action=argparse.BooleanOptionalAction, default=True, help="A lies below the weights")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)
    kernel = attention.IMPLEMENTATIONS[args.attention]() if args.attention else None
    join = args.join and args.fp8 == "none"
    tail = make_tail(args.shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32, kernel, join)
    if args.fp8 != "none":
        in_fp8(tail, args.fp8)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for S in map(int, args.sessions.split(",")):
            for past in map(int, args.past.split(",")):
                step = Step(tail, S, args.chunk, past, args.shape)
                before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                step.gradient()
                step.advance()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else 0.0
                gradient = timed(captured(step.gradient, device), device, args.runs)
                advance = timed(captured(step.advance, device), device, args.runs)
                tokens = S * args.chunk
                rows.append({
                    "sessions": S, "past": past, "gradient_ms": 1e3 * gradient, "update_ms": 1e3 * advance,
                    "tokens_per_s": tokens / (gradient + advance), "peak_gib": peak,
                })  # fmt: skip
                print({k: round(v, 2) for k, v in rows[-1].items()}, flush=True)
        if args.profile and device.type == "cuda":
            step = Step(tail, int(args.sessions.split(",")[-1]), args.chunk, 0, args.shape)
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                step.gradient()
                step.advance()
                torch.cuda.synchronize()
            print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90))
    if args.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        about = {"command": " ".join(["python", *sys.argv]), "device": name}
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
