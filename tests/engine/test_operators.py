"""What an operator shows: a deleted session has left nothing, the base model is what it was, and the audit log tells of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Stage, running_ttt
from served import SCORED, Documents, Served, logprobs

from vllm_ttt import audit_log
from vllm_ttt.sessions.offline import Offline

pytestmark = pytest.mark.engine

NAME = "alice-of-the-second-floor"


@pytest.fixture(scope="module")
def kept(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server with a state dir, and the folder that has it."""
    stage.stop()
    folder = tmp_path_factory.mktemp("operators")
    learn = {"chunk": 256, "filter": [r"\b\d{4} \d{4} \d{4} \d{4}\b"]}
    config = {"learn": learn, "sessions": {"resident": 4, "autosave": 1.0}}
    with running_ttt(folder, config, ["--dtype", "float32", "--ttt-state-dir", str(folder / "state")]) as served:
        yield served, folder


def found(folder: Path, *texts: str | bytes) -> list[str]:
    """Files below ``folder`` that have one of the texts in their bytes or in their name."""
    wanted = [text.encode() if isinstance(text, str) else text for text in texts]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(f) for f in files if any(text in f.read_bytes() or text in str(f).encode() for text in wanted)]


def scored(served: Served, prompt: list[int], name: str | None = None) -> list[float]:
    return logprobs(served.complete(prompt, name, **({"vllm_xargs": {"ttt_learn": 0}} if name else {}), **SCORED))


def cached(served: Served, prompt: list[int], name: str) -> int:
    """Tokens of a prompt that the session reads from the prefix cache."""
    usage = served.complete(prompt, name, vllm_xargs={"ttt_learn": 0})["usage"]
    return (usage["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]


def test_a_deleted_session_has_left_nothing(kept: tuple[Served, Path], documents: Documents) -> None:
    served, folder = kept
    state, route, probe = folder / "state", f"/v1/ttt/sessions/{NAME}", documents["man2"][3][:300]
    base = scored(served, probe)
    for text in documents["man2"][:3]:
        served.complete(text[:600], NAME)
    served.settle()
    version = served.http.post(f"{route}/save").json()["saved_version"]
    under_delta = scored(served, probe, NAME)
    assert max(abs(a - b) for a, b in zip(base, under_delta, strict=True)) > 0.1, "it has learned nothing"
    asked = documents["man2"][4][:300]  # of this session alone
    assert [cached(served, asked, NAME) for _ in range(2)] == [0, 256], "its blocks are in the prefix cache"
    assert served.http.post(f"{route}/fork", json={"to": "copy"}).json()["version"] == version
    exported = json.loads(bytes_of_header(served.http.get(f"{route}/adapter").content)["__metadata__"]["provenance"])
    row = Offline(state).find(NAME)
    pieces = [text_of(documents["man2"][i][:600]) for i in range(3)]
    prompts = [digest for digest, *_ in row.state["history"]]
    for text in (NAME, row.uid, exported["digest_sha256"], *pieces):
        assert found(state, text), "the state dir has it, or that it is gone proves nothing"
    assert found(state, *prompts)

    answer = served.http.request("DELETE", route)
    assert answer.status_code == 200, answer.text
    receipt = answer.json()
    assert (receipt["session_id"], receipt["version"], receipt["deleted"]) == (NAME, version, True)
    assert receipt["digest"] == exported["digest_sha256"], "what was removed is what had been exported"
    assert receipt["files"][-1]["digest"] == receipt["digest"]
    assert (receipt["files_left"], receipt["database_wiped"]) == ([], True)
    assert found(state, NAME, row.uid, *(f["sha256"] for f in receipt["files"])) == []

    assert served.http.get(route).status_code == 404
    assert served.http.get(f"{route}/adapter").status_code == 404
    assert served.http.post(f"{route}/rollback", json={"version": 1}).status_code == 404
    assert NAME not in served.http.get("/v1/ttt/sessions").text
    assert cached(served, asked, NAME) == 0, "no block that was computed under its delta is read again"
    assert scored(served, probe, NAME) == base, "the bits of the base model are back"
    assert scored(served, probe) == base
    assert scored(served, probe, "copy") == under_delta, "its fork is another session"
    assert found(state, NAME, row.uid) == [], "a request that learns nothing writes nothing"
    # The fork has what it has taken over. When it is gone too, so are the tokens, the hashes of the prompts, and every digest.
    assert found(state, *pieces)
    assert served.http.request("DELETE", "/v1/ttt/sessions/copy").json()["digest"] == receipt["digest"]
    assert found(state, *pieces, *prompts, *(f["digest"] for f in receipt["files"])) == []


def test_the_audit_log_tells_what_was_done_and_not_with_what(kept: tuple[Served, Path], documents: Documents) -> None:
    served, folder = kept
    name, route = "bob-on-the-stairs", "/v1/ttt/sessions/bob-on-the-stairs"
    answer = served.complete(documents["kjv"][0][:600], name, max_tokens=3)
    served.complete(documents["kjv"][1][:520], name)
    served.settle()
    learned = served.session(name)["tokens_learned"]
    for op in ("freeze", "unfreeze", "save"):
        assert served.http.post(f"{route}/{op}").status_code == 200
    served.http.get(f"{route}/adapter")
    receipt = served.http.request("DELETE", route).json()
    path = folder / "audit.jsonl"
    assert audit_log.verify(path).problem is None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    told = [line for line in lines if line.get("session") == name]
    assert [line["event"] for line in told if line["event"] not in ("learn", "serve")] == [
        "create", "freeze", "unfreeze", "export", "delete",
    ]  # fmt: skip
    assert sum(line["tokens"] for line in told if line["event"] == "learn") == learned > 512
    served_lines = [line for line in told if line["event"] == "serve"]
    assert [(line["prompt_tokens"], line["generated_tokens"], line["end"]) for line in served_lines] == [
        (600, 3, "length"), (520, 1, "length"),
    ]  # fmt: skip
    assert answer["id"] in served_lines[0]["request"], "a request is found by the id that its client was told"
    assert {line["request"] for line in told if line["event"] == "learn"} == {line["request"] for line in served_lines}
    assert told[-1]["digest"] == receipt["digest"] == told[-2]["digest"]
    assert len({line["uid"] for line in told}) == 1
    allowed = {
        "seq", "time", "event", "tenant", "session", "uid", "request", "tokens", "version", "prev", "hash", "prompt_tokens",
        "generated_tokens", "end", "tokens_learned", "digest", "bytes", "files", "files_left", "database_wiped",
    }  # fmt: skip
    assert {key for line in told for key in line} <= allowed, "there is no place for content"


def test_what_a_pattern_matches_is_not_learned(kept: tuple[Served, Path]) -> None:
    served, _ = kept
    text = "The order of Tuesday was paid with 4111 1111 1111 1111, and what came of it is written in the book. "
    for name, line in (("paid-by-card", text), ("paid-in-cash", text.replace("4111 1111 1111 1111", "coins of silver"))):
        answer = served.complete(line * 3 + "Nobody knows who has paid for the rest of it, nor when.", name)
        served.settle()
        session = served.session(name)
        out = session["tokens_skipped"].get("filter", 0)
        assert (out > 20) == (name == "paid-by-card")
        assert session["tokens_learned"] + out == session["tokens_seen"] == answer["usage"]["prompt_tokens"] - 1
        assert answer["ttt"]["tokens_learned"] == session["tokens_learned"]
        assert session["version"] >= 1


def bytes_of_header(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def text_of(tokens: list[int]) -> bytes:
    """A few tokens of a prompt as the state dir would have them, if it had them: as numbers of 32 bits."""
    return struct.pack("<8i", *tokens[100:108])
