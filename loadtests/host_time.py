"""What a decode step takes the host, in the worker's process: is the engine slower there than stock vLLM, or its core?

    python loadtests/host_time.py MODEL [--arm stock|ttt] [--options '{"load_format": "dummy"}'] [--json RESULT.json]

The worker is a process of its own, as with several ranks. For each round, in milliseconds, medians of its steps: vLLM's
`execute_model` and `sample_tokens` and the time between them, by the clock and by the processor time of their thread; and a
Python loop of 500 turns, and four events of CUDA, which are the same work in every process: where they take longer, the core
is slower. With ttt a round is also run with vLLM's own methods in place of the hooks.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def install(wrapper: Any, hooks: bool) -> None:
    """In the worker: time what comes from now on."""
    import statistics
    import time

    import torch

    worker, times, last = wrapper.worker, dict[str, list[float]](), [0.0, 0.0]
    own = type(worker) if hooks else next(c for c in type(worker).__mro__ if c.__module__.startswith("vllm.v1.worker"))
    events = [torch.cuda.Event() for _ in range(4)] if torch.cuda.is_available() else []

    def note(name: str, wall: float, cpu: float) -> None:
        times.setdefault(name, []).append(time.perf_counter() - wall)
        times.setdefault(f"{name}, processor", []).append(time.thread_time() - cpu)

    def timed(name: str) -> Any:
        function = getattr(own, name).__get__(worker)

        def run(*args: Any, **more: Any) -> Any:
            if name == "execute_model" and last[0]:
                note("between", *last)
            begin = time.perf_counter(), time.thread_time()
            output = function(*args, **more)
            note(name, *begin)
            if name == "execute_model":
                begin = time.perf_counter(), time.thread_time()
                for _ in range(500):
                    pass
                note("a loop", *begin)
                begin = time.perf_counter(), time.thread_time()
                for event in events:
                    event.record()
                note("four events", *begin)
            last[:] = time.perf_counter(), time.thread_time()
            return output

        return run

    for name in ("execute_model", "sample_tokens"):
        setattr(worker, name, timed(name))
    worker.host_times = lambda: {name: round(1e3 * statistics.median(found), 4) for name, found in times.items()}


def read(wrapper: Any) -> dict[str, float]:
    return wrapper.worker.host_times()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arm", default="ttt", choices=("stock", "ttt"))
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192, help="of each answer: as many steps")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions go to the worker
    options: dict[str, Any] = {"model": args.model, "distributed_executor_backend": "mp"}
    if args.arm == "ttt":
        import vllm_ttt

        options |= vllm_ttt.engine_args()
    else:
        os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, SamplingParams

    llm = LLM(**options, **json.loads(args.options))
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, temperature=0)
    prompts: list[Any] = [{"prompt_token_ids": [10 + (7 * i + j) % 500 for j in range(32)]} for i in range(args.batch)]
    llm.generate(prompts, params, use_tqdm=False)
    found = []
    for hooks in [True, False] * args.rounds if args.arm == "ttt" else [True] * args.rounds:
        llm.collective_rpc(install, args=(hooks,))
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        step = round(1e3 * (time.perf_counter() - begin) / args.tokens, 3)
        name = args.arm if hooks else f"{args.arm}, hooks off"
        found.append({"round": name, "step": step, "ranks": llm.collective_rpc(read)})
        print(json.dumps(found[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
