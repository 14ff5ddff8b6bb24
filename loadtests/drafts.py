"""Speculative decoding with and without sessions: how many drafts are accepted.

    vllm serve MODEL --plugin ttt --speculative-config '{"method": "ngram", "num_speculative_tokens": 4}'
    python loadtests/drafts.py TEXTS [--base-url http://127.0.0.1:8000]

A session for each domain of TEXTS (folders of .txt files) learns some documents. Then the beginning of another one is gone on
from, greedily, by the base model and in the session, which learns nothing of that. vLLM's own counters say what was drafted and
accepted; nobody else may use the server meanwhile.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from runs import HERE, about, save

from vllm_ttt.eval.texts import LENGTH, read_texts

COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


@dataclass
class Counted:
    """What a number of answers took."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Counted) -> Counted:
        return Counted(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def acceptance(self) -> float:
        """Of the drafted tokens."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / (self.tokens - self.accepted)


class Server:
    def __init__(self, url: str, prompt: int, tokens: int):
        self.http, self.prompt, self.tokens = httpx.Client(base_url=url, timeout=600, trust_env=False), prompt, tokens
        self.model = self.http.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def tokenize(self, text: str) -> list[int]:
        answer = self.http.post("/tokenize", json={"model": self.model, "prompt": text})
        return answer.raise_for_status().json()["tokens"]

    def complete(self, ids: list[int], session: str | None, **body: Any) -> None:
        body = {"model": self.model, "prompt": ids, "temperature": 0, **body}
        answer = self.http.post("/v1/completions", json=body | ({} if session is None else {"session_id": session}))
        answer.raise_for_status()

    def counters(self) -> list[int]:
        text = self.http.get("/metrics").raise_for_status().text
        found = [re.findall(rf"^vllm:spec_decode_{name}_total(?:\{{.*\}})? (\S+)$", text, re.M) for name in COUNTERS]
        if not all(found):
            raise SystemExit("the server counts no drafts: start it with --speculative-config")
        return [int(sum(map(float, values))) for values in found]

    def go_on(self, ids: list[int], session: str | None) -> Counted:
        """An answer to the beginning of a document."""
        before, began = self.counters(), time.perf_counter()
        extra = {} if session is None else {"vllm_xargs": {"ttt_learn": 0}}
        self.complete(ids[: self.prompt], session, max_tokens=self.tokens, ignore_eos=True, **extra)
        seconds = time.perf_counter() - began
        steps, drafted, accepted = (b - a for a, b in zip(before, self.counters(), strict=True))
        return Counted(steps, drafted, accepted, self.tokens, seconds)


def measure(server: Server, texts: Path, learned: int, asked: int) -> dict[str, dict[str, Counted]]:
    """By domain: what the base model and the session took."""
    found = {}
    for domain, documents in read_texts(texts).items():
        ids = [server.tokenize(text) for text in documents]
        ids = [x for x in ids if len(x) > LENGTH]
        session = f"drafts-{domain}-{time.time_ns()}"
        for document in ids[:learned]:
            server.complete(document[: LENGTH + 1], session, max_tokens=1)
        arms = {"base": Counted(), "session": Counted()}
        for document in ids[learned : learned + asked]:
            server.go_on(document, session)  # whoever waits until all is learned waits here
            for arm, name in (("base", None), ("session", session)):
                arms[arm] += server.go_on(document, name)
        found[domain] = arms
        server.http.delete(f"/v1/ttt/sessions/{session}").raise_for_status()
    return found


def table(found: dict[str, dict[str, Counted]]) -> str:
    """Markdown."""
    lines = ["| domain | who | drafted | accepted | acceptance | tokens a step | tokens/s |", "|" + " --- |" * 7]
    both = {arm: sum((arms[arm] for arms in found.values()), Counted()) for arm in ("base", "session")}
    for domain, arms in {**found, "all": both}.items():
        for arm, counted in arms.items():
            figures = f"{counted.drafted:,} | {counted.accepted:,} | {counted.acceptance:.3f} | {counted.tokens_per_step:.2f}"
            lines.append(f"| {domain} | {arm} | {figures} | {counted.tokens / counted.seconds:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--learned", type=int, default=8, help="documents that each session learns")
    parser.add_argument("--asked", type=int, default=4, help="documents that are gone on from")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a document that are given")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--out", default=str(HERE / "results"))
    parser.add_argument("--name", default="drafts")
    args = parser.parse_args()
    report = about("drafts.py", {str(args.texts): "TEXTS"})
    found = measure(Server(args.base_url, args.prompt, args.tokens), args.texts, args.learned, args.asked)
    report["domains"] = {domain: {arm: vars(counted) for arm, counted in arms.items()} for domain, arms in found.items()}
    save("Drafts with and without sessions", report, table(found), args.out, args.name)


if __name__ == "__main__":
    main()
