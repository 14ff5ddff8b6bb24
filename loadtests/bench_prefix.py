"""What the prefix cache gives sessions: a system prompt that many share, and chats that grow.

    python loadtests/bench_prefix.py [--sessions 50] [--base-url http://127.0.0.1:8000]

The server is `vllm serve demo/model --plugin ttt`, or the one at --base-url. One request at a time, each after what was sent
before has been learned. "Not shared" gives each round of requests a `cache_salt` of its own. A dated JSON and a Markdown table
are written to loadtests/results.
"""

from __future__ import annotations

import argparse
import time
import uuid
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from runs import DEMO, EAGER, HERE, about, save, served

SYSTEM, QUESTION, TURN = 1000, 40, 100


class Client:
    def __init__(self, url: str):
        self.http = httpx.Client(base_url=url, timeout=300, trust_env=False)
        self.model: str = self.http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        files = sorted((DEMO / "texts").glob("*/*.txt"))
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        answer = self.http.post("/tokenize", json={"model": self.model, "prompt": text[:200_000], "add_special_tokens": False})
        self.tokens: list[int] = answer.raise_for_status().json()["tokens"]

    def send(self, prompt: list[int], session: str | None = None, learn: int = 1, salt: str | None = None) -> dict[str, Any]:
        """Ask for one token: the time to it is the time to the first."""
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        if session:
            body |= {"session_id": session, "vllm_xargs": {"ttt_learn": learn}}
        if salt:
            body["cache_salt"] = salt
        begin = time.perf_counter()
        answer = self.http.post("/v1/completions", json=body).raise_for_status().json()
        seconds = time.perf_counter() - begin
        cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        if session and learn:
            while self.http.get(f"/v1/ttt/sessions/{session}").json()["tokens_pending"]:
                time.sleep(0.01)
        return {
            "seconds": seconds,
            "cached": cached,
            "prompt": len(prompt),
            "learned": answer.get("ttt", {}).get("tokens_learned"),
        }


def shared(client: Client, sessions: int) -> dict[str, list[dict[str, Any]]]:
    """Questions under one system prompt: of the base model, of sessions that read, and of sessions that learn and go on."""
    run, system = uuid.uuid4().hex[:8], client.tokens[:SYSTEM]
    question = lambda i: client.tokens[SYSTEM + QUESTION * i : SYSTEM + QUESTION * (i + 1)]  # noqa: E731
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind in ("not shared", "shared"):
        for i in range(sessions):
            salt = f"{run}-{kind}" if kind == "shared" else f"{run}-{i}"
            name, first = f"{run}-{kind.replace(' ', '-')}-{i}", [*system, *question(i)]
            send = lambda label, *args, salt=salt, kind=kind: rows.setdefault(f"{label}, {kind}", []).append(  # noqa: E731
                client.send(*args, salt=salt)
            )
            send("base model", [*system, *question(i + sessions)])
            send("session, learns nothing", [*system, *question(i + 2 * sessions)], f"{name}-r", 0)
            send("session, first turn, learns", first, name)
            send("session, second turn, learns what is new", [*first, *question(i + 3 * sessions)], name)
    return rows


def chat(client: Client) -> list[dict[str, Any]]:
    """20 turns that grow to 2,000 tokens."""
    name = f"chat-{uuid.uuid4().hex[:8]}"
    return [client.send(client.tokens[-2000:][: TURN * turn], name, salt=name) for turn in range(1, 21)]


def table(report: dict[str, Any]) -> str:
    lines = [
        "| one system prompt of 1,000 tokens | TTFT, ms, median | tokens read from the cache | of |",
        "| --- | --- | --- | --- |",
    ]
    for name, rows in report["shared"].items():
        seconds, cached = median(r["seconds"] for r in rows), median(r["cached"] for r in rows)
        lines.append(f"| {name} | {1e3 * seconds:.0f} | {cached:.0f} | {rows[-1]['prompt']} |")
    lines += ["", "| turn of a chat | tokens | learned | read from the cache | TTFT, ms |", "| --- | --- | --- | --- | --- |"]
    for turn, row in enumerate(report["chat"], 1):
        if turn in (1, 2, 5, 10, 15, 20):
            lines.append(f"| {turn} | {row['prompt']} | {row['learned']} | {row['cached']} | {1e3 * row['seconds']:.0f} |")
    learned = sum(row["learned"] for row in report["chat"])
    lines += ["", f"Learned over the 20 turns: {learned} of {report['chat'][-1]['prompt'] - 1} tokens, each once."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--base-url")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    report = about("bench_prefix.py")
    with served([*EAGER, "--enable-prompt-tokens-details"], url=args.base_url) as url:
        client = Client(url)
        client.send(client.tokens[:500], "warm-up")
        report |= {"shared": shared(client, args.sessions), "chat": chat(client)}
    save("The prefix cache and sessions", report, table(report), args.out, "prefix")


if __name__ == "__main__":
    main()
