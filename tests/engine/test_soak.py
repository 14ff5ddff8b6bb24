"""`make load` in small: every kind of user for a while, no error that was not asked for, every session at its version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from load.logs import unexpected
from served import Served

from vllm_ttt import audit_log

pytestmark = pytest.mark.engine

LOAD = Path(__file__).parents[2] / "loadtests" / "run_load.py"
SECONDS = int(os.environ.get("TTT_SOAK", "60"))


def test_soak(server: Served, tmp_path: Path) -> None:
    before = {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]}
    logged = len(server.logged())
    options = ["--arms", "learning", "--seconds", str(SECONDS), "--base-url", server.url, "--out", str(tmp_path)]
    options += ["--server-pid", str(server.process.pid), "--no-yielding"]
    done = subprocess.run([sys.executable, str(LOAD), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (dated,) = tmp_path.glob("20*-load.json")
    figures = json.loads(dated.read_text())["arms"]["learning"]
    assert figures["errors"] == {}
    assert figures["audit"]["problems"] == []
    assert figures["audit"]["exact"] >= 3, "sessions whose version was compared"
    assert figures["audit"]["versions"] > 10
    kinds = {(row["what"], row["kind"]) for row in figures["rows"]}
    for kind in ("base", "documents", "repeated", "chat"):
        assert {("answer", kind), ("TTFT", kind), ("TPOT", kind)} <= kinds
    assert ("left", "hostile") in kinds
    assert {what for what, kind in kinds if kind.startswith("hostile: ")} == {"asked"}
    assert "VLLM::Worker" in figures["memory"]
    assert all(process["per_minute"] == process["per_minute"] for process in figures["memory"].values())
    assert done.stdout.strip() == dated.with_suffix(".md").read_text().strip()
    assert unexpected(server.logged()[logged:]) == []
    assert {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]} == before, "it leaves no session"
    told = audit_log.verify(server.log.parent / "audit.jsonl")
    assert told.problem is None
    assert min(told.events[event] for event in ("create", "learn", "serve", "delete")) > 0
    asked = {row["kind"]: row["count"] for row in figures["rows"] if row["what"] == "asked"}
    assert any(kind.startswith("owner: ") for kind in asked)
    for event in ("fork", "rollback", "freeze", "reset"):
        assert told.events[event] >= asked.get(f"owner: {event}", 0), "each that was answered is in the log"
    data = (server.log.parent / "audit.jsonl").read_bytes()
    for at in (0, len(data) // 3, len(data) - 2):
        (changed := tmp_path / "changed.jsonl").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert audit_log.verify(changed).problem is not None, "a byte that was changed is found"
