"""What learning costs a client on the CPU backend: times to answers of 1,024-token requests, side by side on one server.

    python loadtests/bench_cpu.py [--requests 20] [--compiled] [--base-url http://127.0.0.1:8000] [--json FILE]

The server is `vllm serve demo/model --plugin ttt`, or the one at --base-url. The arms take turns, and every prompt is new,
so that no prefix cache helps.

* With pauses: one request at a time, each after everything before it has been learned. Base; in a session with ttt_learn 0;
  in a session that learns.
* Back to back: blocks of requests of one session, each sent when the one before is answered. A learned one waits until its
  predecessor has been learned. The first of a block waits for nothing and is not counted.

    python loadtests/bench_cpu.py --config '{guard: {every: 0}}' --against '{guard: {every: 0}, adapt: {preset: last}}'

What a setting costs: two servers take turns with blocks of learned requests, back to back, each timed until all of it has been
learned; the ratio is the median over the turns.

A dated JSON and a Markdown table are written to loadtests/results.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from runs import DEMO, EAGER, HERE, SERVE, about, save, served

from vllm_ttt.eval.texts import read_texts

#: Pairs of a request: it sends one token more.
TOKENS = 1024
#: Counted requests of a back-to-back block.
BLOCK = 5
#: name: (numerator, denominator, the most that is meant)
RATIOS = {
    "learned / unlearned, with pauses": ("learned", "unlearned", 1.25),
    "learned / base, with pauses": ("learned", "base", None),
    "unlearned / base, with pauses": ("unlearned", "base", None),
    "learned / unlearned, back to back": ("learned back to back", "unlearned back to back", 2.0),
}


class Bench:
    """``prompts`` never ends, and no two of its prompts begin alike."""

    def __init__(self, url: str, max_tokens: int):
        self.http = httpx.Client(base_url=url, timeout=300, trust_env=False)
        self.model: str = self.http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        self.max_tokens = max_tokens
        self.prompts = self._prompts()
        self.session = f"bench-{os.getpid()}-{int(time.time())}"
        self.times: dict[str, list[float]] = {}

    def _prompts(self) -> Iterator[list[int]]:
        texts = [self._tokens(text) for domain in read_texts(DEMO / "texts").values() for text in domain[:2]]
        windows = [ids[start : start + TOKENS - 1] for ids in texts for start in range(0, len(ids) - TOKENS, TOKENS)]
        for i, window in zip(itertools.count(), itertools.cycle(windows)):
            yield [10 + i // 64 % 64, 10 + i % 64, *window]

    def _tokens(self, text: str) -> list[int]:
        body = {"model": self.model, "prompt": text}
        return self.http.post("/tokenize", json=body).raise_for_status().json()["tokens"]

    def send(self, learn: bool | None) -> float:
        """Seconds to the answer; ``learn`` None: of the base model."""
        prompt = next(self.prompts)
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": self.max_tokens, "ignore_eos": True}
        if learn is not None:
            body |= {"session_id": self.session, "vllm_xargs": {"ttt_learn": int(learn)}}
        began = time.perf_counter()
        answer = self.http.post("/v1/completions", json=body)
        seconds = time.perf_counter() - began
        answer.raise_for_status()
        accepted = answer.json().get("ttt", {}).get("tokens_learned", 0)
        if accepted != (TOKENS if learn else 0):
            sys.exit(f"{accepted} of {TOKENS} tokens were accepted for learning: is the server one with --plugin ttt?")
        return seconds

    def pause(self) -> None:
        """Until all that was sent has been learned."""
        while self.pending():
            time.sleep(0.01)
        time.sleep(0.1)

    def warm_up(self) -> None:
        for learn in (None, False, True, True):
            self.send(learn)

    def block(self) -> float:
        """Seconds that learned requests take, one after another, until everything has been learned."""
        self.pause()
        began = time.perf_counter()
        for _ in range(BLOCK):
            self.send(True)
        while self.pending():
            time.sleep(0.002)
        return time.perf_counter() - began

    def pending(self) -> bool:
        """Whether something that was sent has not been learned."""
        session = self.http.get(f"/v1/ttt/sessions/{self.session}").raise_for_status().json()
        return session["tokens_learned"] + sum(session["tokens_skipped"].values()) != session["tokens_seen"]

    def run(self, requests: int) -> None:
        self.warm_up()
        for _ in range(requests):
            for arm, learn in (("base", None), ("unlearned", False), ("learned", True)):
                self.pause()
                self.times.setdefault(arm, []).append(self.send(learn))
        for _ in range(-(-requests // BLOCK)):
            for arm, learn in (("unlearned back to back", False), ("learned back to back", True)):
                self.pause()
                self.send(learn)
                self.times.setdefault(arm, []).extend(self.send(learn) for _ in range(min(BLOCK, requests)))
        self.pause()
        learned = self.http.get(f"/v1/ttt/sessions/{self.session}").json()
        assert not learned["tokens_skipped"], f"not everything was learned: {learned['tokens_skipped']}"
        self.http.delete(f"/v1/ttt/sessions/{self.session}").raise_for_status()


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    arms = {arm: {"median_s": median(s), "quartiles_s": quantiles(s, n=4)[::2], "seconds": s} for arm, s in times.items()}
    ratios = {
        name: {"ratio": arms[a]["median_s"] / arms[b]["median_s"], "target": target} for name, (a, b, target) in RATIOS.items()
    }
    return {"arms": arms, "ratios": ratios}


def table(report: dict[str, Any]) -> str:
    lines = ["| arm | median ms | quartiles ms | requests |", "| --- | --- | --- | --- |"]
    for arm, x in report["arms"].items():
        low, high = (f"{1e3 * q:.0f}" for q in x["quartiles_s"])
        lines.append(f"| {arm} | {1e3 * x['median_s']:.0f} | {low} - {high} | {len(x['seconds'])} |")
    lines += ["", "| ratio of medians | measured | at most |", "| --- | --- | --- |"]
    for name, x in report["ratios"].items():
        lines.append(f"| {name} | {x['ratio']:.2f} | {x['target'] or ''} |")
    return "\n".join(lines)


def against(one: Bench, other: Bench, turns: int) -> dict[str, Any]:
    """Blocks of two servers in turns; each turn has the other order."""
    pairs = []
    for bench in (one, other):
        bench.warm_up()
    for turn in range(turns):
        pairs.append((one.block(), other.block()) if turn % 2 == 0 else (other.block(), one.block())[::-1])
        print(f"{turn + 1} of {turns}: {pairs[-1][0]:.2f} s, {pairs[-1][1]:.2f} s", file=sys.stderr)
    ratios = [a / b for a, b in pairs]
    return {"seconds": pairs, "ratio": median(ratios), "quartiles": quantiles(ratios, n=4)[::2]}


def paired_table(report: dict[str, Any]) -> str:
    medians = [median(x) for x in zip(*report["seconds"], strict=True)]
    low, high = report["quartiles"]
    return (
        f"| {BLOCK} learned requests of {TOKENS:,} tokens, until all is learned | |\n| --- | --- |\n"
        f"| with {report['config']}: median ms a request | {1e3 * medians[0] / BLOCK:.0f} |\n"
        f"| with {report['against']} | {1e3 * medians[1] / BLOCK:.0f} |\n"
        f"| ratio, median over {len(report['seconds'])} turns (quartiles) | {report['ratio']:.3f} ({low:.3f} - {high:.3f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="of each arm; at least 2")
    parser.add_argument("--max-tokens", type=int, default=1, help="tokens of an answer")
    parser.add_argument("--base-url", help="a server that runs; default: one is started")
    parser.add_argument("--config", default="{}", help="vllm-ttt's settings for the server, as YAML")
    parser.add_argument("--against", help="the same for a second server, with which it takes turns")
    parser.add_argument("--compiled", action="store_true", help="start the server without --enforce-eager")
    parser.add_argument("--json", help="write the figures here, too")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder for the dated JSON and Markdown")
    args = parser.parse_args()
    report, flags = about("bench_cpu.py"), SERVE if args.compiled else EAGER
    with contextlib.ExitStack() as stack:
        if args.base_url is None:
            report["server"] = "vllm serve demo/model --plugin ttt " + " ".join(flags[1:])
        bench = Bench(stack.enter_context(served(flags, args.config, args.base_url)), args.max_tokens)
        if args.against is not None:
            other = Bench(stack.enter_context(served(flags, args.against)), args.max_tokens)
            report |= {"config": args.config, "against": args.against, **against(bench, other, args.requests)}
        else:
            bench.run(args.requests)
            report |= figures(bench.times)
    kind = "-against" if args.against is not None else "-compiled" if args.compiled else ""
    body = table(report) if args.against is None else paired_table(report)
    file = save("Learning on the CPU", report, body, args.out, f"cpu{kind}")
    if args.json:
        Path(args.json).write_text(file.read_text())


if __name__ == "__main__":
    main()
