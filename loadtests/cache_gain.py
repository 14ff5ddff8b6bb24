"""What a session's cache adds to what it learns, over HTTP, and how far the engine is from docs/cache.md's plain loop.

    python loadtests/cache_gain.py demo/real/smollm2 demo/real/texts         starts `vllm serve MODEL --plugin ttt` itself

Protocol p2 of `vllm-ttt eval`, and three readings of each request before it is learned: without a session, in the session
without its cache (`ttt_cache: 0`), and as it is served. Both last ones meet the same delta, so their difference is the cache's
alone. The plain loop mixes its own cache into the second, and into the first: "frozen + cache". Sessions run one after another.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
from runs import HERE, about, save, served

from vllm_ttt.config import parse_config
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.measures import HARM, Reading, measure
from vllm_ttt.eval.protocols import SCORED, plan
from vllm_ttt.eval.session_cache import SessionCache
from vllm_ttt.eval.texts import encode, read_texts

CONFIG: dict[str, Any] = {"cache": {"orders": 6}}
ARMS = ("frozen", "session", "session + cache")


class Session:
    """One session of a domain, and what is measured of it."""

    def __init__(self, client: Client, name: str, window: int):
        self.client, self.name, self.window = client, name, window
        self.ours, self.frozen_ours = (SessionCache(parse_config(CONFIG)) for _ in range(2))
        #: by request: of each arm, and losses of "oracle" (the session and the plain loop's cache) and "frozen + cache"
        self.found: list[dict[str, Any]] = []

    async def send(self, ids: list[int]) -> None:
        readings = {
            "frozen": await self.client.read(ids),
            "session": await self._read(ids, {"ttt_learn": 0, "ttt_cache": 0}),
            "session + cache": await self._read(ids, {}),
        }
        arms: dict[str, Any] = {name: measure(ids, reading, self.window) for name, reading in readings.items()}
        for name, cache, arm in (("oracle", self.ours, "session"), ("frozen + cache", self.frozen_ours, "frozen")):
            losses = list(readings[arm].losses)
            arms[name] = measure(ids, Reading(cache.read(ids, losses)), self.window)
            cache.learn(ids, losses)
        self.found.append(arms)

    async def _read(self, ids: list[int], xargs: dict[str, int]) -> Reading:
        """As `Client.read`, which always learns."""
        plain = self.client._call

        async def call(method: str, path: str, body: dict[str, Any] | None = None, missing_ok: bool = False) -> Any:
            return await plain(method, path, {**(body or {}), "vllm_xargs": xargs}, missing_ok)

        self.client._call = call  # type: ignore[method-assign]
        try:
            return await self.client.read(ids, self.name)
        finally:
            self.client._call = plain  # type: ignore[method-assign]


async def run(url: str, texts: Path, sessions: int, requests: int, domains: list[str]) -> dict[str, list[list[dict[str, Any]]]]:
    """By domain: of each session, its requests."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    async with Client(url, timeout=3600) as client:
        documents = {name: text for name, text in read_texts(texts).items() if not domains or name in domains}
        work = plan("p2", await encode(documents, client.tokenize), sessions, requests)
        for number, (domain, windows) in enumerate(zip(work.domains, work.windows, strict=True)):
            session = Session(client, f"cache-{number}", SCORED)
            for ids in windows:
                await session.send(ids)
                print(domain, {name: round(m.nats, 4) for name, m in session.found[-1].items()}, flush=True)
            found.setdefault(domain, []).append(session.found)
            await client.forget(session.name)
    return found


def summary(sessions: list[list[dict[str, Any]]]) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--sessions", type=int, default=1, help="of each domain")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--domains", nargs="*", default=[], help="instead of all")
    parser.add_argument("--name", default="cache-gain")
    args = parser.parse_args()
    flags = [args.model, "--served-model-name", "model", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**29),
             "--dtype", "float32", "--enforce-eager"]  # fmt: skip
    told = about("cache_gain.py")
    with served(flags, CONFIG) as url:
        found = asyncio.run(run(url, args.texts, args.sessions, args.requests, args.domains))
        settings = httpx.get(f"{url}/v1/ttt/config", trust_env=False).raise_for_status().json()
    rows = {domain: summary(sessions) for domain, sessions in found.items()}
    rows["all"] = summary([session for sessions in found.values() for session in sessions])
    keys = list(rows["all"])
    lines = ["| | " + " | ".join(keys) + " |", "| --- " * (len(keys) + 1) + "|"]
    lines += [f"| {domain} | " + " | ".join(f"{row[key]:.4f}" for key in keys) + " |" for domain, row in rows.items()]
    requests = {
        domain: [[{name: m.nats for name, m in request.items()} for request in session] for session in sessions]
        for domain, sessions in found.items()
    }
    told |= {"server": "vllm serve " + " ".join(flags) + " --plugin ttt", "config": settings, "rows": rows, "nats": requests}
    body = "Gains over the frozen model in nats per token, means of requests 2 to the last.\n\n" + "\n".join(lines)
    save("What a session's cache adds", told, body, HERE / "results", args.name)


if __name__ == "__main__":
    main()
