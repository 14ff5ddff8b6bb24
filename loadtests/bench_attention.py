"""Times the attention of the `deep` step, forward and backward, for each implementation that can run on this machine.

python loadtests/bench_attention.py --json loadtests/results/DATE-attention.json

The default shape is that of Qwen3-8B: 32 query heads, 8 heads of keys and values, width 128, chunks of 256 tokens, bf16. A time
is the median of some runs of one layer, packing of the keys included; the backward of sdpa and xformers repeats the forward.
Each implementation is first compared with the reference in float32. Needs torch alone; without xformers that column says so.
`--device cpu` checks the script, not a machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What is measured needs torch alone: the package is entered without the imports of its __init__, so that the rest of what
# vllm-ttt depends on need not be installed.
package = types.ModuleType("vllm_ttt")
package.__path__ = [str(Path(__file__).resolve().parents[1] / "vllm_ttt")]
sys.modules["vllm_ttt"] = package

from vllm_ttt.worker.clock import Clock  # noqa: E402
from vllm_ttt.worker.step.attention import Attention, Layout, SDPAAttention, available  # noqa: E402

NAMES = ("sdpa", "varlen", "served", "xformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sessions", default="1,8,64", help="chunks in a batch")
    parser.add_argument("--past", default="0,1024,8192", help="tokens before each chunk")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--skip", default="", help="implementations to leave out, comma-separated")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)
    kernels = {k.name: k for k in available(device, torch.bfloat16) if k.name not in args.skip.split(",")}
    for name in NAMES:
        if name not in kernels:
            print(f"{name}: left out (not asked for, not installed, or not for {device.type})")
    errors = check(kernels, args, device)
    rows = []
    print("sessions   past  " + "".join(f"{n + ' fwd':>15}{n + ' bwd':>15}" for n in kernels) + "   (ms)")
    for sessions in map(int, args.sessions.split(",")):
        for past in map(int, args.past.split(",")):
            times = {name: measure(kernel, sessions, past, args, device) for name, kernel in kernels.items()}
            rows.append({"sessions": sessions, "past": past, "ms": times})
            cells = "".join(f"{_show(t['forward']):>15}{_show(t['backward']):>15}" for t in times.values())
            print(f"{sessions:8d} {past:6d}  {cells}", flush=True)
    if args.json:
        about = {
            "command": f"python loadtests/bench_attention.py {' '.join(sys.argv[1:])}".strip(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            "torch": torch.__version__,
            "shape": {k: vars(args)[k] for k in ("heads", "kv_heads", "width", "chunk")},
            "relative_error_against_float32": errors,
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def draw(sessions: int, past: int, args: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
    """Queries, keys and values of the chunks, keys and values of their past, and a gradient of the output."""
    make = lambda *shape: torch.randn(*shape, device=device, generator=generator).to(dtype)  # noqa: E731
    generator = torch.Generator(device).manual_seed(0)
    T, P, G, E = sessions * args.chunk, sessions * past, args.kv_heads, args.width
    own = make(T, args.heads, E), make(T, G, E), make(T, G, E)
    return own, (make(P, G, E), make(P, G, E)), make(T, args.heads, E)


def check(kernels: dict[str, Attention], args: Any, device: torch.device) -> dict[str, float]:
    """The largest relative error of output and gradients, 4 sessions with pasts of 0, 1, 300 and 777 tokens."""
    lengths = [0, 1, 300, 777]
    own, _, d = draw(4, 0, args, device, torch.float32)
    total = torch.randn(2, sum(lengths), args.kv_heads, args.width, device=device)
    layout, results = Layout.of(lengths, args.chunk).to(device), {}

    def run(kernel: Attention, dtype: torch.dtype) -> list[Tensor]:
        past = total[0].to(dtype), total[1].to(dtype)
        attended = tuple(x.to(dtype) for x in own), past, layout, args.width**-0.5
        out, saved = kernel.forward(*attended)  # type: ignore[arg-type]
        return [out, *kernel.backward(*attended, d.to(dtype), saved)]  # type: ignore[arg-type]

    exact = run(SDPAAttention(), torch.float32)
    for name, kernel in kernels.items():
        found = run(kernel, torch.bfloat16)
        results[name] = max(((x.float() - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True))
        print(f"{name}: relative error {results[name]:.4f} against float32")
        if results[name] > 0.02:
            raise SystemExit(f"{name} computes something else; bf16 alone gives about 0.005")
    return results


def measure(kernel: Attention, sessions: int, past: int, args: Any, device: torch.device) -> dict[str, float | None]:
    """Milliseconds of a forward and of a backward; None where the device's memory does not suffice."""
    try:
        own, before, d = draw(sessions, past, args, device, torch.bfloat16)
        layout = Layout.of([past] * sessions, args.chunk).to(device)
        attended = own, before, layout, args.width**-0.5
        forward = lambda: kernel.forward(*attended)  # noqa: E731
        clock = Clock(device)
        both = [_timed(clock, forward, lambda made: kernel.backward(*attended, d, made[1])) for _ in range(args.runs + 3)][3:]
        return {
            "forward": round(1e3 * statistics.median(f for f, _ in both), 4),
            "backward": round(1e3 * statistics.median(b for _, b in both), 4),
        }
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"forward": None, "backward": None}


def _timed(clock: Clock, first: Callable[[], Any], second: Callable[[Any], Any]) -> tuple[float, float]:
    begin = clock.mark()
    made = first()
    middle = clock.mark()
    second(made)
    end = clock.mark()
    clock.wait(end)
    return clock.seconds(begin, middle), clock.seconds(middle, end)


def _show(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
