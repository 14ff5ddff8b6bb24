"""--tensor-parallel-size N beside one rank: both learn the same texts, and each serves what the other has saved.

    python loadtests/ranks.py demo/model --ranks 2                                   # CUDA: two GPUs
    VLLM_CPU_OMP_THREADS_BIND='0|1' python loadtests/ranks.py demo/model --ranks 2   # CPU: two cores

Each arm is an engine in a process of its own (`LLM`): one rank, which learns and saves; N ranks, which serve what that has
saved and learn the same; one rank, which serves what those have saved; stock vLLM with N ranks, for the bits of requests
without a session. With --dummy weights the tokens are random: look at times alone.

Writes one JSON object: relative errors of B by module, the largest difference of losses and of scores, whether base bits are
stock's, milliseconds that a tile takes, and how long each arm took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Tokens of each request; they are learned one after the other. Then a text that is only scored.
LENGTHS, SCORED = (1500, 900, 517), 400
NAMES = {"one": "learned by one rank", "several": "learned by several"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", default="deep", choices=("deep", "last"))
    parser.add_argument("--config", default=None, help="of vllm-ttt, YAML")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dummy", action="store_true", help="random weights of the model's shape")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--kv-gib", type=float, default=2.0)
    parser.add_argument("--texts", default="demo/texts/kjv", help="a folder of .txt files")
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--arm", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--state", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm is not None:
        print("RESULT " + json.dumps(run(args)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="ranks-") as state:
        arms = {arm: started(arm, state) for arm in ("one", "several", "again", "stock")}
        print(json.dumps(compared(arms, Path(state)), indent=1))


def started(arm: str, state: str) -> dict[str, Any]:
    """The result of an arm, in a process of its own."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--state", state]
    environment = dict(os.environ)
    if arm in ("one", "again"):  # it has all the cores that the ranks have
        environment["VLLM_CPU_OMP_THREADS_BIND"] = environment.get("VLLM_CPU_OMP_THREADS_BIND", "auto").replace("|", ",")
    found: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as arm_process:
        assert arm_process.stdout is not None
        for line in arm_process.stdout:  # vLLM's log goes there, too
            if line.startswith("RESULT "):
                found.append(line)
            else:
                print(line, end="", file=sys.stderr, flush=True)
    if arm_process.returncode or not found:
        sys.exit(f"the arm {arm} failed ({arm_process.returncode}); its log is above")
    return {**json.loads(found[-1].removeprefix("RESULT ")), "seconds": round(time.perf_counter() - begin, 1)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM

    import vllm_ttt
    from vllm_ttt.config import load_config, parse_config

    options: dict[str, Any] = {}
    if args.arm != "stock":
        config = parse_config(None, args.preset) if args.config is None else load_config(args.config, args.preset)
        sessions = config.sessions.model_copy(update={"state_dir": args.state, "resident": 4})
        options = vllm_ttt.engine_args(config=config.model_copy(update={"sessions": sessions}))
    llm = LLM(
        model=args.model, dtype=args.dtype, max_model_len=2048, kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        tensor_parallel_size=1 if args.arm in ("one", "again") else args.ranks, enforce_eager=args.eager,
        load_format="dummy" if args.dummy else "auto", skip_tokenizer_init=args.dummy, **options, **json.loads(args.options),
    )  # fmt: skip
    *learned, probe = texts(llm, args)
    found: dict[str, Any] = {"base": scores(llm, probe, None)}
    if args.arm in ("one", "several"):
        for text in learned:
            scores(llm, text, NAMES[args.arm].replace(" ", "-"), learn=True)
    if args.arm != "stock":
        known = [args.arm] if args.arm == "one" else list(NAMES)
        found["scores"] = {name: scores(llm, probe, NAMES[name].replace(" ", "-")) for name in known}
        found["base beside sessions"] = scores(llm, probe, None)
        (status, *_) = llm.collective_rpc("ttt_status")
        found |= {key: status[key] for key in ("tokens_learned", "errors", "tile_ms")}
    return found


def texts(llm: Any, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of what is learned, and of what is scored."""
    lengths = (*LENGTHS, SCORED)
    if args.dummy:
        import random

        random.seed(0)
        return [[random.randrange(100, 5000) for _ in range(n)] for n in lengths]
    read = (file.read_text(encoding="utf-8") for file in sorted(Path(args.texts).glob("*.txt")))
    return [llm.get_tokenizer().encode(text)[:n] for text, n in zip(read, lengths, strict=False)]


def scores(llm: Any, ids: list[int], session: str | None, learn: bool = False) -> list[float]:
    """Log-probabilities of a text, and of what follows."""
    from vllm import SamplingParams

    extra = {} if session is None else {"session_id": session, "ttt_learn": int(learn)}
    params = SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=0, logprobs=0, ignore_eos=True, extra_args=extra)
    (answer,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    at = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return [position[token].logprob for position, token in zip(at, [*ids[1:], *answer.outputs[0].token_ids], strict=True)]


def compared(arms: dict[str, dict[str, Any]], state: Path) -> dict[str, Any]:
    from vllm_ttt.sessions.offline import Offline

    opened = Offline(state)
    one, several = (opened._newest(name.replace(" ", "-")) for name in NAMES.values())
    errors = {
        name: round(((several[1][name] - b).norm() / b.norm()).item(), 6)
        for name, b in one[1].items()
        if name in opened.geometry.shapes
    }
    losses = [[chunk["loss"] for chunk in saved.state["losses"]] for saved, _ in (one, several)]
    far = lambda x, y: max(abs(a - b) for a, b in zip(x, y, strict=True))  # noqa: E731
    two = arms["several"]
    return {
        "versions": [one[0].version, several[0].version],
        "relative error of B, largest": max(errors.values()),
        "relative error of B": errors,
        "losses, largest difference": far(*losses),
        "scores of what one rank learned, served by several: largest difference": far(
            arms["one"]["scores"]["one"], two["scores"]["one"]
        ),
        "scores of what several learned, served by one: largest difference": far(
            two["scores"]["several"], arms["again"]["scores"]["several"]
        ),
        "gain on the scored text, nats a token": {
            name: (sum(two["scores"][name]) - sum(two["base"])) / len(two["base"]) for name in NAMES
        },
        "base bits are stock's": two["base"] == two["base beside sessions"] == arms["stock"]["base"],
        "tile_ms": {arm: arms[arm]["tile_ms"] for arm in ("one", "several")},
        "tokens_learned": [arms[arm]["tokens_learned"] for arm in ("one", "several")],
        "errors": [arms[arm]["errors"] for arm in ("one", "several")],
        "seconds": {arm: found["seconds"] for arm, found in arms.items()},
    }


if __name__ == "__main__":
    main()
