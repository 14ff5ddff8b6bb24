"""`vllm bench serve` as it comes, against a server that learns: docs/load.md has the command, and this runs it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import forked
import pytest
from served import Documents, Served

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PROMPTS = 6


def documented() -> list[str]:
    """The command of docs/load.md, its options as they stand there."""
    text = (ROOT / "docs" / "load.md").read_text(encoding="utf-8")
    found = re.search(r"^vllm (bench serve .+?)\n```", text, re.MULTILINE | re.DOTALL)
    assert found
    return [word.strip("'") for word in re.findall(r"'[^']+'|\S+", found.group(1).replace("\\\n", " "))]


def test_the_documented_command(server: Served, documents: Documents, tmp_path: Path) -> None:
    command = documented()
    changed = {
        "--base-url": server.url,
        "--model": "demo",
        "--tokenizer": str(ROOT / "demo" / "model"),
        "--dataset-path": str(tmp_path / "prompts.jsonl"),
        "--num-prompts": str(PROMPTS),
    }
    assert set(changed) <= set(command)
    for option, value in changed.items():
        command[command.index(option) + 1] = value
    text = (ROOT / "demo" / "texts" / "kjv" / "000_kjv_00.txt").read_text(encoding="utf-8")
    prompts = [text[at : at + 900] for at in range(0, PROMPTS * 900, 900)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    body = json.loads(command[command.index("--extra-body") + 1])
    name = body["session_id"]
    assert server.http.get(f"/v1/ttt/sessions/{name}").status_code == 404
    result = tmp_path / "result.json"
    program = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command]
    program += ["--save-result", "--save-detailed", "--result-filename", str(result)]
    code, output = forked.run(program, tmp_path / "log")
    assert code == 0, output[-4000:]
    figures = json.loads(result.read_text())
    assert (figures["completed"], figures["failed"]) == (PROMPTS, 0)
    server.settle()
    session = server.session(name)
    sent = sum(length - 1 for length in figures["input_lens"])
    assert session["tokens_seen"] == session["tokens_learned"] + sum(session["tokens_skipped"].values())
    assert session["tokens_seen"] == sent > 0, "each prompt was sent for learning"
    assert session["version"] >= PROMPTS, "and each is at least one chunk"
    assert server.http.delete(f"/v1/ttt/sessions/{name}").status_code == 200
