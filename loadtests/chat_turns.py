"""A chat that grows turn by turn: what a session's turn costs beside the base model's, and whether each token is learned once.

    python loadtests/chat_turns.py demo/real/smollm2 demo/real/texts     starts `vllm serve MODEL --plugin ttt` itself

Two chats send the same twenty user messages, in turns: one without a session, one in a session that learns. Both go on from
what the model answered. A session's turn begins when what the turn before sent has been learned: a person reads longer than
that. Told of each turn: tokens of the prompt, how many of them came from the prefix cache, time to the first token of each
chat, and their ratio; at the end, tokens of the last prompt and tokens learned.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from runs import HERE, about, save, served

from vllm_ttt.eval.texts import read_texts

TURNS, WORDS, ANSWER = 20, 50, 32


def messages(texts: Path) -> list[str]:
    """What the user says: consecutive pieces of one document after another."""
    words = [word for documents in read_texts(texts).values() for document in documents[:6] for word in document.split()]
    return ["Look at this:\n" + " ".join(words[i * WORDS : (i + 1) * WORDS]) for i in range(TURNS)]


class Chat:
    """One conversation. ``session``: its session, or None."""

    def __init__(self, http: httpx.Client, model: str, session: str | None):
        self.http, self.model, self.session = http, model, session
        self.history: list[dict[str, str]] = []

    def turn(self, message: str) -> dict[str, Any]:
        """Say something; returns tokens of the prompt, cached tokens and seconds to the first token."""
        self.history.append({"role": "user", "content": message})
        body: dict[str, Any] = {
            "model": self.model, "messages": self.history, "max_tokens": ANSWER, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.session is not None:
            body["session_id"] = self.session
        began, first, answer, usage = time.perf_counter(), None, "", {}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            stream.raise_for_status()
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if (text := choice["delta"].get("content")) and first is None:
                        first = time.perf_counter() - began
                    answer += text or ""
        assert first is not None, "the model said nothing"
        self.history.append({"role": "assistant", "content": answer})
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return {"prompt": usage["prompt_tokens"], "cached": cached, "ttft": first}

    def state(self) -> dict[str, Any]:
        """Of the session, once nothing waits to be learned."""
        while True:
            found = self.http.get(f"/v1/ttt/sessions/{self.session}").raise_for_status().json()
            if not found["tokens_pending"] and not found["requests_open"]:
                return found
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--config", default="{}", help="settings, YAML, for the server")
    parser.add_argument("--rounds", type=int, default=3, help="chats of each kind, each in a session of its own")
    parser.add_argument("--name", default="chat-turns")
    args = parser.parse_args()
    flags = [args.model, "--served-model-name", "chat", "--max-model-len", "8192", "--kv-cache-memory-bytes", str(2**31),
             "--enable-prompt-tokens-details", "--dtype", "float32", "--enforce-eager"]  # fmt: skip
    run, rounds, said = about("chat_turns.py"), [], messages(args.texts)
    with (
        served(flags, args.config) as url,
        httpx.Client(base_url=url, timeout=900, trust_env=False) as http,
    ):
        model = http.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for number in range(args.rounds):
            base, session = Chat(http, model, None), Chat(http, model, f"chat-{number}")
            turns = []
            for message in said:
                message = f"({number}) {message}"  # nothing of an earlier round is in the cache
                found = {"base": base.turn(message), "session": session.turn(message)}
                found["version"] = session.state()["version"]
                turns.append(found)
                print(number, len(turns), found, flush=True)
            rounds.append({"turns": turns, "state": session.state()})
    lines = [
        "| turn | prompt tokens | cached: base | cached: session | TTFT base, ms | TTFT session, ms | ratio |",
        "| --- " * 7 + "|",
    ]
    for i in range(TURNS):
        at = [r["turns"][i] for r in rounds]
        middle = lambda arm, key, at=at: median(t[arm][key] for t in at)  # noqa: E731
        ratio = median(t["session"]["ttft"] / t["base"]["ttft"] for t in at)
        lines.append(
            f"| {i + 1} | {middle('session', 'prompt'):.0f} | {middle('base', 'cached'):.0f} "
            f"| {middle('session', 'cached'):.0f} | {1e3 * middle('base', 'ttft'):.0f} "
            f"| {1e3 * middle('session', 'ttft'):.0f} | {ratio:.2f} |"
        )
    states = [r["state"] for r in rounds]
    last = [r["turns"][-1]["session"]["prompt"] for r in rounds]
    learned, skipped = ([str(s[key]) for s in states] for key in ("tokens_learned", "tokens_skipped"))
    told = {"Last prompt, tokens": map(str, last), "Learned": learned, "Not learned": skipped}
    lines += ["", *(f"{what}: {', '.join(values)}.  " for what, values in told.items())]
    run |= {"server": "vllm serve " + " ".join(flags) + " --plugin ttt", "rounds": rounds}
    save("A chat that grows, turn by turn", run, "\n".join(lines), HERE / "results", args.name)


if __name__ == "__main__":
    main()
