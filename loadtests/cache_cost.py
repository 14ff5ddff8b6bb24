"""What a session's cache costs while it answers: milliseconds per token with it, and with `ttt_cache: 0`, in turns.

    python loadtests/cache_cost.py                       the demo's model: the fewer layers, the more a cache weighs
    python loadtests/cache_cost.py demo/real/smollm2

One session is sent so many tokens of the demo's texts first. Both ways it then answers the same prompts, which are pieces of
what it was sent, and learns nothing. Told are, of both ways, the median over the rounds of an answer's mean time per token, and
the median of all times between two tokens, which other work on the machine moves less.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import httpx
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


def gaps(http: httpx.Client, body: dict[str, Any], xargs: dict[str, int]) -> list[float]:
    """Milliseconds between the tokens of an answer."""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True, "vllm_xargs": xargs}) as stream:
        stream.raise_for_status()
        events = (line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {"))
        times = [1e3 * time.perf_counter() for event in events if json.loads(event).get("choices")]
    return [later - earlier for earlier, later in pairwise(times)]


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
        body["max_tokens"] = args.answer
        apart = (len(sent) - 40) // (args.rounds + 1)
        for number in range(args.rounds + 1):
            body["prompt"] = sent[apart * number : apart * number + 40]
            ways = {"without": {"ttt_learn": 0, "ttt_cache": 0}, "with": {"ttt_learn": 0}}
            order = list(ways) if number % 2 else list(ways)[::-1]
            found = {way: gaps(http, body, ways[way]) for way in order}
            if number:  # the first one warms up
                rows.append(found)
    if state["cache_tokens"] < 0.9 * args.tokens:
        raise SystemExit(f"the cache remembers {state['cache_tokens']} tokens alone")
    means = {way: [fmean(row[way]) for row in rows] for way in ("without", "with")}
    gap = {way: median(x for row in rows for x in row[way]) for way in means}
    ratio = median(a / b for a, b in zip(means["with"], means["without"], strict=True))
    lines = [
        f"The cache remembers {state['cache_tokens']:,} tokens; {args.rounds} rounds of {args.answer} tokens.\n",
        "| | ms per token, median of answers | median of the times between two tokens |", "| --- | --- | --- |",
        *(f"| {way} | {median(means[way]):.3f} | {gap[way]:.3f} |" for way in means),
        f"| ratio | {ratio:.3f} (median of the rounds' ratios) | {gap['with'] / gap['without']:.3f} |",
    ]  # fmt: skip
    told |= {
        "server": "vllm serve " + " ".join(flags) + " --plugin ttt",
        "cache_tokens": state["cache_tokens"],
        "means": means,
        "gaps": gap,
    }
    save("What a session's cache costs while it answers", told, "\n".join(lines), HERE / "results", args.name)


if __name__ == "__main__":
    main()
