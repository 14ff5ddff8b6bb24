"""How long a server takes to start with vllm-ttt, and how long stock vLLM does: seconds until /health answers 200.

    python loadtests/start_time.py demo/real/smollm2 [--rounds 3]

Each round starts both, with `--enforce-eager` and compiled; compiled with a cache of compiled code that is empty, and with one
that an earlier start has filled. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from runs import HERE, about, save

from vllm_ttt.eval import server

FLAGS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**29), "--dtype", "float32"]
ARMS = {"stock": [], "vllm-ttt": ["--plugin", "ttt"]}


def start(model: str, flags: list[str], cache: str) -> float:
    """Seconds from the command to the first good answer of /health."""
    with tempfile.TemporaryDirectory() as folder:
        port, log = server.free_port(), Path(folder) / "log"
        os.environ |= {"VLLM_CACHE_ROOT": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        command = [str(Path(sys.executable).with_name("vllm")), "serve", model, *FLAGS, *flags]
        began = time.perf_counter()
        with server.process_group([*command, "--host", "127.0.0.1", "--port", str(port)], log) as process:
            server.wait_healthy(process, port, log)
            return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(HERE / "out"))
    args = parser.parse_args()
    run, times = about("start_time.py"), dict[str, dict[str, list[float]]]()
    kinds = {"eager": ["--enforce-eager"], "compiled, empty cache": [], "compiled, filled cache": []}
    for _ in range(args.rounds):
        for arm, flags in ARMS.items():
            with tempfile.TemporaryDirectory() as cache:
                for kind, more in kinds.items():
                    seconds = start(args.model, [*flags, *more], cache)
                    times.setdefault(kind, {}).setdefault(arm, []).append(seconds)
                    print(f"{kind}, {arm}: {seconds:.1f} s", flush=True)
    lines = ["| | stock, s | vllm-ttt, s | more |", "| --- | --- | --- | --- |"]
    for kind, arms in times.items():
        stock, ours = (median(arms[arm]) for arm in ARMS)
        lines.append(f"| {kind} | {stock:.1f} | {ours:.1f} | {ours - stock:+.1f} |")
    save("How long a server takes to start", run | {"times": times}, "\n".join(lines), args.out, "start-time")


if __name__ == "__main__":
    main()
