"""What requests that are held cost everybody's steps: the time of vLLM's `schedule()`, with our scheduler and without a model.

python loadtests/held_requests.py demo/model

A base request decodes, and each of 16 sessions learns a prompt. Then so many further requests of those sessions arrive, which
wait until that has been learned. Printed, by vLLM's policy: the median and the 99th percentile of `schedule()` over 500 steps
in which nothing is let go, and how long each arrival took.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_ttt import engine_args
from vllm_ttt.engine.scheduler import TTTScheduler
from vllm_ttt.types import StepReport

BLOCK, BLOCKS, SESSIONS, STEPS = 16, 4000, 16, 500


class Engine:
    """A scheduler, and a worker that computes nothing and is never done learning."""

    def __init__(self, model: str, policy: str):
        config = {"sessions": {"resident": SESSIONS}, "guard": {"every": 0}}
        args: Any = EngineArgs(
            model=model,
            max_model_len=1024,
            enforce_eager=True,
            scheduling_policy=policy,  # type: ignore[arg-type]
            **engine_args("last", config),
        )
        settings = args.create_engine_config()
        settings.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler, self.number = TTTScheduler(settings, cache, StructuredOutputManager(settings), BLOCK), 0
        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self.hasher = get_request_block_hasher(BLOCK, hashing)

    def send(self, session: str | None, outputs: int = 1) -> None:
        self.number += 1
        extra = {} if session is None else {"session_id": session}
        params = SamplingParams(max_tokens=outputs, ignore_eos=True, extra_args=extra)
        request = Request(f"r{self.number}", list(range(1000, 1100)), params, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)

    def step(self) -> float:
        """Seconds that `schedule` took."""
        began = time.perf_counter()
        output = self.scheduler.schedule()
        took = time.perf_counter() - began
        ids, requests = list(output.num_scheduled_tokens), self.scheduler.requests
        tokens = [[7] if requests[i].num_computed_tokens >= requests[i].num_prompt_tokens else [] for i in ids]
        done = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens)
        done.ttt = StepReport(pending=100, busy=True)  # type: ignore[attr-defined]
        self.scheduler.update_from_output(output, done)
        return took


def measure(model: str, policy: str, held: int) -> str:
    engine = Engine(model, policy)
    engine.send(None, outputs=900)
    for i in range(SESSIONS):
        engine.send(f"s{i}")
    for _ in range(10):
        engine.step()
    began = time.perf_counter()
    for i in range(held):
        engine.send(f"s{i % SESSIONS}")
    arrival = (time.perf_counter() - began) / max(1, held)
    assert engine.scheduler.get_num_unfinished_requests() == held + 1
    gc.collect()
    gc.freeze()  # as vLLM's engine core does once it has started
    times = sorted(engine.step() for _ in range(STEPS))
    gc.unfreeze()
    late = 1e3 * times[STEPS * 99 // 100]
    steps = f"schedule() {1e3 * median(times):.3f} ms, 99th percentile {late:.3f} ms"
    return f"{policy}, {held} held: {steps}; an arrival {1e6 * arrival:.0f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    args = parser.parse_args()
    for policy in ("fcfs", "priority"):
        for held in (0, 1000, 4000):
            print(measure(args.model, policy, held), flush=True)


if __name__ == "__main__":
    main()
