"""What the step's products in FP8 (`learn.fp8`) change of what a session gains, by the plain loops, without vLLM.

    python loadtests/fp8_curves.py demo/real/smollm2 FOLDER... [--domains a,b] [--requests 10] [--out FILE.json]

Each FOLDER has a folder of .txt files for each domain. Protocol p2 of `vllm-ttt eval`, one session of each domain, products
with the model's weights in bfloat16 as on a GPU. Every request is scored by the frozen model, by a session that learns so, and
by one whose steps multiply in E4M3 with a scale for each row; what serves is in bfloat16 in either case. The first request of
every domain, then the second, and so on; some fifteen seconds a request of SmolLM2 on two cores that know bfloat16.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cache_gain import parser_of
from torch import Tensor

from vllm_ttt.config import parse_config
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.fp8 import in_dtype, in_fp8
from vllm_ttt.eval.oracle import KV, Oracle, Stack
from vllm_ttt.eval.protocols import SCORED, plan
from vllm_ttt.eval.texts import encode, read_texts


class Session(Oracle):
    """It serves with one stack and learns with another. What it serves is computed once: to be scored, and to be learned."""

    kept: tuple[list[int], int, Any] = [], -1, None

    def __init__(self, frozen: Oracle, served: Stack, learned: Stack):
        super().__init__(frozen.model, frozen.config)
        self.stack = self.plain = served
        self.learned = learned

    def served(self, ids: list[int]) -> tuple[Tensor, list[KV]]:
        if self.kept[:2] != (ids, self.version):
            self.kept = ids, self.version, super().served(ids)
        return self.kept[2]

    def step(self, *args: Any) -> float:
        self.stack, self.kept = self.learned, ([], -1, None)
        try:
            return super().step(*args)
        finally:
            self.stack = self.plain


def agreement(one: Oracle, other: Oracle) -> float:
    """Mean cosine of the deltas of both, over the modules."""
    pairs = [(a[k], b[k]) for a, b in zip(one.B, other.B, strict=True) for k in a]
    return fmean(torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in pairs)


def read(scorer: OracleScorer, plain: Session, fp8: Session, ids: list[int]) -> dict[str, float]:
    """Mean losses of one request, which is learned afterwards."""
    plain.activations(ids)
    fp8._seen = scorer.frozen._seen = plain._seen
    losses = {"frozen": scorer.frozen.score(ids), "plain": plain.score(ids), "fp8": fp8.score(ids)}
    row = {name: loss[-SCORED:].mean().item() for name, loss in losses.items()}
    plain.learn(ids)
    first = fp8.learn(ids)[0]
    row["step's loss off by"] = first - losses["fp8"][: scorer.config.learn.chunk].mean().item()
    return row | {"cosine": agreement(plain, fp8), "rate": plain.rate, "rate_fp8": fp8.rate}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    gains = {d: [fmean(r["frozen"] - r[k] for r in rows[1:]) for k in ("plain", "fp8")] for d, rows in found.items()}
    gains["mean"] = [fmean(x) for x in zip(*gains.values(), strict=True)]
    lines = [f"| {d} | {one:.4f} | {other:.4f} | {other - one:+.4f} |" for d, (one, other) in gains.items()]
    return "\n".join(("| domain | gain | in FP8 | difference |", "| --- | --- | --- | --- |", *lines))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    scorer = OracleScorer(args.model, parse_config(None, args.preset))
    texts = {
        name: x for folder in args.texts for name, x in read_texts(folder).items() if not args.domains or name in args.domains
    }
    work = plan("p2", asyncio.run(encode(texts, scorer.tokenize)), 1, args.requests)
    frozen, model = scorer.frozen, scorer.frozen.stack
    served, rounded = in_dtype(model, torch.bfloat16), in_fp8(model, torch.bfloat16)
    frozen.stack, rounded = served, replace(rounded, head=served.head)
    sessions = [(Session(frozen, served, served), Session(frozen, served, rounded)) for _ in work.domains]
    found: dict[str, list[dict[str, float]]] = {domain: [] for domain in work.domains}
    for i in range(args.requests):
        for domain, windows, oracles in zip(work.domains, work.windows, sessions, strict=True):
            found[domain].append(read(scorer, *oracles, windows[i]))
            print(domain, i + 1, {name: round(x, 4) for name, x in found[domain][-1].items()}, flush=True)
        if i:
            print(table(found), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
