"""Losses of every token under the frozen model and under a session that learned, by the plain loops, without vLLM: what
loadtests/cache_losses.py reads.

    python loadtests/oracle_losses.py demo/real/smollm2 FOLDER... --preset head --out losses.npz

Each FOLDER has a folder of .txt files for each domain. Protocol p2 of `vllm-ttt eval`, one session of each domain, float32.
`head` takes as long as reading; `deep` some ten seconds for each request of SmolLM2 on two cores.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_gain import parser_of
from torch import Tensor

from vllm_ttt.config import parse_config
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.oracle import Oracle, stack_logits
from vllm_ttt.eval.protocols import plan
from vllm_ttt.eval.texts import encode, read_texts


def logits_of(oracle: Oracle | HeadOracle, ids: list[int]) -> Tensor:
    """[T - 1, V], as the delta is served."""
    if isinstance(oracle, HeadOracle):
        return oracle.logits(oracle.slot()[0]["y"], oracle.states(ids)[:-1])
    h, a = oracle.activations(ids)
    return stack_logits(oracle.stack, oracle.A, oracle.slot(), h[:-1], a[:-1], oracle.nothing())[0]


@torch.no_grad()
def read(oracle: Oracle | HeadOracle, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Losses of the tokens that are there, and of the likeliest."""
    logits = logits_of(oracle, ids)
    whole = logits.logsumexp(-1)
    return whole - logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], whole - logits.amax(-1)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    scorer = OracleScorer(args.model, parse_config(None, args.preset), torch.float32)
    texts = {
        name: x for folder in args.texts for name, x in read_texts(folder).items() if not args.domains or name in args.domains
    }
    work = plan("p2", asyncio.run(encode(texts, scorer.tokenize)), 1, args.requests)
    found: dict[str, list[Any]] = {name: [] for name in ("frozen", "frozen, likeliest", "session", "session, likeliest")}
    for domain, windows in zip(work.domains, work.windows, strict=True):
        session = scorer._session()
        rows: dict[str, list[Any]] = {name: [] for name in found}
        for ids in windows:
            for name, oracle in (("frozen", scorer.frozen), ("session", session)):
                for row, values in zip((name, f"{name}, likeliest"), read(oracle, ids), strict=True):
                    rows[row].append(values.numpy())
            session.learn(ids)
            print(domain, {name: round(float(x[-1].mean()), 4) for name, x in rows.items()}, flush=True)
        for name, values in rows.items():
            found[name].append(values)
    arrays: dict[str, Any] = {}
    arrays |= {name: np.array(values, np.float16).swapaxes(0, 1) for name, values in found.items()}
    arrays |= {"domains": np.array(work.domains), "token_ids": np.array(work.windows).swapaxes(0, 1)}
    np.savez_compressed(args.out, **arrays)


if __name__ == "__main__":
    main()
