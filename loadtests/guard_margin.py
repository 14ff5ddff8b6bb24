"""How near ordinary work comes to `guard.max_regression`: the guard's text under sessions of P2, on the oracle.

    python loadtests/guard_margin.py demo/model TEXTS

One session in each domain of TEXTS, ten documents; after the 4th, the 8th and the 10th, the nats per token by which its delta
makes the text worse.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import torch

from vllm_ttt.config import parse_config
from vllm_ttt.eval import texts
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.oracle import Oracle

PROBE = Path(__file__).resolve().parents[1] / "configs" / "probe.txt"
#: Tokens of a piece of the text, as vllm_ttt/engine/probe.py cuts it.
PIECE = 512
TRIED = (4, 8, 10)


def cut(ids: list[int], tokens: int) -> list[list[int]]:
    """Pieces with ``tokens`` tokens to predict in all."""
    return [ids[start : start + min(PIECE, tokens - start + 1)] for start in range(0, tokens, PIECE - 1)]


def loss(oracle: Oracle, pieces: list[list[int]]) -> float:
    """Nats per token under the oracle's delta."""
    return torch.cat([oracle.score(piece) for piece in pieces]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts")
    parser.add_argument("--domains", help="comma-separated; default: all")
    parser.add_argument("--preset", default="deep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scorer = OracleScorer(args.model, parse_config(None, args.preset))
    docs = asyncio.run(texts.encode(texts.read_texts(args.texts), scorer.tokenize))
    work = texts.interactions(docs, 2, max(TRIED))
    pieces = cut(asyncio.run(scorer.tokenize(PROBE.read_text(encoding="utf-8"))), scorer.config.guard.probe_tokens)
    frozen = loss(Oracle(scorer.model, scorer.config), pieces)
    print(f"| domain | {' | '.join(f'after {n}' for n in TRIED)} |\n| --- |{' --- |' * len(TRIED)}")
    for domain, windows in list(zip(work.domains, work.windows, strict=True))[::2]:
        if args.domains and domain not in args.domains.split(","):
            continue
        oracle, worse = Oracle(scorer.model, scorer.config), []
        for sent, window in enumerate(windows, 1):
            oracle.learn(window)
            if sent in TRIED:
                worse.append(f"{loss(oracle, pieces) - frozen:+.3f}")
        print(f"| {domain} | {' | '.join(worse)} |", flush=True)


if __name__ == "__main__":
    main()
