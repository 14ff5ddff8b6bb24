"""What a session's cache adds to what it learns, over HTTP, and how far the engine is from docs/cache.md's plain loop.

    python loadtests/cache_gain.py demo/real/smollm2 FOLDER...           starts `vllm serve MODEL --plugin ttt` itself

Each FOLDER has a folder of .txt files for each domain. Protocol p2 of `vllm-ttt eval`, and three readings of each request
before it is learned: without a session, in the session without its cache (`ttt_cache: 0`), and as it is served. Both last ones
meet the same delta, so their difference is the cache's alone. The plain loop mixes its own cache into the second, and into the
first: "frozen + cache". With --minutes the run ends when they are over, and every domain has as many requests as every other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import numpy as np
from runs import HERE, about, exactly, save, served

from vllm_ttt.config import parse_config
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.measures import HARM, Measures, Reading, measure
from vllm_ttt.eval.protocols import SCORED, plan
from vllm_ttt.eval.session_cache import SessionCache
from vllm_ttt.eval.texts import encode, read_texts

#: The defaults.
CONFIG: dict[str, Any] = {}
#: name: knobs of its reading; None: without a session. In this order, since the last one learns.
ARMS: dict[str, dict[str, int] | None] = {
    "frozen": None,
    "session": {"ttt_learn": 0, "ttt_cache": 0},
    "session + cache": {},
}
#: One request: what is measured of each arm, and of the plain loop's caches.
Request = dict[str, Measures]


class Session:
    """One session of a domain, and what is found of it."""

    def __init__(self, client: Client, domain: str, windows: list[list[int]]):
        self.client, self.domain, self.windows = client, domain, windows
        self.oracles = {"oracle": ("session", SessionCache(parse_config(CONFIG)))}
        self.oracles["frozen + cache"] = ("frozen", SessionCache(parse_config(CONFIG)))
        self.found: list[Request] = []
        self.readings: list[dict[str, Reading]] = []

    async def send(self, number: int) -> None:
        """The next request."""
        ids, name = self.windows[len(self.found)], f"cache-{number}"
        readings = {arm: await self.client.read(ids, None if knobs is None else name, knobs) for arm, knobs in ARMS.items()}
        arms = {arm: measure(ids, reading, SCORED) for arm, reading in readings.items()}
        for oracle, (arm, cache) in self.oracles.items():
            losses, tops = readings[arm].losses, readings[arm].top_losses
            assert tops is not None
            arms[oracle] = measure(ids, Reading(cache.read(ids, losses, tops)), SCORED)
            cache.learn(ids, losses, tops)
        self.found.append(arms)
        self.readings.append(readings)
        print(self.domain, len(self.found), {arm: round(m.nats, 4) for arm, m in arms.items()}, flush=True)


async def run(url: str, texts: dict[str, list[str]], requests: int, until: float, found: list[Session]) -> None:
    """One session of each domain, which joins ``found``; request after request, each of all domains before the next."""
    async with Client(url, timeout=3600) as client:
        work = plan("p2", await encode(texts, client.tokenize), 1, requests)
        found += [Session(client, domain, windows) for domain, windows in zip(work.domains, work.windows, strict=True)]
        for _ in range(requests):
            if time.monotonic() > until:
                break
            for number, session in enumerate(found):
                await session.send(number)


def summary(sessions: list[list[Request]]) -> dict[str, float]:
    """Means over requests 2 to the last of some sessions: gains over the frozen model, and what else is measured."""
    later = [request for session in sessions for request in session[1:]]
    gains = {name: fmean(r["frozen"].nats - r[name].nats for r in later) for name in later[0] if name != "frozen"}
    added = [r["session"].nats - r["session + cache"].nats for r in later]
    away = max(abs(r["oracle"].nats - r["session + cache"].nats) for r in later)
    told = {"harmed by the cache": fmean(x < -HARM for x in added), "furthest from the oracle": away}
    for name in ARMS:
        exact = sum(r[name].exact for r in later) / max(1, sum(r[name].lines for r in later))
        characters = sum(r[name].characters for r in later) / max(1, sum(r[name].runs for r in later))
        told |= {f"whole lines, {name}": exact, f"characters, {name}": characters}
    return gains | told


def table(found: dict[str, list[Request]], groups: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """By domain and group of domains."""
    rows = {domain: summary([requests]) for domain, requests in found.items()}
    for group, domains in groups.items():
        if len(domains) > 1:
            rows[f"all of {group}"] = summary([found[domain] for domain in domains])
    return rows


def keep(path: Path, sessions: list[Session]) -> None:
    """Ids, and by arm losses of the token that is there and of the likeliest, as loadtests/cache_losses.py reads them."""
    arrays: dict[str, Any] = {"domains": np.array([session.domain for session in sessions])}
    count = min(len(session.found) for session in sessions)
    arrays["token_ids"] = np.array([session.windows[:count] for session in sessions]).swapaxes(0, 1)
    for arm in ARMS:
        for name, what in ((arm, "losses"), (f"{arm}, likeliest", "top_losses")):
            values = [[getattr(readings[arm], what) for readings in session.readings[:count]] for session in sessions]
            arrays[name] = np.array(values, np.float16).swapaxes(0, 1)
    np.savez_compressed(path, **arrays)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The arguments of whatever reads texts with a model."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--preset", default="deep")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--domains", nargs="*", default=[], help="instead of all")
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="JSON of earlier runs: domains that this one has not")
    parser.add_argument("--losses", type=Path, help="keep the losses of every token as .npz")
    parser.add_argument("--name", default="cache-gain")
    args = parser.parse_args()
    flags = [args.model, "--served-model-name", "model", "--max-model-len", "2048", *exactly(), "--ttt-preset", args.preset]
    told = about("cache_gain.py", {str(texts): texts.name for texts in args.texts if texts.is_absolute()})
    texts, groups = dict[str, list[str]](), dict[str, list[str]]()
    for folder in args.texts:
        chosen = {domain: x for domain, x in read_texts(folder).items() if not args.domains or domain in args.domains}
        texts |= chosen
        groups[folder.name] = list(chosen)
    told["server"] = f"vllm serve {' '.join(flags)} --plugin ttt"
    sessions = list[Session]()
    with served(flags, CONFIG) as url:
        told["config"] = httpx.get(f"{url}/v1/ttt/config", trust_env=False).raise_for_status().json()
        try:
            asyncio.run(run(url, texts, args.requests, time.monotonic() + 60 * args.minutes, sessions))
        finally:  # a run that is cut short says what it found
            if args.losses and all(session.found for session in sessions):
                keep(args.losses, sessions)
            report(told, sessions, groups, args.add, args.name)


def report(told: dict[str, Any], sessions: list[Session], groups: dict[str, list[str]], add: list[Path], name: str) -> None:
    """Write what was found, together with earlier runs."""
    found = {session.domain: session.found for session in sessions if len(session.found) > 1}
    groups = {group: [domain for domain in domains if domain in found] for group, domains in groups.items()}
    commands = [told["command"]]
    for path in add:
        earlier = json.loads(path.read_text())
        found |= {d: [{k: Measures(**m) for k, m in r.items()} for r in x] for d, x in earlier["requests"].items()}
        for group, domains in earlier["groups"].items():
            groups[group] = [*domains, *groups.get(group, [])]
        commands = earlier["commands"] + commands
    rows = table(found, groups)
    keys = list(next(iter(rows.values())))
    lines = ["| | requests | " + " | ".join(keys) + " |", "| --- " * (len(keys) + 2) + "|"]
    for where, row in rows.items():
        count = str(len(found[where])) if where in found else ""
        lines.append(f"| {where} | {count} | " + " | ".join(f"{row[key]:.4f}" for key in keys) + " |")
    requests = {domain: [{name: asdict(m) for name, m in request.items()} for request in x] for domain, x in found.items()}
    told |= {"command": "\n    ".join(commands), "commands": commands, "rows": rows, "groups": groups, "requests": requests}
    body = "Gains over the frozen model in nats per token, means of requests 2 to the last of one session.\n\n"
    body += "\n".join(lines)
    save("What a session's cache adds", told, body, HERE / "results", name)


if __name__ == "__main__":
    main()
