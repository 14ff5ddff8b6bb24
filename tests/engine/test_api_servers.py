"""Several API servers in front of one engine, which none of them has started: how they end."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import Stage, running
from served import Documents, Served, completion

from vllm_ttt.sessions.shelves import opened

pytestmark = pytest.mark.engine

#: Nothing is saved before the end.
CONFIG = {"adapt": {"preset": "last", "layers": 1, "rank": 8}, "learn": {"chunk": 64}, "sessions": {"autosave": 600.0}}
API_SERVERS, STREAMS = 2, 6


def streamed(served: Served, body: dict[str, Any], begun: threading.Barrier) -> str | None:
    """Why the answer ended; over a connection of its own. Meets the others at its first token."""
    reason = None
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        begun.wait(60)
        for line in lines:
            if line.startswith("data: {"):
                told = json.loads(line.removeprefix("data: "))
                reason = told["choices"][0]["finish_reason"] or reason if "choices" in told else "error"
    return reason


@pytest.mark.parametrize(("tokens", "flags", "reason"), [(400, [], "length"), (1900, ["--shutdown-timeout", "8"], "error")])
def test_what_runs_is_answered_and_what_was_learned_is_saved(
    stage: Stage, tmp_path: Path, documents: Documents, tokens: int, flags: list[str], reason: str
) -> None:
    """SIGTERM to the first process alone, as from Docker and Kubernetes; the others hear of it from that one. What takes too
    long is told that the engine ends."""
    stage.stop()
    (tmp_path / "ttt.yaml").write_text(yaml.safe_dump(CONFIG))
    flags = [*flags, "--ttt-config", str(tmp_path / "ttt.yaml"), "--ttt-state-dir", str(tmp_path / "state")]
    flags += ["--api-server-count", str(API_SERVERS)]
    names, texts = [f"session-{i}" for i in range(STREAMS)], [ids[:130] for ids in documents["kjv"][:STREAMS]]
    with running(tmp_path / "server.log", "vllm_ttt.cli", flags, {}) as served:
        first = [completion(text[:65], name) for name, text in zip(names, texts, strict=True)]
        assert [answer.status_code for answer in served.together(*first)] == [200] * STREAMS
        begun = threading.Barrier(STREAMS + 1)
        with ThreadPoolExecutor(STREAMS) as pool:
            more = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
            long = [completion(texts[i][65:], None if i % 2 else names[i], **more) for i in range(STREAMS)]
            answers = [pool.submit(streamed, served, body, begun) for body in long]
            begun.wait(60)
            os.kill(served.process.pid, signal.SIGTERM)
            assert [answer.result() for answer in answers] == [reason] * STREAMS
        assert served.process.wait(timeout=50) == 0, "it had 60 s, and needed all of them"
    found = {s["session_id"]: s["version"] for s in opened(tmp_path / "state").list()}
    assert found == {name: 1 if i % 2 else 2 for i, name in enumerate(names)}
