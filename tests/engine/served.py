"""A server that the tests talk to: HTTP as any client, and collective_rpc to look into the worker."""

from __future__ import annotations

import asyncio
import base64
import itertools
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from vllm_ttt.eval.oracle import Loop

Delta = dict[str, Tensor]
Documents = dict[str, list[list[int]]]

#: Of the demo model: hidden size, and attention output.
WIDTH = 384

#: A request whose answer holds the log-probability of every token.
SCORED: dict[str, Any] = {"prompt_logprobs": 0, "logprobs": 1, "max_tokens": 8, "ignore_eos": True}


@dataclass
class Served:
    url: str
    log: Path
    process: subprocess.Popen
    http: httpx.Client = field(init=False)
    names: int = 0

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def fresh(self, label: str = "s") -> str:
        """A session id that no test has used yet."""
        self.names += 1
        return f"{label}-{self.names}"

    def post(
        self, prompt: Any, session: str | None = None, *, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        return self.http.post("/v1/completions", json=completion(prompt, session, **body), headers=headers)

    def complete(self, prompt: Any, session: str | None = None, **body: Any) -> dict[str, Any]:
        answer = self.post(prompt, session, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def together(self, *bodies: dict[str, Any], headers: list[dict[str, str]] | None = None) -> list[httpx.Response]:
        """POST completions at once; the answers, in order."""

        async def send() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=self.url, timeout=120, trust_env=False, limits=limits) as http:
                extra = headers or [{}] * len(bodies)
                calls = [http.post("/v1/completions", json=b, headers=h) for b, h in zip(bodies, extra, strict=True)]
                return await asyncio.gather(*calls)

        return asyncio.run(send())

    def session(self, name: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/ttt/sessions/{name}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def rpc(self, method: str, *args: Any) -> Any:
        answer = self.http.post("/collective_rpc", json={"method": method, "args": list(args)})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"][0]

    def delta(self, name: str) -> Delta:
        """The master of a session, [out, R] by module, once all that it sent has been learned."""
        self.settle()
        self.session(name)
        return _decode(self.rpc("test_delta"))

    def learned_rows(self, name: str) -> tuple[Tensor, Tensor]:
        """(h [N, D], a [N, attention width]) of what the session has learned since ``test_watch``, in order."""
        self.settle()
        self.session(name)
        rows = _decode(self.rpc("test_learned_rows"))
        return rows["h"].view(-1, WIDTH), rows["a"].view(-1, WIDTH)

    def learned_states(self, name: str) -> Tensor:
        """The same with the preset head: the last hidden states, flat."""
        self.settle()
        self.session(name)
        return _decode({"h": self.rpc("test_learned_rows")["h"]})["h"]

    def settle(self) -> dict[str, int]:
        """Wait until nothing is under way in the worker; its state then."""
        deadline, state = time.monotonic() + 60, {}
        while time.monotonic() < deadline:
            state = self.rpc("test_state")
            if not any(state[key] for key in ("readings", "queued", "closing", "dirty")):
                return state
            time.sleep(0.02)
        raise AssertionError(f"the worker does not come to rest: {state}")

    def tried(self, name: str) -> dict[str, Any]:
        """The session, once the guard has tried its delta."""
        deadline, session = time.monotonic() + 30, {}
        while time.monotonic() < deadline:
            session = self.session(name)
            if session["probe_regression"] is not None:
                return session
            time.sleep(0.05)
        raise AssertionError(f"the guard has not tried it: {session}")

    def probe(self) -> list[list[int]]:
        """The guard's text as it is tried: pieces of 512 tokens, each of which begins with the last of the one before."""
        text = (Path(__file__).parents[2] / "configs" / "probe.txt").read_text()
        ids = self.http.post("/tokenize", json={"model": "demo", "prompt": text}).json()["tokens"]
        return [ids[start : start + min(512, 2048 - start + 1)] for start in range(0, 2048, 511)]

    def logged(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


#: tokens of one piece that a talker sends, and from one to the next; tokens of the answer
PIECE, STRIDE, ANSWER = 40, 30, 96


def answers_beside(served: Served, prompts: list[list[int]], talkers: Mapping[str, tuple[str | None, list[int]]]) -> list[Any]:
    """Answers to ``prompts``, each SCORED and without a session, one after the other, while others talk all the time.

    Requests are called ``base-I.`` by the number of their prompt, and ``LABEL-I`` by their talker.

    Args:
        talkers: by label: a session, or None, and the text of which it sends piece after piece.
    """
    talking: set[str] = set()

    async def talk(http: httpx.AsyncClient, label: str, session: str | None, text: list[int], done: asyncio.Event) -> None:
        for i in itertools.count():
            if done.is_set():
                return
            start = STRIDE * i % (len(text) - PIECE)
            body = completion(text[start : start + PIECE], session, max_tokens=ANSWER, ignore_eos=True)
            answer = await http.post("/v1/completions", json=body, headers={"X-Request-Id": f"{label}-{i}"})
            assert answer.status_code == 200, answer.text
            talking.add(label)

    async def run() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, trust_env=False, limits=limits) as http:
            done = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for label, (session, text) in talkers.items():
                    group.create_task(talk(http, label, session, text, done))
                while len(talking) < len(talkers):
                    await asyncio.sleep(0.01)
                answers = []
                for i, prompt in enumerate(prompts):
                    body, headers = completion(prompt, **SCORED), {"X-Request-Id": f"base-{i}."}
                    answers.append((await http.post("/v1/completions", json=body, headers=headers)).json())
                done.set()
        return answers

    return asyncio.run(run())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the Frobenius norm."""
    return ((found.reshape(expected.shape) - expected).norm() / expected.norm()).item()


def assert_same(delta: Delta, oracle: Loop) -> None:
    """The delta is the oracle's: relative error under 2 % in every module of every layer."""
    assert len(delta) == sum(map(len, oracle.B))
    for i, layer in enumerate(oracle.B):
        for key, expected in layer.items():
            assert expected.any(), "the oracle learned nothing: the comparison would prove nothing"
            assert relative_error(delta[f"{i or ''}{key}"], expected) < 0.02, (i, key)


def _decode(parts: dict[str, str]) -> Delta:
    return {k: torch.frombuffer(bytearray(base64.b64decode(v)), dtype=torch.float32) for k, v in parts.items()}


def completion(prompt: Any, session: str | None = None, **body: Any) -> dict[str, Any]:
    """The body of a request; ``session`` None: of the base model."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, **body}
    return body if session is None else {**body, "session_id": session}


def logprobs(answer: dict[str, Any]) -> list[float]:
    """Log-probabilities of the prompt's tokens but the first, then of the generated ones, exactly as the server gave them.

    For requests with ``prompt_logprobs: 0``: a position then holds its own token alone.
    """
    choice = answer["choices"][0]
    prompt = [next(iter(position.values()))["logprob"] for position in choice["prompt_logprobs"][1:]]
    return prompt + (choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else [])
