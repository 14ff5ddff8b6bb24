"""Times the kernels with which sessions are served on CUDA: those of decodes and of prompts, and the rounding of a commit.

    python loadtests/bench_slots.py [--rows 64] [--out 4096] [--in 4096] [--rank 64] [--prompt 512] [--sweep [decodes]]

The default shape is that of o_proj of Qwen3-8B; `beside` is its product with the deltas of a batch that decodes. Each kernel
is replayed from a CUDA graph on twelve modules in turn, so that no B is still in the cache; a time is the median of some
replays. `--sweep` tries other sizes of the kernels, and names the best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vllm_ttt.worker.serve import gpu_kernels as kernels
from vllm_ttt.worker.serve.gpu_linear import session_linear

MODULES, RUNS = 12, 5
NO = torch.tensor([False])
#: Sizes of the kernels that are tried: those of gpu_kernels.py by these names.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "beside": {"PER": (1, 2, 3, 4, 6), "BLOCK_K": (64, 128)},
    "decodes": {"BYTES": (2**11, 2**12, 2**13, 2**14), "WARPS": (1, 2, 4)},
    "prompts": {"MANY_M": (64, 128), "MANY_N": (64, 128), "MANY_TIMES": (2, 4), "MANY_WARPS": (4, 8)},
}


class Layer:
    """Slots of some modules, and a batch in which each row has another session, or each session ``prompt`` rows."""

    def __init__(self, args: argparse.Namespace):
        draw = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
        self.rows, entries = args.rows, args.rows + 1
        self.b = [torch.randint(-127, 128, (entries, 1, args.out, args.rank), dtype=torch.int8).cuda() for _ in range(MODULES)]
        self.scales = [torch.rand(entries, 1, args.out, device="cuda") for _ in range(MODULES)]
        self.a, self.x = draw(args.rank, args.width), draw(args.rows, args.width)
        self.slots = torch.arange(args.rows, dtype=torch.int32, device="cuda")
        self.w = [draw(args.out, args.width) for _ in range(MODULES)]
        self.out = draw(args.rows, args.out)
        N, sessions = args.prompt_rows, args.prompt_rows // args.prompt
        self.r, self.y = draw(N, args.rank), draw(N, args.out)
        counts, starts = torch.zeros(entries, dtype=torch.int32), torch.zeros(entries + 1, dtype=torch.int32)
        active = torch.full((entries,), -1, dtype=torch.int32)
        active[:sessions], counts[:sessions] = torch.arange(sessions, dtype=torch.int32), args.prompt
        starts[1 : sessions + 1] = counts[:sessions].cumsum(0)
        self.by_slot = [torch.arange(N, dtype=torch.int32).cuda(), counts.cuda(), starts.cuda(), active.cuda()]
        self.master = torch.randn(MODULES * args.out, args.rank, device="cuda")
        self.rounded = torch.empty_like(self.master, dtype=torch.int8), torch.empty(len(self.master), device="cuda")

    def product(self, i: int) -> None:
        linear(self.x, self.w[i])

    def beside(self, i: int) -> None:
        a, b, scales = self.a[None, None], [self.b[i]], [self.scales[i]]
        unread = [self.slots] * 4
        session_linear(self.x, self.w[i].T, None, a, b, scales, self.slots, *unread, no_lora=NO)

    def decodes(self, i: int) -> None:
        kernels.expand(self.out, *kernels.shrink(self.x, self.a), [self.b[i]], [self.scales[i]], self.slots)

    def prompts(self, i: int) -> None:
        kernels.by_slots(self.y, self.r, [self.b[i]], [self.scales[i]], *self.by_slot)

    def rounds(self, i: int) -> None:
        b, scales = (x.chunk(MODULES)[i] for x in self.rounded)
        kernels.round_into(b, scales, self.master.chunk(MODULES)[i])


def timed(run: Callable[[int], None]) -> float:
    """Microseconds for a module."""

    def every() -> None:
        for i in range(MODULES):
            run(i)

    every()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    times = []
    for _ in range(RUNS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / MODULES)
    return statistics.median(times[1:])


def moved(args: argparse.Namespace, what: str) -> float:
    """Bytes that must be read and written at least, for a module."""
    of_b = args.out * (args.rank + 4)
    sizes: dict[str, Tensor | float] = {
        "product": 2 * args.out * args.width,
        "beside": 2 * args.out * args.width + args.rows * of_b,
        "decodes": args.rows * of_b + 4 * args.rows * args.out,
        "prompts": 2 * 2 * args.prompt_rows * args.out + args.prompt_rows // args.prompt * of_b,
        "rounds": of_b + 4 * args.out * args.rank,
    }
    return float(sizes[what])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="that decode, each with a session of its own")
    parser.add_argument("--in", dest="width", type=int, default=4096)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each session in a batch of prompts")
    parser.add_argument("--prompt-rows", type=int, default=16384, help="tokens of such a batch")
    parser.add_argument("--sweep", nargs="*", choices=SIZES, help="all of them, where none is named")
    parser.add_argument("--json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    torch.manual_seed(0)
    layer, rows = Layer(args), list[dict[str, Any]]()

    def measure(what: str, **sizes: int) -> float:
        for name, value in sizes.items():
            setattr(kernels, name, value)
        us = timed(getattr(layer, what))
        rows.append({"what": what, "us": round(us, 2), "gb_per_s": round(moved(args, what) / us / 1e3), **sizes})
        print(rows[-1], flush=True)
        return us

    for what in ("product", "beside", "decodes", "prompts", "rounds"):
        measure(what)
    for what in (args.sweep or SIZES) if args.sweep is not None else ():
        sizes = SIZES[what]
        tried = [dict(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]
        best = min(tried, key=lambda chosen: measure(what, **chosen))
        print(f"{what}: best with {best}")
    if args.json:
        Path(args.json).write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
