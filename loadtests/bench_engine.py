"""What test-time training costs, beside stock vLLM, in one run on one machine.

    python loadtests/bench_engine.py MODEL [--load-format dummy] [--batches 1,8,32,64] [--arms stock,ttt,lora]

Each engine runs in a process of its own, one after the other: stock vLLM; vLLM with ttt (idle; sessions resident and
frozen; sessions that learn their prompts; prompts and outputs); and, where asked, stock multi-LoRA on all layers. A figure
is the median over `--repeat` rounds; the table gives it as a ratio to stock in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def measure(llm: Any, size: int, args: argparse.Namespace, extra: Any, tokens_out: int | None = None) -> dict[str, float]:
    """Hand ``size`` requests of random tokens over at once and decode them.

    Args:
        extra: i -> SamplingParams.extra_args of request i, or None.
    Returns:
        seconds and tokens per second. ``wall`` ends with the last answer, ``drained`` when all has been learned too.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, out = llm.llm_engine, tokens_out or args.tokens_out
    vocab = engine.vllm_config.model_config.get_vocab_size()
    begin = time.perf_counter()
    for i in range(size):
        prompt = {"prompt_token_ids": [random.randrange(10, vocab) for _ in range(args.tokens_in)]}
        params = SamplingParams(
            temperature=0, max_tokens=out, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
            extra_args=extra(i),
        )  # fmt: skip
        engine.add_request(f"{begin}-{i}", prompt, params)
    last: dict[str, float] = {}
    first: list[float] = []
    gaps: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            else:
                first.append(now - begin)
            last[output.request_id] = now
    wall = time.perf_counter() - begin
    while args.arm == "ttt" and any(worker["pending"] for worker in llm.collective_rpc("ttt_status")):
        time.sleep(0.001)
    drained = time.perf_counter() - begin
    gaps.sort()
    tokens = size * (args.tokens_in + out)
    return {
        "wall_s": wall,
        "drained_s": drained,
        "tokens_per_s": tokens / wall,
        "tokens_per_s_drained": tokens / drained,
        "decode_tokens_per_s": size / statistics.median(gaps) if gaps else 0.0,
        "ttft_mean_ms": 1e3 * statistics.mean(first),
        "ttft_p99_ms": 1e3 * sorted(first)[int(len(first) * 0.99)],
        "tpot_p50_ms": 1e3 * statistics.median(gaps) if gaps else 0.0,
        "tpot_p99_ms": 1e3 * gaps[int(len(gaps) * 0.99)] if gaps else 0.0,
    }


def cases(args: argparse.Namespace) -> dict[str, Any]:
    """name -> (i -> extra_args) for the engine of this process."""
    if args.arm != "ttt":
        return {args.arm: lambda i: None}
    return {
        "idle": lambda i: None,
        "learn prompts": lambda i: {"session_id": f"s{i}"},
        "learn all": lambda i: {"session_id": f"s{i}", "ttt_learn_output": 1},
        "frozen": lambda i: {"session_id": f"s{i}", "ttt_learn": 0},
    }


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM

    options: dict[str, Any] = {"model": args.model, "load_format": args.load_format, "max_model_len": args.max_model_len}
    if args.arm == "ttt":
        import vllm_ttt

        settings = {"sessions": {"resident": args.slots}, "learn": {"max_loss": 2.0}}
        options |= vllm_ttt.engine_args(config=settings)
    if args.arm == "lora":
        options |= {"enable_lora": True, "max_loras": args.slots, "max_lora_rank": 128}
    if args.profile:
        options["profiler_config"] = {"profiler": "torch", "torch_profiler_dir": str(Path(args.profile, args.arm).resolve())}
    begin = time.perf_counter()
    llm = LLM(**options, **json.loads(args.options))
    result: dict[str, Any] = {"startup_s": time.perf_counter() - begin, "device_mib": device_memory(), "cases": {}}
    log(f"{args.arm}: engine up after {result['startup_s']:.0f} s, {result['device_mib']} MiB")
    for name, extra in cases(args).items():
        for size in args.batches:
            measure(llm, size, args, extra, tokens_out=4)
            rounds = [measure(llm, size, args, extra) for _ in range(args.repeat)]
            figures = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
            result["cases"].setdefault(name, {})[size] = figures
            log(f"{name:>14} {size:>3}: " + " ".join(f"{k} {v:.1f}" for k, v in figures.items() if k != "wall_s"))
        if name == "learn prompts":
            result["together"] = together(llm, args, extra)
            log(f"8 sessions together / one after the other: {result['together']:.2f}")
            result["worker"] = llm.collective_rpc("ttt_status")[0]
            log(f"worker: {result['worker']}")
        if args.profile and name in ("stock", "idle", "frozen"):
            llm.start_profile(name)
            measure(llm, max(args.batches), args, extra, tokens_out=8)
            llm.stop_profile()
    return result


def together(llm: Any, args: argparse.Namespace, extra: Any) -> float:
    """Throughput of eight learning sessions together over that of the same eight one after the other."""
    size = min(8, args.slots)
    joint = measure(llm, size, args, extra)["drained_s"]
    return sum(measure(llm, 1, args, lambda _, i=i: extra(i))["drained_s"] for i in range(size)) / joint


def device_memory() -> int | None:
    """MiB in use on the first GPU; None without one."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def hardware() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"CPU, {platform.machine()}"


def table(report: dict[str, Any]) -> str:
    """Markdown: each case as ratios to stock, which is given in full."""
    head = ["case", "batch", "decode tok/s", "tok/s", "tok/s, learned", "TTFT mean", "TTFT p99", "TPOT p50", "TPOT p99"]
    keys = ["decode_tokens_per_s", "tokens_per_s", "tokens_per_s_drained", "ttft_mean_ms", "ttft_p99_ms", "tpot_p50_ms",
            "tpot_p99_ms"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    stock = report["arms"]["stock"]["cases"]["stock"]
    for size, figures in stock.items():
        lines.append(f"| stock | {size} | " + " | ".join(f"{figures[k]:,.1f}" for k in keys) + " |")
    for arm in report["arms"].values():
        for name, sizes in arm["cases"].items():
            for size, figures in sizes.items():
                if name != "stock" and size in stock:
                    ratios = (figures[k] / stock[size][k] if stock[size][k] else float("nan") for k in keys)
                    lines.append(f"| {name} / stock | {size} | " + " | ".join(f"{r:.3f}" for r in ratios) + " |")
    return "\n".join(lines)


def kernels(folder: str) -> dict[str, Counter[str]]:
    """Case -> how often each kernel ran, from the profiler's traces below ``folder``."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(Path(folder).glob("*/*.trace.json.gz")):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        found[path.name.split("_rank")[0]] = Counter(e["name"] for e in events if e.get("cat") == "kernel")
    return found


def kernel_table(found: dict[str, Counter[str]]) -> str:
    """Markdown: kernels in all, and those by name that the cases do not run equally often."""
    names = sorted({n for c in found.values() for n in c}, key=lambda n: -max(c[n] for c in found.values()))
    unequal = [n for n in names if len({c[n] for c in found.values()}) > 1]
    lines = ["| kernel | " + " | ".join(found) + " |", "|" + " --- |" * (len(found) + 1)]
    lines.append("| all | " + " | ".join(str(c.total()) for c in found.values()) + " |")
    lines += [f"| `{n[:90]}` | " + " | ".join(str(c[n]) for c in found.values()) + " |" for n in unequal[:25]]
    return "\n".join(lines)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64])
    parser.add_argument("--arms", default="stock,ttt")
    parser.add_argument("--slots", type=int, default=64, help="sessions.resident, or --max-loras")
    parser.add_argument("--tokens-in", type=int, default=512)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--profile", help="folder for profiler traces of a few decode steps")
    parser.add_argument("--out", default=str(RESULTS), help="folder for the dated JSON and Markdown")
    parser.add_argument("--name", default="engine")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    random.seed(0)
    if args.arm:
        print("RESULT " + json.dumps(run_arm(args)), flush=True)
        return

    import torch
    from vllm import __version__

    command = "python " + " ".join(sys.argv)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "hardware": hardware(),
        "versions": {"vllm": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "arms": {},
    }
    stem = Path(args.out) / f"{report['date']}-{args.name}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    for arm in args.arms.split(","):
        child = subprocess.run([sys.executable, *sys.argv, "--arm", arm], stdout=subprocess.PIPE, text=True, check=False)
        lines = [line for line in child.stdout.splitlines() if line.startswith("RESULT ")]
        if child.returncode or not lines:
            sys.exit(f"the arm {arm} failed with exit status {child.returncode}; its log is above")
        report["arms"][arm] = json.loads(lines[-1].removeprefix("RESULT "))
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = (
        f"# {args.name}\n\n{report['hardware']}, {report['versions']}, {report['date']}\n\n    {command}\n\n{table(report)}\n"
    )
    if args.profile:
        text += f"\nKernels in one prefill and eight decode steps of {max(args.batches)} requests:\n\n"
        text += kernel_table(kernels(args.profile)) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
