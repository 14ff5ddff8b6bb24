"""What the step's products in FP8 (`learn.fp8`), or slots in 8 bits, change of what a session gains, by the plain loops.

    python loadtests/fp8_curves.py demo/real/smollm2 FOLDER... [--ways back both slots] [--domains a b] [--requests 10]
        [--dtype bfloat16] [--out FILE]

Each FOLDER has a folder of .txt files for each domain. Protocol p2 of `vllm-ttt eval`, one session of each domain, products
with the model's weights in bfloat16 as on a GPU. Every request is scored by the frozen model, by a session that learns so, and
by one whose steps multiply in FP8 for each of `--ways`; what serves is in bfloat16 in every case. "slots" is another way: steps
are as they were, and what serves has B in int8 with a scale for each row, as on CUDA. The first request of each domain, then
the second, and so on; some ten seconds for a session's request of SmolLM2 on a core that knows bfloat16, thirty with
`--dtype float32` on another.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
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
from vllm_ttt.eval.int8 import rounded
from vllm_ttt.eval.oracle import KV, Oracle, Stack
from vllm_ttt.eval.protocols import SCORED, plan
from vllm_ttt.eval.texts import encode, read_texts

Row = dict[str, float]


class Session(Oracle):
    """It serves with one stack and learns with another. What it serves is computed once: to be scored, and to be learned."""

    kept: tuple[list[int], int, Any] = [], -1, None

    def __init__(self, frozen: Oracle, learned: Stack):
        super().__init__(frozen.model, frozen.config)
        self.stack = self.plain = frozen.stack
        self.learned = learned

    def served(self, ids: list[int]) -> tuple[Tensor, list[KV]]:
        if self.kept[:2] != (ids, self.version):
            self.kept = ids, self.version, super().served(ids)
        return self.kept[2]

    def step(self, h: Tensor, a: Tensor, targets: Tensor, past: Sequence[KV]) -> float:
        self.stack, self.kept = self.learned, ([], -1, None)
        try:
            return super().step(h, a, targets, past)
        finally:
            self.stack = self.plain


class Slot(Session):
    """It serves as a slot of vLLM on CUDA does, from 8 bits."""

    def slot(self) -> list[dict[str, Tensor]]:
        return [{k: rounded(b) for k, b in layer.items()} for layer in self.B]


def agreement(one: Oracle, other: Oracle) -> float:
    """Mean cosine of the deltas of both, over the modules."""
    pairs = [(a[k], b[k]) for a, b in zip(one.B, other.B, strict=True) for k in a]
    return fmean(torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in pairs)


def read(frozen: Oracle, sessions: dict[str, Session], ids: list[int]) -> Row:
    """Mean losses of one request, which is learned afterwards; how far its delta and its step's loss are off."""
    seen = frozen.activations(ids)
    row = {"frozen": frozen.score(ids)[-SCORED:].mean().item()}
    for name, session in sessions.items():
        session._seen = list(ids), seen
        losses = session.score(ids)
        row[name] = losses[-SCORED:].mean().item()
        row[f"{name}: step's loss"] = session.learn(ids)[0] - losses[: session.config.learn.chunk].mean().item()
    for name, session in sessions.items():
        row |= {f"{name}: cosine": agreement(session, sessions["none"]), f"{name}: rate": session.rate}
    return row


def table(found: dict[str, list[Row]], ways: list[str]) -> str:
    """Gains of the second request and later ones."""
    gains = {d: [fmean(r["frozen"] - r[way] for r in rows[1:]) for way in ways] for d, rows in found.items()}
    gains["mean"] = [fmean(x) for x in zip(*gains.values(), strict=True)]
    lines = [f"| {d} | " + " | ".join(f"{x:.4f} ({x - each[0]:+.4f})" for x in each) + " |" for d, each in gains.items()]
    return "\n".join((f"| domain | {' | '.join(ways)} |", "| --- " * (1 + len(ways)) + "|", *lines))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ways", nargs="*", default=["back", "both"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the products")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    scorer = OracleScorer(args.model, parse_config(None, "deep"))
    texts = {
        name: x for folder in args.texts for name, x in read_texts(folder).items() if not args.domains or name in args.domains
    }
    work = plan("p2", asyncio.run(encode(texts, scorer.tokenize)), 1, args.requests)
    frozen = Oracle(scorer.model, scorer.config)
    exact, frozen.stack = frozen.stack, in_dtype(frozen.stack, dtype)
    ways = ["none", *args.ways]
    learned = {
        way: replace(in_fp8(exact, way, dtype), head=frozen.stack.head) if way in ("back", "both") else frozen.stack
        for way in ways
    }
    kinds = {way: Slot if way == "slots" else Session for way in ways}
    sessions = [{way: kinds[way](frozen, learned[way]) for way in ways} for _ in work.domains]
    found: dict[str, list[Row]] = {domain: [] for domain in work.domains}
    for i in range(args.requests):
        for domain, windows, each in zip(work.domains, work.windows, sessions, strict=True):
            found[domain].append(read(frozen, each, windows[i]))
            print(domain, i + 1, {name: round(x, 4) for name, x in found[domain][-1].items()}, flush=True)
        if i:
            print(table(found, ways), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
