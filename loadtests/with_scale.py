"""What version 1's scale would add to version 2 of the step: a session is served with a multiple of its delta, by past losses.

    python loadtests/with_scale.py demo/real/smollm2 TEXTS [--domains kjv,legal_a]

Version 1 measured the loss of each request under several multiples of the delta. It served with their mean, weighted by
exp(-200 x past nats), of which each request left three quarters. The oracle does the same here, without vLLM. Each domain gives
two sessions: ten of its documents, and five of them followed by five of the next domain. Printed: the gain over the frozen
model of requests 2 to 10 with the delta as it is, with the scale, and with the best multiple that hindsight could choose.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import torch

from vllm_ttt.config import parse_config
from vllm_ttt.eval.oracle import Oracle, load_model
from vllm_ttt.eval.texts import read_texts

SCALES, RATE, MEMORY, WINDOW = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25), 200.0, 0.75, 1024
#: As in version 1, one request moves two multiples apart by no more.
SPREAD = 0.04


@torch.no_grad()
def loss(oracle: Oracle, ids: list[int], scale: float) -> float:
    """Mean loss of a request, served with so many times the delta."""
    kept = oracle.B
    oracle.B = [{name: scale * b for name, b in layer.items()} for layer in kept]
    try:
        return oracle.score(ids).mean().item()
    finally:
        oracle.B = kept


def session(oracle: Oracle, requests: list[list[int]]) -> list[dict[str, float]]:
    """Gains of each request: as it is, with the scale, and with the best multiple."""
    past, found = [0.0] * len(SCALES), []
    for ids in requests:
        at = [loss(oracle, ids, scale) for scale in SCALES] if oracle.version else [loss(oracle, ids, 0.0)] * len(SCALES)
        weights = [math.exp(-RATE * (p - min(past))) for p in past]
        scale = sum(w * s for w, s in zip(weights, SCALES, strict=True)) / sum(weights)
        scaled = loss(oracle, ids, scale) if oracle.version else at[0]
        found.append({"plain": at[0] - at[4], "scaled": at[0] - scaled, "best": at[0] - min(at), "scale": scale})
        shrink = min(1.0, SPREAD / max(max(at) - min(at), 1e-12))
        past = [MEMORY * p + shrink * (x - min(at)) for p, x in zip(past, at, strict=True)]
        oracle.learn(ids)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts")
    parser.add_argument("--domains", help="comma-separated; default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer, model, config = AutoTokenizer.from_pretrained(args.model), load_model(args.model), parse_config(None, "deep")
    wanted = args.domains.split(",") if args.domains else None
    texts = {name: found for name, found in read_texts(args.texts).items() if wanted is None or name in wanted}
    documents = {n: [tokenizer(t, verbose=False)["input_ids"][:WINDOW] for t in found[:10]] for n, found in texts.items()}
    names, results = list(documents), dict[str, list[list[dict[str, float]]]]()
    for i, name in enumerate(names):
        after = documents[names[(i + 1) % len(names)]]
        for kind, requests in {"one domain": documents[name], "a change": [*documents[name][:5], *after[:5]]}.items():
            results.setdefault(kind, []).append(session(Oracle(model, config), requests))
            print(kind, name, json.dumps(results[kind][-1]), flush=True)
    print("| | plain | scaled | best in hindsight | worst: plain | scaled | harmed by over 0.005: plain | scaled |")
    print("| --- " * 8 + "|")
    for kind, sessions in results.items():
        rows = [row for found in sessions for row in found[1:]]
        mean, worst, harmed = (
            {key: function([row[key] for row in rows]) for key in ("plain", "scaled", "best")}
            for function in (fmean, min, lambda gains: fmean(gain < -0.005 for gain in gains))
        )
        print(
            f"| {kind} | {mean['plain']:.4f} | {mean['scaled']:.4f} | {mean['best']:.4f} | {worst['plain']:+.3f} "
            f"| {worst['scaled']:+.3f} | {harmed['plain']:.0%} | {harmed['scaled']:.0%} |"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
