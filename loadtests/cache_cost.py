"""What a session's cache costs while it answers: milliseconds per token with it, and with `ttt_cache: 0`, in turns.

    python loadtests/cache_cost.py                       the demo's model: the fewer layers, the more a cache weighs
    python loadtests/cache_cost.py demo/real/smollm2

One session is sent so many tokens of the demo's texts first. Both ways it then answers the same prompts, which are pieces of
what it was sent, and learns nothing. Told are, of both ways, the median of the answers' times per token, and the median of the
rounds' ratios: by the clock, as vLLM's engine core takes it (`vllm:request_decode_time_seconds`), and in time on the processor,
of all processes of the server, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import re
import time
from statistics import median
from typing import Any

import httpx
import psutil
from runs import DEMO, EAGER, HERE, about, save, served

from vllm_ttt.eval.texts import read_texts

CONFIG: dict[str, Any] = {"cache": {"orders": 6}, "guard": {"every": 0, "hourly_tokens": 0, "hourly_tokens_per_key": 0}}
PIECE = 1000


def text(http: httpx.Client, tokens: int) -> list[int]:
    """So many tokens of the demo's texts: documents of all domains in turns."""
    found: list[int] = []
    for documents in zip(*read_texts(DEMO / "texts").values(), strict=False):
        for document in documents:
            found += http.post("/tokenize", json={"model": "demo", "prompt": document}).raise_for_status().json()["tokens"]
    if len(found) < tokens:
        raise SystemExit(f"the demo's texts have {len(found)} tokens")
    return found[:tokens]


class Meter:
    """What answers of the server, a child of this process, take."""

    def __init__(self, http: httpx.Client):
        self.http, self.processes = http, psutil.Process().children(recursive=True)

    def ask(self, body: dict[str, Any], knobs: dict[str, int]) -> dict[str, float]:
        """Milliseconds of each token but the first: by the clock, and on the processor (there of all tokens)."""
        before, used = self.decoded(), self.used()
        self.http.post("/v1/completions", json={**body, "vllm_xargs": knobs}).raise_for_status()
        used, after = self.used() - used, self.decoded()
        while after[1] == before[1]:
            time.sleep(0.05)
            after = self.decoded()
        return {"clock": 1e3 * (after[0] - before[0]) / (body["max_tokens"] - 1), "processor": 1e3 * used / body["max_tokens"]}

    def decoded(self) -> tuple[float, float]:
        """Seconds of decoding so far, and requests."""
        found = re.findall(
            r"^vllm:request_decode_time_seconds_(sum|count)\{.*\} (.*)$", self.http.get("/metrics").text, re.MULTILINE
        )
        return sum(float(x) for name, x in found if name == "sum"), sum(float(x) for name, x in found if name == "count")

    def used(self) -> float:
        """Seconds on the processor so far."""
        times = [process.cpu_times() for process in self.processes]
        return sum(x.user + x.system for x in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="instead of the demo's")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--name", default="cache-cost")
    args = parser.parse_args()
    flags = [args.model, "--served-model-name", "demo", *EAGER[1:-3], "--enforce-eager"] if args.model else EAGER
    told, rows = about("cache_cost.py"), []
    with served(flags, CONFIG) as url, httpx.Client(base_url=url, timeout=3600, trust_env=False) as http:
        sent = text(http, args.tokens)
        body: dict[str, Any] = {"model": "demo", "session_id": "s", "temperature": 0, "ignore_eos": True}
        for start in range(0, len(sent), PIECE):
            piece = sent[max(0, start - 1) : start + PIECE]
            http.post("/v1/completions", json={**body, "prompt": piece, "max_tokens": 1}).raise_for_status()
        http.post("/v1/completions", json={**body, "prompt": sent[:10], "max_tokens": 1}).raise_for_status()  # all is learned
        state = http.get("/v1/ttt/sessions/s").raise_for_status().json()
        body["max_tokens"], meter = args.answer, Meter(http)
        apart = (len(sent) - 40) // (args.rounds + 1)
        for number in range(args.rounds + 1):
            body["prompt"] = sent[apart * number : apart * number + 40]
            ways = {"without": {"ttt_learn": 0, "ttt_cache": 0}, "with": {"ttt_learn": 0}}
            order = list(ways) if number % 2 else list(ways)[::-1]
            found = {way: meter.ask(body, ways[way]) for way in order}
            if number:  # the first one warms up
                rows.append(found)
    if state["cache_tokens"] < 0.9 * args.tokens:
        raise SystemExit(f"the cache remembers {state['cache_tokens']} tokens alone")
    lines = [
        f"The cache remembers {state['cache_tokens']:,} tokens; {args.rounds} rounds of {args.answer} tokens.\n",
        "| ms per token | without | with | ratio |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for what in ("clock", "processor"):
        without, with_it = ([row[way][what] for row in rows] for way in ("without", "with"))
        ratio = median(a / b for a, b in zip(with_it, without, strict=True))
        lines.append(f"| {what} | {median(without):.3f} | {median(with_it):.3f} | {ratio:.3f} |")
    told |= {"server": "vllm serve " + " ".join([args.model or "demo/model", *flags[1:]]) + " --plugin ttt"}
    told |= {"cache_tokens": state["cache_tokens"], "rows": rows}
    save("What a session's cache costs while it answers", told, "\n".join(lines), HERE / "results", args.name)


if __name__ == "__main__":
    main()
