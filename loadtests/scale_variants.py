"""Ways to choose the no-regret scale, compared on the oracle: the table in docs/algorithm.md.

    python loadtests/scale_variants.py demo/model TEXTS

What is learned does not depend on the scale, so each request's losses are recorded once, under every scale, and the ways are
tried on the record. The sessions are those of loadtests/no_regret.py: P2, and sessions that change their subject after five
documents.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
import torch
from no_regret import BEFORE

from vllm_ttt.config import LearnConfig
from vllm_ttt.eval import no_regret, texts
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.no_regret import NoRegret
from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.eval.protocols import SCORED

#: Losses are recorded under these, and interpolated between them.
GRID = [i / 8 for i in range(11)]


@dataclass
class Session:
    domains: tuple[str, str]
    windows: list[list[int]]
    #: [requests, scales of GRID, tokens]
    losses: np.ndarray


@dataclass
class Way:
    name: str
    learn: LearnConfig
    #: of the tokens of a request, those that are measured
    tokens: tuple[int, int, int] = (768, 1024, 2)
    #: all scales are measured, instead of three
    every_scale: bool = False
    #: a request may move the scales apart by so much
    spread: float = no_regret.SPREAD


PLAIN: dict[str, Any] = {"scale_rate": 100.0, "scale_memory": 1.0, "familiar": 0.0}
WAYS = [
    Way("the delta as it is (s = 1)", LearnConfig(scales=(1.0,))),
    Way("six scales on the last chunk", LearnConfig(**PLAIN), (768, 1024, 1), True, 9.0),
    Way("on every second token of it", LearnConfig(**PLAIN), every_scale=True, spread=9.0),
    Way("three scales, a parabola through them", LearnConfig(**PLAIN), spread=9.0),
    Way("and memory 0.75", LearnConfig(scale_rate=100.0, familiar=0.0), spread=9.0),
    Way("and at most 0.04 nats a request, rate 200", LearnConfig(familiar=0.0)),
    Way("and less for what is unfamiliar (the default)", LearnConfig()),
]


@torch.no_grad()
def record(scorer: OracleScorer, domains: tuple[str, str], windows: list[list[int]]) -> Session:
    oracle, losses = Oracle(scorer.model, scorer.config), []
    for window in windows:
        losses.append(torch.stack([oracle._nll(window, slice(0, len(window) - 1), scale) for scale in GRID]).numpy())
        with torch.enable_grad():
            oracle.learn(window)
    return Session(domains, windows, np.stack(losses))


def under(losses: np.ndarray, scale: float) -> float:
    """Mean loss of the last tokens of a request, [scales, tokens], between the scales that were recorded."""
    known = losses[:, -SCORED:].mean(1)
    i = min(max(int(scale * 8) - 1, 0), len(GRID) - 4)
    return float(np.polyval(np.polyfit(GRID[i : i + 4], known[i : i + 4], 3), scale))


def gains(session: Session, way: Way) -> list[float]:
    """What each request gained over the frozen model."""
    chooser, found = NoRegret(way.learn), []
    known = chooser.scales if way.every_scale else chooser.measured
    with mock.patch.object(no_regret, "SPREAD", way.spread), mock.patch.object(NoRegret, "measured", known):
        for window, losses in zip(session.windows, session.losses, strict=True):
            found.append(under(losses, 0.0) - under(losses, chooser.served(window)))
            if chooser.on:
                measured = [losses[GRID.index(scale), slice(*way.tokens)].mean() for scale in known]
                chooser.add(measured, way.learn.chunk)
                chooser.note(window)
    return found


def row(way: Way, steady: list[Session], changing: list[tuple[Session, int]]) -> str:
    plain = [gains(s, way) for s in steady]
    late = [gain for each in plain for gain in each[1:]]
    domains = dict.fromkeys(s.domains[0] for s in steady)
    of = lambda d: fmean(g for s, each in zip(steady, plain, strict=True) if s.domains[0] == d for g in each[1:])  # noqa: E731
    changed = [(gains(s, way)[BEFORE:], plain[fresh][BEFORE - 1]) for s, fresh in changing]
    after = [gain for each, _ in changed for gain in each]
    cells = [
        f"{fmean(late):.4f}",
        f"{min(map(of, domains)):+.4f}",
        f"{100 * sum(g < -0.005 for g in late) / len(late):.1f} %",
        f"{min(after):+.3f}",
        f"{sum(g < -0.02 for g in after)} of {len(after)}",
        f"{fmean(each[-1] for each, _ in changed) / fmean(f for _, f in changed):.2f}",
    ]
    return f"| {way.name} | " + " | ".join(cells) + " |"


def sessions(scorer: OracleScorer, folder: str, tick: Callable[[str], None]) -> tuple[list[Session], list[tuple[Session, int]]]:
    docs = asyncio.run(texts.encode(texts.read_texts(folder), scorer.tokenize))
    work = texts.interactions(docs, 2, 10)
    names = list(dict.fromkeys(work.domains))
    steady, changing = [], []
    for domain, windows in zip(work.domains, work.windows, strict=True):
        tick(domain)
        steady.append(record(scorer, (domain, domain), windows))
    for turn, step in enumerate((1, 3)):
        for i, first in enumerate(names):
            second = (i + step) % len(names)
            tick(f"{first}, {names[second]}")
            windows = work.windows[2 * i + turn][:BEFORE] + work.windows[2 * second + turn][:BEFORE]
            changing.append((record(scorer, (first, names[second]), windows), 2 * second + turn))
    return steady, changing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steady, changing = sessions(OracleScorer(args.model), args.texts, lambda what: print(what, flush=True))
    print(
        "| s is chosen by | gain | worst domain | worse by > 0.005 | after a change: worst | worse by > 0.02 | fifth document |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way in WAYS:
        print(row(way, steady, changing))


if __name__ == "__main__":
    main()
