"""What a session's cache costs while it answers: milliseconds per token with it, and with `ttt_cache: 0`, in turns.

    python loadtests/cache_cost.py                       the demo's model: the fewer layers, the more a cache weighs
    python loadtests/cache_cost.py demo/real/smollm2

One session is sent so many tokens of random words first, so that contexts branch. Both ways it then answers the same prompts,
which are pieces of what it was sent, and learns nothing. Told are medians over the rounds, and the median of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from statistics import median
from typing import Any

import httpx
from runs import EAGER, HERE, about, save, served

CONFIG: dict[str, Any] = {"cache": {"orders": 6}, "guard": {"every": 0, "hourly_tokens": 0, "hourly_tokens_per_key": 0}}
PIECE, WORDS = 1000, 400


def text(tokens: int) -> list[int]:
    """Words of a few tokens each, in a random order: after most tokens the cache knows several."""
    draw = random.Random(0)
    words = [[draw.randrange(300, 4000) for _ in range(draw.randint(1, 3))] for _ in range(WORDS)]
    found: list[int] = []
    while len(found) < tokens:
        found += draw.choice(words)
    return found[:tokens]


def per_token(http: httpx.Client, body: dict[str, Any], xargs: dict[str, int]) -> float:
    """Seconds from the first token of an answer to the last, for each."""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True, "vllm_xargs": xargs}) as stream:
        stream.raise_for_status()
        events = (line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {"))
        times = [time.perf_counter() for event in events if json.loads(event).get("choices")]
    return (times[-1] - times[0]) / (len(times) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="instead of the demo's")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--name", default="cache-cost")
    args = parser.parse_args()
    flags = [args.model, "--served-model-name", "demo", *EAGER[1:-3], "--enforce-eager"] if args.model else EAGER
    told, sent, rows = about("cache_cost.py"), text(args.tokens), []
    with served(flags, CONFIG) as url, httpx.Client(base_url=url, timeout=3600, trust_env=False) as http:
        body: dict[str, Any] = {"model": "demo", "session_id": "s", "temperature": 0, "ignore_eos": True}
        for start in range(0, len(sent), PIECE):
            piece = sent[max(0, start - 1) : start + PIECE]
            http.post("/v1/completions", json={**body, "prompt": piece, "max_tokens": 1}).raise_for_status()
        http.post("/v1/completions", json={**body, "prompt": sent[:10], "max_tokens": 1}).raise_for_status()  # all is learned
        state = http.get("/v1/ttt/sessions/s").raise_for_status().json()
        body["max_tokens"] = args.answer
        for number in range(args.rounds + 1):
            body["prompt"] = sent[50 * number : 50 * number + 40]
            ways = {"without": {"ttt_learn": 0, "ttt_cache": 0}, "with": {"ttt_learn": 0}}
            order = list(ways) if number % 2 else list(ways)[::-1]
            found = {way: 1e3 * per_token(http, body, ways[way]) for way in order}
            if number:  # the first one warms up
                rows.append(found)
    ratio = median(row["with"] / row["without"] for row in rows)
    lines = [
        f"The cache remembers {state['cache_tokens']:,} tokens.\n",
        "| | ms per token |", "| --- | --- |",
        *(f"| {way} | {median(row[way] for row in rows):.3f} |" for way in ("without", "with")),
        f"\nRatio: {ratio:.3f}.",
    ]  # fmt: skip
    told |= {"server": "vllm serve " + " ".join(flags) + " --plugin ttt", "cache_tokens": state["cache_tokens"], "rows": rows}
    save("What a session's cache costs while it answers", told, "\n".join(lines), HERE / "results", args.name)


if __name__ == "__main__":
    main()
