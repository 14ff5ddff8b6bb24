"""What everybody else notices while one key floods the server, or its state dir fails. Each case on one real server, over HTTP.

    python loadtests/neighbours.py [--only held,exports,...]

The neighbour has a key of its own. Two base answers are streamed to it at a time, and it sends a session a document every
second. Told of each case: what the flooding key got, by status; the neighbour's time per output token, its time to the first
token and its longest wait for a token, beside the same without the case; and whether the neighbour had an error, or its session
another version than it must have. The state dir is a file system of 1.5 GB in memory, where root runs this.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from load.texts import Texts
from runs import DEMO, HERE, about, save, served

from vllm_ttt.eval import server

KEYS = ("key-of-the-neighbour-0123456789", "key-of-the-flood-0123456789")
FLAGS = [
    *(str(DEMO / "model"), "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**28), "--served-model-name", "demo"),
    *("--enforce-eager", "--api-key", *KEYS, *server.dtype_flags()),
]
CONFIG: dict[str, Any] = {"sessions": {"resident": 6, "autosave": 2.0, "host_gib": 0.1}, "observe": {"recent_chunks": 4096}}
#: Seconds that the neighbour is watched with nothing else, and at least beside each case.
ALONE, BESIDE = 20.0, 10.0
#: Tokens of a base answer; of a document, two chunks.
ANSWER, DOCUMENT = 48, 1025
DISK_MB = 1500


@dataclass
class Seen:
    """What the neighbour saw, in seconds."""

    gaps: list[float] = field(default_factory=list)
    #: time per output token, of whole answers
    paces: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    documents: int = 0
    errors: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        at = lambda values, q: round(1e3 * sorted(values)[min(len(values) - 1, int(q * len(values)))], 1) if values else None  # noqa: E731
        return {
            "answers": len(self.paces), "tpot_p50": at(self.paces, 0.5), "tpot_p99": at(self.paces, 0.99),
            "ttft_p50": at(self.firsts, 0.5), "ttft_p99": at(self.firsts, 0.99), "longest": at(self.gaps, 1.0),
            "documents": self.documents, "errors": self.errors,
        }  # fmt: skip


class Neighbour:
    """Two base answers at a time, and a session that must end at the version that its documents make."""

    def __init__(self, url: str):
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=300, trust_env=False)
        self.rng, self.number, self.texts = random.Random(0), 0, Texts(url, "demo", headers)

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[Seen]:
        """What is seen within the block."""
        seen, self.number = Seen(), self.number + 1
        tasks = [asyncio.create_task(self.read(seen)) for _ in range(2)] + [asyncio.create_task(self.learn(seen))]
        try:
            yield seen
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.check(seen)

    async def read(self, seen: Seen) -> None:
        while True:
            prompt = self.texts.window(self.rng, 100)
            body = {"model": "demo", "prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True, "stream": True}
            began = last = time.perf_counter()
            first = 0.0
            try:
                async with self.http.stream("POST", "/v1/completions", json=body) as stream:
                    stream.raise_for_status()
                    async for line in stream.aiter_lines():
                        if not line.startswith("data: {"):
                            continue
                        now = time.perf_counter()
                        if first:
                            seen.gaps.append(now - last)
                        else:
                            first = now
                            seen.firsts.append(now - began)
                        last = now
                seen.paces.append((last - first) / (ANSWER - 1))
            except httpx.HTTPError as error:
                seen.errors.append(repr(error)[:200])

    async def learn(self, seen: Seen) -> None:
        while True:
            prompt = self.texts.window(self.rng, DOCUMENT)
            body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "session_id": f"neighbour-{self.number}"}
            sent = asyncio.ensure_future(self.http.post("/v1/completions", json=body))
            answer = await asyncio.shield(sent)
            if answer.status_code != 200:
                seen.errors.append(f"{answer.status_code}: {answer.text[:200]}")
            else:
                seen.documents += 1
            await asyncio.sleep(1)

    async def check(self, seen: Seen) -> None:
        """The session, at rest: each document was two chunks; none of another's is in it."""
        while True:
            state = (await self.http.get(f"/v1/ttt/sessions/neighbour-{self.number}")).json()
            if "version" not in state or not (state["tokens_pending"] or state["requests_open"]):
                break
            await asyncio.sleep(0.1)
        chunks = state.get("version", 0) + sum(1 for chunk in state.get("losses", ()) if chunk["skipped"])
        if not 2 * seen.documents <= chunks <= 2 * seen.documents + 2:  # the last was cut off, perhaps
            seen.errors.append(f"version and skipped chunks {chunks} after {seen.documents} documents")


class Flood:
    """The other key. Each method is a case; what it returns is counted."""

    def __init__(self, url: str, state: Path):
        limits = httpx.Limits(max_connections=5000, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {KEYS[1]}"}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False, limits=limits)
        self.state, self.rng, self.texts = state, random.Random(1), Texts(url, "demo", headers)

    async def send(self, session: str, tokens: int = 40, **body: Any) -> httpx.Response:
        prompt = self.texts.window(self.rng, tokens)
        asked = {"model": "demo", "prompt": prompt, "max_tokens": 1, "session_id": session, **body}
        return await self.post("/v1/completions", asked)

    async def post(self, path: str, body: Any = None) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def call(self, session: str, what: str, body: Any = None) -> httpx.Response:
        return await self.post(f"/v1/ttt/sessions/{session}/{what}", body)

    async def held(self) -> list[httpx.Response]:
        """4,000 requests at once to one session, for half a minute; then their clients go"""
        sent = [asyncio.ensure_future(self.send("held")) for _ in range(4000)]
        done, waiting = await asyncio.wait(sent, timeout=30)
        for request in waiting:
            request.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return [request.result() for request in done]

    async def exports(self) -> list[httpx.Response]:
        """1,000 exports at once of one session"""
        await self.send("exported", 600)
        return await asyncio.gather(*(self.http.get("/v1/ttt/sessions/exported/adapter") for _ in range(1000)))

    async def lists(self) -> list[httpx.Response]:
        """1,000 lists at once"""
        return await asyncio.gather(*(self.http.get("/v1/ttt/sessions") for _ in range(1000)))

    async def sessions(self) -> list[httpx.Response]:
        """200 new sessions, 16 at a time"""
        gate = asyncio.Semaphore(16)

        async def one(i: int) -> httpx.Response:
            async with gate:
                return await self.send(f"many-{i}")

        return await asyncio.gather(*(one(i) for i in range(200)))

    async def calls(self) -> list[httpx.Response]:
        """save, rollback, reset and a request of one session in one turn of the engine's loop, forty times"""
        found = []
        for _ in range(40):
            found.append(await self.send("called"))
            asked = [self.call("called", "save"), self.call("called", "rollback", {"version": 0}), self.call("called", "reset")]
            found += await asyncio.gather(*asked, self.send("called"))
        return found

    async def full_disk(self) -> list[httpx.Response]:
        """the state dir's disk is filled to the last byte; four sessions learn, are saved, and deleted"""
        for i in range(4):
            await self.send(f"full-{i}", 600)
        filler, found = self.state.parent / "filler", []
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 65536)
        try:
            for i in range(4):
                found += [await self.send(f"full-{i}", 600), await self.call(f"full-{i}", "save"), await self.send(f"new-{i}")]
        finally:
            filler.unlink()
        for i in range(4):
            found += [await self.call(f"full-{i}", "save"), await self.http.delete(f"/v1/ttt/sessions/full-{i}")]
        return found

    async def damaged_row(self) -> list[httpx.Response]:
        """forty sessions' rows are damaged in the database while they are on disk, and each is sent a request"""
        found = []
        for i in range(40):
            await self.send(f"row-{i}", 600)
            found.append(await self.call(f"row-{i}", "save"))
        await self.put_away()
        with contextlib.closing(sqlite3.connect(self.state / "sessions.db", timeout=30)) as db, db:
            db.execute("UPDATE sessions SET summary = substr(summary, 1, 20) WHERE name LIKE 'row-%'")
            db.execute("UPDATE versions SET detail = '{' WHERE uid IN (SELECT uid FROM sessions WHERE name LIKE 'row-%')")
        return found + [await self.send(f"row-{i}") for i in range(40)]

    async def read_error(self) -> list[httpx.Response]:
        """forty sessions' files answer with an input/output error, and each is sent a request; then one more, without it"""
        names, versions = [f"unread-{i}" for i in range(40)], []
        for name in names:
            await self.send(name, 600)
            versions.append((await self.call(name, "save")).json()["version"])
        await self.put_away()
        with contextlib.closing(sqlite3.connect(self.state / "sessions.db", timeout=30)) as db:
            found = db.execute("SELECT file FROM versions JOIN sessions USING (uid) WHERE name LIKE 'unread-%'").fetchall()
        with unreadable([self.state / file for (file,) in found]):
            failed = [await self.send(name) for name in names]
        again = [await self.send(name) for name in names]
        for answer, version in zip(again, versions, strict=True):
            if answer.status_code == 200 and answer.json()["ttt"]["version"] < version:
                raise RuntimeError(f"{answer.text[:200]}: it was saved at version {version}")
        return failed + again

    async def put_away(self) -> None:
        """Others take the places in memory of all that were used before."""
        for i in range(80):
            await self.send(f"other-{i}")


CASES: tuple[str, ...] = ("held", "exports", "lists", "sessions", "calls", "full_disk", "damaged_row", "read_error")
#: Those in which something is mounted.
ROOT = {"full_disk", "read_error"}


@contextlib.contextmanager
def unreadable(files: list[Path]) -> Iterator[None]:
    """Whoever reads one of them meets an input/output error: it is the memory of this process, which does not begin at 0."""
    mounted = []
    try:
        for file in files:
            subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", str(file)], check=True)
            mounted.append(file)
        yield
    finally:
        for file in mounted:
            subprocess.run(["umount", str(file)], check=True)


async def measure(url: str, state: Path, cases: list[str]) -> dict[str, Any]:
    neighbour, flood, found = Neighbour(url), Flood(url, state), {}
    async with neighbour.http, flood.http:
        async with neighbour.watch():  # vLLM compiles and allocates at the first requests
            await asyncio.sleep(3)
        for case in cases:
            async with neighbour.watch() as alone:
                await asyncio.sleep(ALONE)
            work: Callable[[], Awaitable[list[httpx.Response]]] = getattr(flood, case)
            began = time.perf_counter()
            async with neighbour.watch() as beside:
                answers = await work()
                took = time.perf_counter() - began
                await asyncio.sleep(max(0.0, BESIDE - took))
            statuses = Counter(answer.status_code for answer in answers)
            said = (getattr(Flood, case).__doc__ or "").strip()
            found[case] = {"case": said, "seconds": took, "statuses": dict(sorted(statuses.items()))}
            found[case] |= {"alone": alone.figures(), "beside": beside.figures()}
            print(case, json.dumps(found[case]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--out", default=str(HERE / "out"))
    parser.add_argument("--name", default="neighbours")
    args = parser.parse_args()
    if unknown := set(cases := args.only.split(",")) - set(CASES):
        parser.error(f"--only: some of {', '.join(CASES)}; got {', '.join(unknown)}")
    run = about("neighbours.py")
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder]
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if not mounted and ROOT & set(cases):
            parser.error(f"{' and '.join(sorted(ROOT))} need root, who may mount; --only the others")
        try:
            state = Path(folder) / "state"
            with served([*FLAGS, "--ttt-state-dir", str(state)], CONFIG) as url:
                run["cases"] = asyncio.run(measure(url, state, cases))
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=True)
    head = ["case", "answers by status", "took, s", "TPOT p50 / p99, ms: alone", "beside", "longest wait, ms: alone", "beside",
            "TTFT p99, ms: alone", "beside", "errors"]  # fmt: skip
    rows: list[list[Any]] = [head, ["---"] * len(head)]
    for case in run["cases"].values():
        a, b = case["alone"], case["beside"]
        statuses = ", ".join(f"{status}: {n}" for status, n in case["statuses"].items())
        rows.append([case["case"], statuses, f"{case['seconds']:.0f}", f"{a['tpot_p50']} / {a['tpot_p99']}",
                     f"{b['tpot_p50']} / {b['tpot_p99']}", a["longest"], b["longest"], a["ttft_p99"], b["ttft_p99"],
                     len(a["errors"] + b["errors"])])  # fmt: skip
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    save("What the neighbours of a flood notice", run, "\n".join(lines), args.out, args.name)


if __name__ == "__main__":
    main()
