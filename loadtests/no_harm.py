"""Does learning harm? Sessions that have every reason to get worse, over HTTP: is any request worse than the frozen model's?

    python loadtests/no_harm.py TEXTS            starts `vllm serve demo/model --plugin ttt`
    python loadtests/no_harm.py TEXTS --base-url http://127.0.0.1:8000 [--only change,again]

TEXTS holds one folder of .txt files for each domain. Windows are those of `vllm-ttt eval`: 1,024 tokens, of which the last 768
are scored.

  subject   ten documents of one domain
  change    five documents of one domain, then five of another
  noise     four requests of random tokens, or of random hexadecimal digits, then six documents
  again     one document, twenty times; all its tokens are scored
  long      thirty windows of one domain
  spoil     forty requests that teach nothing: digits, shuffled words, text with a quarter of its tokens replaced, ten words

Told of each: the gain over the frozen model in nats per token (mean, and the worst request after the first), how many requests
are worse by more than 0.005 and by more than 0.02, how much worse the delta makes the guard's text, and whom the guard froze.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from runs import HERE, about, save, served

from vllm_ttt.eval import texts
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.protocols import SCORED
from vllm_ttt.eval.texts import LENGTH

BEFORE, AFTER, AGAIN, LONG, SPOIL = 5, 5, 20, 30, 40
KINDS = ("subject", "change", "noise", "again", "long", "spoil")
#: label: (requests, scored tokens of each)
Plan = dict[str, tuple[list[list[int]], int]]


async def plans(kinds: Sequence[str], docs: texts.Documents, client: Client) -> dict[str, Plan]:
    work, found = texts.interactions(docs, 1, BEFORE + AFTER), random.Random(7)
    own = dict(zip(work.domains, work.windows, strict=True))
    names, every = list(own), sorted({token for ids in next(iter(docs.values())) for token in ids})

    async def written(characters: str) -> list[int]:
        text = "".join(found.choice(characters) for _ in range(4 * LENGTH))
        return (await client.tokenize(text))[: LENGTH + 1]

    def noisy(ids: list[int]) -> list[int]:
        return [found.choice(every) if found.random() < 0.25 else token for token in ids]

    async def words() -> list[int]:
        few = ["apple", "stone", "river", "cloud", "iron", "glass", "seven", "under", "quick", "blue"]
        return (await client.tokenize(" ".join(found.choice(few) for _ in range(2 * LENGTH))))[: LENGTH + 1]

    random_ids = lambda: [found.choice(every) for _ in range(LENGTH + 1)]  # noqa: E731
    digits = "0123456789abcdef"
    plan: dict[str, Plan] = {kind: {} for kind in kinds}
    for i, name in enumerate(names):
        other = names[(i + 3) % len(names)]
        if "subject" in plan:
            plan["subject"][name] = own[name], SCORED
        if "change" in plan:
            plan["change"][f"{name} > {other}"] = own[name][:BEFORE] + own[other][BEFORE : BEFORE + AFTER], SCORED
        if "again" in plan:
            plan["again"][name] = own[name][:1] * AGAIN, LENGTH
        if "long" in plan:
            windows = texts.interactions({name: docs[name]}, 1, LONG).windows[0]
            if len({tuple(window) for window in windows}) == LONG:
                plan["long"][name] = windows, SCORED
    if "noise" in plan:
        plan["noise"]["tokens"] = [random_ids() for _ in range(4)] + own[names[0]][:6], SCORED
        plan["noise"]["digits"] = [await written(digits) for _ in range(4)] + own[names[-1]][:6], SCORED
    if "spoil" in plan:
        pool = [window for windows in own.values() for window in windows]
        plan["spoil"] = {
            "digits": ([await written(digits) for _ in range(SPOIL)], LENGTH),
            "shuffled": ([found.sample(x, len(x)) for x in found.choices(pool, k=SPOIL)], LENGTH),
            "noisy": ([noisy(x) for x in found.choices(pool, k=SPOIL)], LENGTH),
            "ten words": ([await words() for _ in range(SPOIL)], LENGTH),
        }
    return plan


class Measured:
    """One server; what the frozen model makes of a window is asked once."""

    def __init__(self, client: Client):
        self.client, self.frozen = client, dict[tuple[int, ...], asyncio.Task[list[float]]]()

    async def session(self, ids: list[list[int]], scored: int) -> dict[str, Any]:
        name, gains = f"harm-{secrets.token_hex(6)}", []
        for window in ids:
            base = self.frozen.setdefault(tuple(window), asyncio.ensure_future(self.client.score(window)))
            losses = await self.client.score(window, name)
            gains.append(fmean((await base)[-scored:]) - fmean(losses[-scored:]))
        state = await self.client._call("GET", f"/v1/ttt/sessions/{name}")
        await self.client.forget(name)
        keys = ("version", "rate", "probe_regression", "frozen", "frozen_reason", "tokens_learned", "tokens_skipped")
        return {"gains": [round(x, 4) for x in gains], **{key: state[key] for key in keys}}


def row(kind: str, sessions: dict[str, Any]) -> str:
    later = [x for s in sessions.values() for x in s["gains"][1:]]
    worst = min(later)
    if kind == "change":  # the first request after it cannot know
        first = min(s["gains"][BEFORE] for s in sessions.values())
        rest = [x for s in sessions.values() for x in (*s["gains"][1:BEFORE], *s["gains"][BEFORE + 1 :])]
        kind, worst, later = f"change (first request after it, worst: {first:+.3f})", min(rest), rest
    probe = [s["probe_regression"] for s in sessions.values() if s["probe_regression"] is not None]
    tried = f"{max(probe):+.3f}" if probe else "not tried"
    over = lambda bound: f"{sum(x < -bound for x in later)} of {len(later)}"  # noqa: E731
    frozen = sum(s["frozen"] for s in sessions.values())
    return (
        f"| {kind} | {len(sessions)} | {fmean(later):+.3f} | {worst:+.4f} | {over(0.005)} | {over(0.02)} | {tried} | {frozen} |"
    )


async def measure(url: str, folder: str, kinds: Sequence[str]) -> dict[str, Any]:
    async with Client(url) as client:
        docs = await texts.encode(texts.read_texts(folder), client.tokenize)
        measured, found = Measured(client), {}
        for kind, plan in (await plans(kinds, docs, client)).items():
            sessions = await asyncio.gather(*(measured.session(*one) for one in plan.values()))
            found[kind] = dict(zip(plan, sessions, strict=True))
            print(row(kind, found[kind]), flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--base-url", help="a server that runs")
    parser.add_argument("--config", default="{}", help="settings, YAML, for the server that is started")
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--name", default="no-harm")
    args = parser.parse_args()
    run = about("no_harm.py", {args.texts: "TEXTS"})
    with served(config=args.config, url=args.base_url) as url:
        run["sessions"] = asyncio.run(measure(url, args.texts, args.only.split(",")))
    head = (
        "| | sessions | gain, mean | worst request | worse by > 0.005 | by > 0.02 | guard's text, at worst | frozen |\n"
        + "| --- " * 8
    )
    lines = [row(kind, sessions) for kind, sessions in run["sessions"].items() if sessions]
    save("Does learning harm?", run, "\n".join([head + "|", *lines]), HERE / "results", args.name)


if __name__ == "__main__":
    main()
