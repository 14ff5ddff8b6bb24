"""Many sessions on one CPU server with few slots and little memory: do all come back, and at what cost?

    python loadtests/sessions_on_disk.py [--sessions 10000] [--check 200] [--state-dir DIR]

The server is `vllm serve demo/model --plugin ttt` with 8 slots and 0.25 GiB of host memory for sessions. A session learns one
prompt; most are put away while others learn. Of every so many, one is looked at while nothing else runs: its log-probabilities
of a probe, and the SHA-256 of its adapter. Then the server is stopped and started again on the same state dir, and

* those are asked once more, each alone: log-probabilities and adapter must be the same, bit for bit. The first answer of each
  has to wake it, a second one right after it does not: the difference is the cost of waking;
* all are asked, in another order, and must be at the version that they had (0 where the prompt was noise and was not learned);
* a base answer is decoded alone, and again while 100 adapters are exported.

A dated JSON and a Markdown table are written to loadtests/results.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families
from runs import DEMO, HERE, about, save

from vllm_ttt.eval import server
from vllm_ttt.eval.texts import read_texts

FLAGS = [
    *(str(DEMO / "model"), "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**28), "--served-model-name", "demo"),
    *("--enforce-eager", *server.dtype_flags()),
]
CONFIG = {"sessions": {"resident": 8, "host_gib": 0.25, "per_key": 10**6, "keep_versions": 1}}
#: Tokens of what a session learns, and of the probe.
LEARNED, PROBE = 48, 32
AT_ONCE = 16


class Memory(threading.Thread):
    """Largest resident set, MB, of each process of a group, by its name in /proc."""

    def __init__(self, group: int):
        super().__init__(daemon=True)
        self.group, self.peak, self.ended = group, {}, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(1):
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != self.group:
                        continue
                    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                    if not fields["Name"].strip().startswith("VLLM::"):
                        continue
                    name, size = fields["Name"].strip(), int(fields["VmRSS"].split()[0]) / 1024
                    self.peak[name] = max(self.peak.get(name, 0), size)


class Client:
    def __init__(self, url: str):
        limits = httpx.Limits(max_connections=AT_ONCE + 4)
        self.http = httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits)

    async def complete(self, prompt: list[int], session: str | None, learn: bool, **options: Any) -> dict[str, Any]:
        body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True, **options}
        if session is not None:
            body |= {"session_id": session, "vllm_xargs": {"ttt_learn": int(learn)}}
        answer = await self.http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            sys.exit(answer.text)
        return answer.json()

    async def look(self, session: str, probe: list[int]) -> dict[str, Any]:
        """What the session is served with, and the hash of its adapter."""
        choice = (await self.complete(probe, session, False, prompt_logprobs=0))["choices"][0]
        adapter = await self.http.get(f"/v1/ttt/sessions/{session}/adapter")
        adapter.raise_for_status()
        scores = [next(iter(position.values()))["logprob"] for position in choice["prompt_logprobs"][1:]]
        tensors = adapter.content[8 + int.from_bytes(adapter.content[:8], "little") :]
        return {"logprobs": scores, "adapter": hashlib.sha256(tensors).hexdigest()}

    async def settled(self, session: str) -> None:
        """Until what was sent has been learned, or skipped."""
        while True:
            found = (await self.http.get(f"/v1/ttt/sessions/{session}")).json()
            if found["tokens_learned"] + sum(found["tokens_skipped"].values()) == found["tokens_seen"]:
                return
            await asyncio.sleep(0.01)

    async def versions(self) -> dict[str, int]:
        """Of every session."""
        listed = (await self.http.get("/v1/ttt/sessions", params={"limit": 10_000})).json()["sessions"]
        return {session["session_id"]: session["version"] for session in listed}

    async def gaps(self, prompt: list[int], tokens: int) -> dict[float, float]:
        """Of a base answer: upper bound in seconds -> how many times between two of its tokens were no longer.

        They are the engine core's own, by its clock: a client shares the machine's cores with the server, and waits for them.
        """
        before = await self._between_tokens()
        body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        (await self.http.post("/v1/completions", json=body)).raise_for_status()
        return {bound: count - before.get(bound, 0) for bound, count in (await self._between_tokens()).items()}

    async def _between_tokens(self) -> dict[float, float]:
        text = (await self.http.get("/metrics")).text
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        name = "vllm:inter_token_latency_seconds_bucket"
        return {float(s.labels["le"]): s.value for s in samples if s.name == name}


async def in_turn(jobs: Iterable[Callable[[], Awaitable[Any]]]) -> None:
    """Run jobs, AT_ONCE at a time."""
    left = iter(jobs)

    async def work() -> None:
        for job in left:
            await job()

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


class Run:
    def __init__(self, sessions: int, check: int):
        self.names = [f"session-{i}" for i in range(sessions)]
        self.step = max(1, sessions // check)
        self.seen: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, int] = {}
        self.memory: Memory | None = None
        self.figures: dict[str, Any] = {"sessions": sessions}

    def read(self, url: str) -> None:
        """The prompts: windows of the demo's texts, no two alike."""
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            encode = lambda text: http.post("/tokenize", json={"model": "demo", "prompt": text}).json()["tokens"]  # noqa: E731
            texts = [encode(text) for domain in read_texts(DEMO / "texts").values() for text in domain[:3]]
        self.probe = texts[-1][:PROBE]
        self.prompts = [text[at : at + LEARNED] for text in texts for at in range(0, len(text) - LEARNED, 7)]
        random.Random(0).shuffle(self.prompts)

    async def learn(self, url: str) -> None:
        self.read(url)
        client, began = Client(url), time.perf_counter()
        await client.complete(self.probe, None, False, prompt_logprobs=0)  # vLLM compiles a kernel at the first of these
        for first in range(0, len(self.names), self.step):
            wave = self.names[first : first + self.step]
            prompts = [self.prompts[i % len(self.prompts)] for i in range(first, first + len(wave))]
            await in_turn(
                lambda name=name, prompt=prompt: client.complete(prompt, name, True)
                for name, prompt in zip(wave, prompts, strict=True)
            )
            await client.settled(wave[0])
            self.seen[wave[0]] = await client.look(wave[0], self.probe)
            if first % (50 * self.step) == 0:
                print(f"{first + len(wave)} sessions, {time.perf_counter() - began:.0f} s", file=sys.stderr)
            if self.memory is not None and first <= len(self.names) // 10:
                self.figures["peak_tenth_mb"] = self.memory.peak.get("VLLM::Worker", 0)
        self.figures["learn_s"] = time.perf_counter() - began
        await client.settled(self.names[-1])
        await asyncio.sleep(2)
        began, self.versions = time.perf_counter(), await client.versions()
        self.figures["list_s"] = time.perf_counter() - began
        assert len(self.versions) == len(self.names)
        self.figures["skipped"] = sum(version == 0 for version in self.versions.values())

    async def come_back(self, url: str) -> None:
        client = Client(url)
        await client.complete(self.probe, None, False, prompt_logprobs=0)
        cold, warm, same = [], [], 0
        for name, before in self.seen.items():
            began = time.perf_counter()
            await client.complete(self.probe, name, False)
            middle = time.perf_counter()
            await client.complete(self.probe, name, False)
            cold.append(middle - began)
            warm.append(time.perf_counter() - middle)
            same += await client.look(name, self.probe) == before
        self.figures |= {"checked": len(self.seen), "same": same, "cold_s": cold, "warm_s": warm}
        order, began, wrong = random.Random(1).sample(self.names, len(self.names)), time.perf_counter(), []

        async def ask(name: str) -> None:
            if (await client.complete(self.probe, name, False))["ttt"]["version"] != self.versions[name]:
                wrong.append(name)

        await in_turn(lambda name=name: ask(name) for name in order)
        self.figures |= {"wrong_version": len(wrong), "all_s": time.perf_counter() - began}
        alone = await client.gaps(self.probe, 1900)
        exports: list[float] = []

        async def export() -> None:
            for name in random.Random(2).sample(list(self.seen), min(100, len(self.seen))):
                at = time.perf_counter()
                (await client.http.get(f"/v1/ttt/sessions/{name}/adapter")).raise_for_status()
                exports.append(time.perf_counter() - at)

        beside, _ = await asyncio.gather(client.gaps(self.probe, 1900), export())
        self.figures |= {"between_tokens": {"alone": alone, "exports": beside}, "export_s": exports}


def spread(seconds: list[float]) -> str:
    return f"{1e3 * median(seconds):.1f}, {1e3 * quantiles(seconds, n=100)[98]:.1f}"


def at_quantile(share: float, buckets: dict[float, float]) -> float:
    """The quantile of a cumulative histogram, linear within a bucket, as Prometheus' histogram_quantile has it."""
    wanted, low, below = share * max(buckets.values()), 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= wanted:
            return low + (min(bound, 2 * low) - low if math.isinf(bound) else bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def spread_of(buckets: dict[float, float]) -> str:
    return f"{1e3 * at_quantile(0.5, buckets):.1f}, {1e3 * at_quantile(0.99, buckets):.1f}"


def table(x: dict[str, Any]) -> str:
    rows = [
        ("sessions; of which learned nothing, their text being noise to the model", f"{x['sessions']}; {x['skipped']}"),
        ("learned and put away, s", f"{x['learn_s']:.0f}"),
        ("after the restart: same log-probabilities and adapter, bit for bit", f"{x['same']} of {x['checked']}"),
        ("asked again: at another version than they had", f"{x['wrong_version']} of {x['sessions']}"),
        ("listing all of them, s", f"{x['list_s']:.2f}"),
        (f"asking all, {AT_ONCE} at a time, s", f"{x['all_s']:.0f}"),
        ("answer of a session on disk, ms: median, 99th percentile", spread(x["cold_s"])),
        ("answer of the same session right after, ms", spread(x["warm_s"])),
        ("waking one costs, ms: difference of the medians", f"{1e3 * (median(x['cold_s']) - median(x['warm_s'])):.1f}"),
        ("start on the state dir, s; without sessions", f"{x['restart_s']:.1f}; {x['start_s']:.1f}"),
        ("files, GB", f"{x['state_bytes'] / 1e9:.2f}"),
        ("stop: until everything is saved and the server has ended, s", f"{x['stop_s']:.1f}"),
        (
            "time between a base answer's tokens in the engine, ms: median, 99th percentile",
            spread_of(x["between_tokens"]["alone"]),
        ),
        (f"the same beside {len(x['export_s'])} exports", spread_of(x["between_tokens"]["exports"])),
        ("an export, ms: median, 99th percentile", spread(x["export_s"])),
        ("largest resident set of VLLM::Worker after a tenth of the sessions, MB", f"{x['peak_tenth_mb']:.0f}"),
        *((f"largest resident set of {name}, MB", f"{size:.0f}") for name, size in sorted(x["peak_mb"].items())),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--check", type=int, default=200, help="sessions that are compared bit for bit")
    parser.add_argument("--state-dir", help="an empty folder; default: one that is removed afterwards")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder for the dated JSON and Markdown")
    args = parser.parse_args()
    report = about("sessions_on_disk.py")
    run = Run(args.sessions, args.check)
    with tempfile.TemporaryDirectory() as temporary:
        state, config = Path(args.state_dir or f"{temporary}/state"), Path(temporary) / "ttt.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        flags = [*FLAGS, "--ttt-config", str(config), "--ttt-state-dir", str(state)]
        peak: dict[str, float] = {}
        for part, name in ((run.learn, "start_s"), (run.come_back, "restart_s")):
            port, log, began = server.free_port(), Path(temporary) / f"{name}.log", time.perf_counter()
            with server.serve(flags, port, log, keep=False) as process:
                server.wait_healthy(process, port, log)
                run.figures[name] = time.perf_counter() - began
                print(f"{name} {run.figures[name]:.0f}", file=sys.stderr)
                memory = run.memory = Memory(process.pid)
                asyncio.run(part(f"http://127.0.0.1:{port}"))
                memory.ended.set()
                memory.join()
                peak = {key: max(peak.get(key, 0), size) for key, size in {**peak, **memory.peak}.items()}
                began = time.perf_counter()
                process.terminate()
                process.wait(120)
                run.figures.setdefault("stop_s", time.perf_counter() - began)
        run.figures["peak_mb"] = peak
        run.figures["state_bytes"] = sum(file.stat().st_size for file in (state / "sessions").rglob("*.safetensors"))
    report |= run.figures
    save("Sessions on disk", report, f"{CONFIG['sessions']}\n\n{table(report)}", args.out, "sessions")
    if run.figures["same"] != run.figures["checked"] or run.figures["wrong_version"]:
        sys.exit("not every session came back as it was")


if __name__ == "__main__":
    main()
