"""Does learning yield? How fast a backlog is learned while nobody is served, and while base answers are being written.

The same documents are sent twice, to fresh sessions, all at once. When they have been answered, most of them is still to be
learned: what is measured is how long that takes, and how many tokens base clients get meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx

#: Sessions, tokens that each is sent, base clients beside, and tokens of one base answer.
SESSIONS, TOKENS, CLIENTS, ANSWER = 6, 1900, 3, 600
#: Seconds of base traffic alone, for comparison.
ALONE = 8.0
#: Seconds from one look at what is pending to the next.
POLL = 0.1


class Probe:
    """``prompts``: SESSIONS lists of TOKENS ids."""

    def __init__(self, url: str, model: str, key: str | None, prompts: list[list[int]]):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=300, trust_env=False)
        self.model, self.prompts, self.written = model, prompts, 0

    async def run(self) -> dict[str, Any]:
        async with self.http:
            idle = await self.drain("yield-idle")
            clients = [asyncio.create_task(self.read_on(prompt[:100])) for prompt in self.prompts[:CLIENTS]]
            try:
                await asyncio.sleep(2)
                beside = await self.drain("yield-beside")
                before, began = self.written, time.perf_counter()
                while time.perf_counter() < began + ALONE:
                    await asyncio.sleep(POLL)
                    await self.pending([])  # as in `drain`: to be asked costs the server some of its pace, too
                alone = (self.written - before) / (time.perf_counter() - began)
            finally:
                for client in clients:
                    client.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        del idle["base_per_s"]
        return {"idle": idle, "beside": beside, "alone": {"base_per_s": alone}}

    async def drain(self, label: str) -> dict[str, float]:
        """Send all, wait for the answers, then until nothing is pending; then forget the sessions."""
        names = [f"{label}-{time.time_ns() // 10**6}-{i}" for i in range(SESSIONS)]
        bodies = [
            {"model": self.model, "prompt": prompt, "max_tokens": 1, "session_id": name}
            for prompt, name in zip(self.prompts, names, strict=True)
        ]
        answers = await asyncio.gather(*(self.http.post("/v1/completions", json=body) for body in bodies))
        for answer in answers:
            answer.raise_for_status()
        pending, began, written = await self.pending(names), time.perf_counter(), self.written
        left = pending
        while left:
            await asyncio.sleep(POLL)
            left = await self.pending(names)
        seconds = time.perf_counter() - began
        figures = {"tokens": pending, "learned_per_s": pending / seconds, "base_per_s": (self.written - written) / seconds}
        for name in names:
            (await self.http.delete(f"/v1/ttt/sessions/{name}")).raise_for_status()
        return figures

    async def pending(self, names: list[str]) -> int:
        """Tokens that are still to be learned."""
        found = (await self.http.get("/v1/ttt/sessions")).raise_for_status().json()["sessions"]
        mine = [session for session in found if session["session_id"] in names]
        return sum(s["tokens_seen"] - s["tokens_learned"] - sum(s["tokens_skipped"].values()) for s in mine)

    async def read_on(self, prompt: list[int]) -> None:
        """One base client: an answer after the other, its tokens counted."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": ANSWER, "ignore_eos": True, "stream": True}
        while True:
            async with self.http.stream("POST", "/v1/completions", json=body) as answer:
                with contextlib.suppress(httpx.RemoteProtocolError):
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            self.written += len(json.loads(line[6:])["choices"])
