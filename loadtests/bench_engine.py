"""What test-time training costs, beside stock vLLM, in one run on one machine.

    python loadtests/bench_engine.py MODEL [--load-format dummy] [--batches 1,8,32,64] [--arms stock,ttt,lora,lora-same]
    python loadtests/bench_engine.py --compare RESULT.json[=HEAD] ...

Each engine runs in a process of its own: stock vLLM; vLLM with ttt (idle; sessions resident and frozen; sessions that learn
their prompts; prompts and outputs); and, where asked, stock multi-LoRA with an adapter per request: `lora-same` on the modules
that ttt adapts and at its rank, `lora` on all layers at rank 16. They run one after the other, and once more in reverse order
(`--passes`), so that a machine that gets warm favours none; or, where all of them fit (`--gate`), they are up together and
take turns, round by round, so that a neighbour that slows the machine for some seconds favours none. A figure is the median
over `--repeat` rounds of each pass; the table gives it as a ratio to stock in the same run. `--compare` prints one table of
several runs: those of the documents.
"""

from __future__ import annotations

import argparse
import datetime
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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engine_figures
from dummy_adapter import write_adapter
from engine_figures import EVERYWHERE, SAME, Round
from gate import Gate

#: Rank of stock multi-LoRA's adapters: at 128, 64 of them on all layers of an 8B model are more than half of an H100.
LORA_RANK = 16
#: The arms with stock multi-LoRA, and their cases.
LORA = {"lora": EVERYWHERE, "lora-same": SAME}
#: How often eight sessions are timed together and one after the other, at most.
TOGETHER = 3
RESULTS = Path(__file__).parent / "results"


def measure(llm: Any, size: int, args: argparse.Namespace, extra: Any, tokens_out: int | None = None) -> Round:
    """Hand ``size`` requests of random tokens over at once and decode them.

    Args:
        extra: i -> SamplingParams.extra_args of request i, or None; in the arms of multi-LoRA its adapter's LoRARequest.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, out = llm.llm_engine, tokens_out or args.tokens_out
    vocab = engine.vllm_config.model_config.get_vocab_size()
    learned = learned_so_far(llm, args)
    begin = time.perf_counter()
    for i in range(size):
        prompt = {"prompt_token_ids": [random.randrange(10, vocab) for _ in range(args.tokens_in)]}
        lora = args.arm in LORA
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
            times.setdefault(output.request_id, []).extend([now] * len(output.outputs[0].token_ids))
    wall = time.perf_counter() - begin
    while args.arm == "ttt" and any(worker["learning"] for worker in llm.collective_rpc("ttt_status")):
        time.sleep(0.001)
    drained = time.perf_counter() - begin
    return Round(
        tokens=size * (args.tokens_in + out),
        learned=learned_so_far(llm, args) - learned,
        wall=wall,
        drained=drained,
        decode=engine_figures.decode_rate(list(times.values())),
        ttft=[t[0] - begin for t in times.values()],
        tpot=[(t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1],
        itl=[b - a for t in times.values() for a, b in itertools.pairwise(t)],
    )


def tried(llm: Any, args: argparse.Namespace) -> None:
    """Wait until the guard has tried all that was learned."""
    while args.arm == "ttt" and llm.collective_rpc("ttt_status")[0]["trying"]:
        time.sleep(0.01)


def learned_so_far(llm: Any, args: argparse.Namespace) -> int:
    return llm.collective_rpc("ttt_status")[0]["tokens_learned"] if args.arm == "ttt" else 0  # each rank says the same


def cases(args: argparse.Namespace) -> dict[str, Any]:
    """name -> (i -> extra_args, or adapter) for the engine of this process."""
    if args.arm in LORA:
        from transformers import AutoConfig
        from vllm.lora.request import LoRARequest

        folder = tempfile.mkdtemp(prefix="bench-lora-")
        rank, modules = adapters(args)
        path = str(write_adapter(Path(folder), AutoConfig.from_pretrained(args.model), rank, modules))
        # One file under many names: to vLLM they are as many adapters.
        return {LORA[args.arm]: lambda i: LoRARequest(f"adapter-{i % args.slots}", 1 + i % args.slots, path)}
    if args.arm != "ttt":
        return {args.arm: lambda i: None}
    found: dict[str, Any] = {
        "idle": lambda i: None,
        "learn prompts": lambda i: {"session_id": f"s{i}"},
        "learn all": lambda i: {"session_id": f"s{i}", "ttt_learn_output": 1},
        "frozen": lambda i: {"session_id": f"s{i}", "ttt_learn": 0},
    }
    return {name: found[name] for name in found if not args.cases or name in args.cases.split(",")}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of ttt. Random tokens are what the gate and the guard are for: they are learned, and the guard has no say."""
    found = {"sessions": {"resident": args.slots}, "learn": {"max_loss": 2.0}, "guard": {"max_regression": 100}}
    for section, values in json.loads(args.config).items():
        found.setdefault(section, {}).update(values)
    return found


def adapters(args: argparse.Namespace) -> tuple[int, list[str] | None]:
    """Rank of stock multi-LoRA's adapters, and the modules that they are on: full names, or None for every linear layer."""
    if args.arm == "lora":
        return LORA_RANK, None
    from transformers import AutoConfig

    from vllm_ttt.config import parse_config
    from vllm_ttt.support import adapted_modules

    config = parse_config(settings(args))
    return config.adapt.rank, adapted_modules(AutoConfig.from_pretrained(args.model).num_hidden_layers, config)


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    """One engine: what it takes, and the rounds of each case by batch."""
    from vllm import LLM

    options: dict[str, Any] = {"model": args.model, "load_format": args.load_format, "max_model_len": args.max_model_len}
    if args.arm == "ttt":
        import vllm_ttt

        options |= vllm_ttt.engine_args(config=settings(args))
    if args.arm in LORA:
        rank, modules = adapters(args)
        options |= {"enable_lora": True, "max_loras": args.slots, "max_lora_rank": rank, "lora_target_modules": modules}
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
    chosen, gate = cases(args), Gate(args)
    rounds: dict[tuple[str, int], list[Round]] = {(name, size): [] for name in chosen for size in args.batches}
    for turn in range(args.repeat + 1):  # the first one warms up
        with gate.turn():
            for (name, size), done in rounds.items():
                tried(llm, args)
                found = measure(llm, size, args, chosen[name], tokens_out=None if turn else 4)
                if turn:
                    done.append(found)
                    log(f"round {turn}, {name} {size}: decoded {found.decode:.0f} tok/s, all done after {found.drained:.2f} s")
    for (name, size), done in rounds.items():
        result["cases"].setdefault(name, {})[size] = [asdict(r) for r in done]
        shown = {k: v for k, v in engine_figures.figures(done).items() if isinstance(v, float) and k != "wall_s"}
        log(f"{name:>14} {size:>3}: " + " ".join(f"{k} {v:.1f}" for k, v in shown.items()))
    with gate.turn():
        for name in ("stock", "idle", "frozen"):
            if args.profile and name in chosen:
                tried(llm, args)
                llm.start_profile(name)
                measure(llm, max(args.batches), args, chosen[name], tokens_out=8)
                llm.stop_profile()
        if "learn prompts" in chosen and max(args.batches) > 1:
            if not args.cases or "together" in args.cases.split(","):
                result["together"] = together(llm, args, chosen["learn prompts"])
                log(f"8 sessions together / one after the other: {result['together']:.2f}")
            result["worker"] = llm.collective_rpc("ttt_status")[0]
            log(f"worker: {result['worker']}")
        llm.llm_engine.engine_core.shutdown()
    return result


def together(llm: Any, args: argparse.Namespace, extra: Any) -> float:
    """Throughput of eight learning sessions together over that of the same eight one after the other: the median of some."""
    size, found = min(8, args.slots), []
    for _ in range(min(args.repeat, TOGETHER)):
        joint, apart = measure(llm, size, args, extra), [measure(llm, 1, args, lambda _, i=i: extra(i)) for i in range(size)]
        for what, rounds in ((f"{size} sessions together", [joint]), ("one after the other", apart)):
            wall, drained = (sum(getattr(r, name) for r in rounds) for name in ("wall", "drained"))
            first, token = sum(max(r.ttft) for r in rounds), statistics.median(x for r in rounds for x in r.tpot)
            log(f"{what}: {drained:.3f} s, answered after {wall:.3f}, first tokens {first:.3f}, {1e3 * token:.2f} ms a token")
        found.append(sum(r.drained for r in apart) / joint.drained)
    return statistics.median(found)


def order(arms: list[str], passes: int) -> list[str]:
    """Which engine is started when."""
    return [arm for i in range(passes) for arm in (reversed(arms) if i % 2 else arms)]


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


def start(arm: str) -> Callable[[], tuple[int, list[str]]]:
    """Start an engine in a process of its own; returns what waits for its exit status and result."""
    printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 - not a pipe: nobody reads while others are waited for
    child = subprocess.Popen([sys.executable, *sys.argv, "--arm", arm], stdout=printed, text=True)

    def wait() -> tuple[int, list[str]]:
        status = child.wait()
        printed.seek(0)
        return status, [line for line in printed if line.startswith("RESULT ")]

    return wait


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--compare", nargs="+", metavar="RESULT.json", help="print a table of these; PATH=HEAD: a head for it")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64])
    parser.add_argument("--arms", default="stock,ttt")
    parser.add_argument("--cases", help="of the arm ttt: idle, learn prompts, learn all, frozen, together; default: all")
    parser.add_argument("--slots", type=int, default=64, help="sessions.resident, or --max-loras")
    parser.add_argument("--tokens-in", type=int, default=512)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--passes", type=int, default=2, help="starts of each engine, every other in reverse order")
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--config", default="{}", help="more of the configuration of ttt, as JSON")
    parser.add_argument("--profile", help="folder for profiler traces of a few decode steps")
    parser.add_argument("--out", default=str(RESULTS), help="folder for the dated JSON and Markdown")
    parser.add_argument("--name", default="engine")
    Gate.add_arguments(parser)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        print(engine_figures.comparison(args.compare))
        return
    if args.model is None:
        parser.error("a model, or --compare, is needed")
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
        "order": [],
        "arms": {},
    }
    stem = Path(args.out) / f"{report['date']}-{args.name}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms.split(",")}
    starts = ((arm, start(arm)) for arm in order(list(runs), args.passes))
    for arm, child in list(starts) if args.gate else starts:
        status, lines = child()
        if status or not lines:
            sys.exit(f"the arm {arm} failed with exit status {status}; its log is above")
        runs[arm].append(json.loads(lines[-1].removeprefix("RESULT ")))
        report["order"].append(arm)
        report["arms"] = {arm: engine_figures.merge(done) for arm, done in runs.items() if done}
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    text = (
        f"# {args.name}\n\n{report['hardware']}, {report['versions']}, {report['date']}\n\n    {command}\n\n"
        f"Engines in this order: {', '.join(report['order'])}.\n\n{engine_figures.table(report)}\n\n"
        "Ratios to the first line, in the same run; learned tok/s as it is. Times in ms. Decode tok/s are tokens over time, "
        "from when every request has its first token; all is learned when the last commit is done.\n\n"
        f"{engine_figures.memory_table(report)}\n"
    )
    if args.profile:
        text += f"\nKernels in one prefill and eight decode steps of {max(args.batches)} requests:\n\n"
        text += engine_figures.kernel_table(engine_figures.kernels(args.profile)) + "\n"
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
