"""What test-time training costs, beside stock vLLM, in one run on one machine.

    python loadtests/bench_engine.py MODEL [--load-format dummy] [--batches 1,8,32,64] [--arms stock,ttt,lora]

Each engine runs in a process of its own, one after the other: stock vLLM; vLLM with ttt (idle; sessions resident and
frozen; sessions that learn their prompts; prompts and outputs); and, where asked, stock multi-LoRA with an adapter per request,
on all layers. A figure is the median over `--repeat` rounds; the table gives it as a ratio to stock in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import itertools
import json
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dummy_adapter import write_adapter

#: Rank of stock multi-LoRA's adapters: at 128, 64 of them on all layers of an 8B model are more than half of an H100.
LORA_RANK = 16
RESULTS = Path(__file__).parent / "results"


@dataclass
class Round:
    """What some requests that were handed over at once took. Seconds, one entry per request where it is a list."""

    tokens: int
    learned: int
    #: until the last answer, and until all has been learned too
    wall: float
    drained: float
    #: to the first token
    ttft: list[float]
    #: from the first token to the last, per token after the first (as `vllm bench serve` counts)
    tpot: list[float]
    #: between one token and the next, of all requests
    itl: list[float]


def measure(llm: Any, size: int, args: argparse.Namespace, extra: Any, tokens_out: int | None = None) -> Round:
    """Hand ``size`` requests of random tokens over at once and decode them.

    Args:
        extra: i -> SamplingParams.extra_args of request i, or None; in the arm "lora" its adapter's LoRARequest.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, out = llm.llm_engine, tokens_out or args.tokens_out
    vocab = engine.vllm_config.model_config.get_vocab_size()
    learned = learned_so_far(llm, args)
    begin = time.perf_counter()
    for i in range(size):
        prompt = {"prompt_token_ids": [random.randrange(10, vocab) for _ in range(args.tokens_in)]}
        lora = args.arm == "lora"
        params = SamplingParams(
            temperature=0, max_tokens=out, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
            extra_args=None if lora else extra(i),
        )  # fmt: skip
        engine.add_request(f"{begin}-{i}", prompt, params, lora_request=extra(i) if lora else None)
    times: dict[str, list[float]] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            times.setdefault(output.request_id, []).append(now)
    wall = time.perf_counter() - begin
    while args.arm == "ttt" and any(worker["pending"] for worker in llm.collective_rpc("ttt_status")):
        time.sleep(0.001)
    drained = time.perf_counter() - begin
    return Round(
        tokens=size * (args.tokens_in + out),
        learned=learned_so_far(llm, args) - learned,
        wall=wall,
        drained=drained,
        ttft=[t[0] - begin for t in times.values()],
        tpot=[(t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1],
        itl=[b - a for t in times.values() for a, b in itertools.pairwise(t)],
    )


def learned_so_far(llm: Any, args: argparse.Namespace) -> int:
    return sum(w["tokens_learned"] for w in llm.collective_rpc("ttt_status")) if args.arm == "ttt" else 0


def figures(rounds: list[Round], size: int) -> dict[str, float]:
    """Medians over rounds of what belongs to a round; quantiles over the requests, or tokens, of all rounds."""
    pooled = lambda name: sorted(x for r in rounds for x in getattr(r, name))  # noqa: E731
    p99 = lambda values: 1e3 * values[int(len(values) * 0.99)] if values else 0.0  # noqa: E731
    p50 = lambda values: 1e3 * statistics.median(values) if values else 0.0  # noqa: E731
    over = lambda count: statistics.median(count(r) for r in rounds)  # noqa: E731
    ttft, tpot, itl = pooled("ttft"), pooled("tpot"), pooled("itl")
    return {
        "wall_s": over(lambda r: r.wall),
        "drained_s": over(lambda r: r.drained),
        "tokens_per_s": over(lambda r: r.tokens / r.wall),
        "tokens_per_s_drained": over(lambda r: r.tokens / r.drained),
        "learned_per_s": over(lambda r: r.learned / r.drained),
        "decode_tokens_per_s": size / statistics.median(itl) if itl else 0.0,
        "ttft_mean_ms": 1e3 * statistics.mean(ttft),
        "ttft_p99_ms": p99(ttft),
        "tpot_p50_ms": p50(tpot),
        "tpot_p99_ms": p99(tpot),
        "itl_p99_ms": p99(itl),
    }


def cases(args: argparse.Namespace) -> dict[str, Any]:
    """name -> (i -> extra_args, or adapter) for the engine of this process."""
    if args.arm == "lora":
        from transformers import AutoConfig
        from vllm.lora.request import LoRARequest

        folder = tempfile.mkdtemp(prefix="bench-lora-")
        path = str(write_adapter(Path(folder), AutoConfig.from_pretrained(args.model), LORA_RANK))
        # One file under many names: to vLLM they are as many adapters.
        return {"stock multi-LoRA": lambda i: LoRARequest(f"adapter-{i % args.slots}", 1 + i % args.slots, path)}
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

        # Random tokens are what the gate and the guard are for: let them be learned, and the guard try without consequence.
        settings = {"sessions": {"resident": args.slots}, "learn": {"max_loss": 2.0}, "guard": {"max_regression": 100}}
        for section, values in json.loads(args.config).items():
            settings.setdefault(section, {}).update(values)
        options |= vllm_ttt.engine_args(config=settings)
    if args.arm == "lora":
        options |= {"enable_lora": True, "max_loras": args.slots, "max_lora_rank": LORA_RANK}
    if args.profile:
        options["profiler_config"] = {"profiler": "torch", "torch_profiler_dir": str(Path(args.profile, args.arm).resolve())}
    begin = time.perf_counter()
    llm = LLM(**options, **json.loads(args.options))
    cache = llm.llm_engine.vllm_config.cache_config
    result: dict[str, Any] = {
        "startup_s": time.perf_counter() - begin,
        "device_mib": device_memory(),
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "cases": {},
    }
    log(f"{args.arm}: engine up after {result['startup_s']:.0f} s, {result['device_mib']} MiB")
    for name, extra in cases(args).items():
        if args.cases and name not in args.cases.split(","):
            continue
        for size in args.batches:
            measure(llm, size, args, extra, tokens_out=4)
            while name == "frozen" and llm.collective_rpc("ttt_status")[0]["trying"]:
                time.sleep(0.01)  # the guard still tries what was learned before
            measured = figures([measure(llm, size, args, extra) for _ in range(args.repeat)], size)
            result["cases"].setdefault(name, {})[size] = measured
            log(f"{name:>14} {size:>3}: " + " ".join(f"{k} {v:.1f}" for k, v in measured.items() if k != "wall_s"))
        if name == "learn prompts" and max(args.batches) > 1:
            if not args.cases:
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
    joint = measure(llm, size, args, extra).drained
    return sum(measure(llm, 1, args, lambda _, i=i: extra(i)).drained for i in range(size)) / joint


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
    """Markdown: each case as ratios to stock, or without it to idle ttt, which is given in full."""
    head = ["case", "batch", "decode tok/s", "tok/s", "tok/s, all learned", "TTFT mean", "TTFT p99", "TPOT p50", "TPOT p99",
            "ITL p99", "learned tok/s"]  # fmt: skip
    keys = ["decode_tokens_per_s", "tokens_per_s", "tokens_per_s_drained", "ttft_mean_ms", "ttft_p99_ms", "tpot_p50_ms",
            "tpot_p99_ms", "itl_p99_ms"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    arms = report["arms"]
    reference = "stock" if "stock" in arms else "idle"
    stock = arms["stock" if "stock" in arms else "ttt"]["cases"][reference]
    for size, values in stock.items():
        lines.append(f"| {reference} | {size} | " + " | ".join(f"{values[k]:,.1f}" for k in keys) + " | |")
    for arm in report["arms"].values():
        for name, sizes in arm["cases"].items():
            for size, values in sizes.items():
                if name != reference and size in stock:
                    ratios = (values[k] / stock[size][k] if stock[size][k] else float("nan") for k in keys)
                    learned = f" | {values['learned_per_s']:,.0f} |" if values["learned_per_s"] else " | |"
                    lines.append(f"| {name} / {reference} | {size} | " + " | ".join(f"{r:.3f}" for r in ratios) + learned)
    return "\n".join(lines)


def memory_table(report: dict[str, Any]) -> str:
    """Markdown: what the engines hold. vLLM fills its share of the device with KV cache, so what ttt takes is missing there."""
    arms = report["arms"]
    lines = [f"| engine | device MiB in use | KV cache, tokens | / {next(iter(arms))} |", "| --- | --- | --- | --- |"]
    stock = next(iter(arms.values()))["kv_tokens"]
    for name, arm in arms.items():
        used = "" if arm["device_mib"] is None else f"{arm['device_mib']:,}"
        lines.append(f"| {name} | {used} | {arm['kv_tokens']:,} | {arm['kv_tokens'] / stock:.3f} |")
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
    parser.add_argument("--cases", help="of the arm ttt, comma-separated; default: all")
    parser.add_argument("--slots", type=int, default=64, help="sessions.resident, or --max-loras")
    parser.add_argument("--tokens-in", type=int, default=512)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--config", default="{}", help="more of the configuration of ttt, as JSON")
    parser.add_argument("--profile", help="folder for profiler traces of a few decode steps")
    parser.add_argument("--out", default=str(RESULTS), help="folder for the dated JSON and Markdown")
    parser.add_argument("--name", default="engine")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases and "stock" not in args.arms.split(",") and "idle" not in args.cases.split(","):
        parser.error("--cases: without the arm stock, idle is what the others are compared with, and must be among them")
    random.seed(0)
    if args.arm:
        print("RESULT " + json.dumps(run_arm(args)), flush=True)
        return

    import torch
    from vllm import __version__

    command = shlex.join(["python", *sys.argv])
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
        f"# {args.name}\n\n{report['hardware']}, {report['versions']}, {report['date']}\n\n    {command}\n\n{table(report)}\n\n"
        f"Ratios to the first line, in the same run; learned tok/s as it is. Times in ms.\n\n{memory_table(report)}\n"
    )
    if args.profile:
        text += f"\nKernels in one prefill and eight decode steps of {max(args.batches)} requests:\n\n"
        text += kernel_table(kernels(args.profile)) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
