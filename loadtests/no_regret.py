"""Is a session ever worse than the frozen model? P2 of docs/algorithm.md, and sessions that change their subject, over HTTP.

    python loadtests/no_regret.py TEXTS            starts `vllm serve demo/model --plugin ttt`
    python loadtests/no_regret.py TEXTS --base-url http://127.0.0.1:8000

TEXTS holds one folder of .txt files for each domain. Every session sends ten documents, each in a fresh context, of which the
last 768 of 1,024 tokens are scored: ten of one domain (two sessions each), or five of one and then five of another (one session
for each domain and each of two successors).
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from statistics import fmean
from typing import Any

from runs import HERE, about, save, served

from vllm_ttt.eval import protocols, texts
from vllm_ttt.eval.client import Client

#: Documents before the subject changes.
BEFORE = 5
#: (what, bound, whether it is a least): what the no-regret scale is to keep
TARGETS = {
    "mean gain": (0.112, True),
    "worst domain": (-0.003, True),
    "requests worse than frozen by > 0.005": (0.09, False),
    "after a change of subject: worst request": (-0.020, True),
    "after a change of subject: gain of the fifth document, of a fresh session's": (0.70, True),
}


async def changes(client: Client, work: texts.Sessions) -> tuple[list[tuple[str, str, int]], list[list[float]]]:
    """(first domain, second domain, index of the fresh session that sends the second's documents), and losses of the latter."""
    names = list(dict.fromkeys(work.domains))
    per_domain = len(work.domains) // len(names)
    plan = []
    for turn, step in enumerate((1, 3)):
        for i, first in enumerate(names):
            second = names[(i + step) % len(names)]
            plan.append((first, second, names.index(second) * per_domain + min(turn, per_domain - 1)))

    async def one(first: str, fresh: int, turn: int) -> list[float]:
        session = f"change-{secrets.token_hex(6)}"
        mine = names.index(first) * per_domain + min(turn, per_domain - 1)
        windows = work.windows[mine][:BEFORE] + work.windows[fresh][:BEFORE]
        losses = [await client.score(window, session) for window in windows]
        await client.forget(session)
        return [fmean(x[-protocols.SCORED :]) for x in losses[BEFORE:]]

    losses = await asyncio.gather(*(one(first, fresh, i // len(names)) for i, (first, _, fresh) in enumerate(plan)))
    return plan, list(losses)


async def measure(url: str, folder: str, interactions: int) -> dict[str, Any]:
    async with Client(url) as client:
        docs = await texts.encode(texts.read_texts(folder), client.tokenize)
        work = texts.interactions(docs, 2, interactions)
        p2 = await protocols.run("p2", client, work, ("frozen", "ttt"))
        plan, after = await changes(client, work)
    gains = [[f - t for f, t in zip(*rows, strict=True)] for rows in zip(p2.frozen, p2.ttt, strict=True)]
    late = [gain for row in gains[1:] for gain in row]
    by_domain = {
        d: fmean(row[s] for row in gains[1:] for s, name in enumerate(p2.domains) if name == d)
        for d in dict.fromkeys(p2.domains)
    }
    changed = [
        {
            "from": first,
            "to": second,
            "gains": [p2.frozen[i][fresh] - loss for i, loss in enumerate(losses)],
            "fresh": [gains[i][fresh] for i in range(BEFORE)],
        }
        for (first, second, fresh), losses in zip(plan, after, strict=True)
    ]
    last = [(c["gains"][-1], c["fresh"][-1]) for c in changed]
    found = {
        "mean gain": fmean(late),
        "worst domain": min(by_domain.values()),
        "requests worse than frozen by > 0.005": sum(gain < -0.005 for gain in late) / len(late),
        "after a change of subject: worst request": min(gain for c in changed for gain in c["gains"]),
        "after a change of subject: gain of the fifth document, of a fresh session's": fmean(g for g, _ in last)
        / fmean(f for _, f in last),
    }
    return {"found": found, "by_domain": by_domain, "gains": gains, "domains": p2.domains, "changes": changed}


def table(report: dict[str, Any]) -> str:
    lines = ["| what | measured | at least / at most |", "| --- | --- | --- |"]
    for name, (bound, least) in TARGETS.items():
        value = report["found"][name]
        held = value >= bound if least else value <= bound
        lines.append(f"| {name} | {value:.4f} | {'≥' if least else '≤'} {bound}{'' if held else ' (missed)'} |")
    lines += ["", "| domain | gain, requests 2 to last |", "| --- | --- |"]
    lines += [f"| {domain} | {gain:.4f} |" for domain, gain in report["by_domain"].items()]
    lines += [
        "",
        "| from | to | gain after the change, document by document | a fresh session's |",
        "| --- | --- | --- | --- |",
    ]
    show = lambda xs: " ".join(f"{x:+.3f}" for x in xs)  # noqa: E731
    lines += [f"| {c['from']} | {c['to']} | {show(c['gains'])} | {show(c['fresh'])} |" for c in report["changes"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts")
    parser.add_argument("--base-url", help="a server that runs; default: one is started")
    parser.add_argument("--config", default="{}", help="vllm-ttt's settings for that server, as YAML")
    parser.add_argument("--interactions", type=int, default=10)
    parser.add_argument("--name", default="no-regret", help="of the results: RESULTS/DATE-NAME.md and .json")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder for the dated JSON and Markdown")
    args = parser.parse_args()
    report = about("no_regret.py", {args.texts: "TEXTS"})
    with served(config=args.config, url=args.base_url) as url:
        report |= asyncio.run(measure(url, args.texts, args.interactions))
    save("Sessions beside the frozen model", report, table(report), args.out, args.name)


if __name__ == "__main__":
    main()
