"""`make bench` in small: does it measure what it says, and write it down? How long things take is not for a test to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served

pytestmark = pytest.mark.engine

BENCH = Path(__file__).parents[2] / "loadtests" / "bench_cpu.py"


def test_bench_cpu(server: Served, tmp_path: Path) -> None:
    before = {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]}
    options = ["--requests", "2", "--base-url", server.url, "--out", str(tmp_path), "--json", str(tmp_path / "copy.json")]
    done = subprocess.run([sys.executable, str(BENCH), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (dated,) = tmp_path.glob("20*-cpu.json")
    report = json.loads(dated.read_text())
    assert report == json.loads((tmp_path / "copy.json").read_text())
    assert {arm: len(x["seconds"]) for arm, x in report["arms"].items()} == dict.fromkeys(
        ("base", "unlearned", "learned", "unlearned back to back", "learned back to back"), 2
    )
    for name, ratio in report["ratios"].items():
        assert f"| {name} | {ratio['ratio']:.2f} |" in done.stdout
    assert "hardware" in report
    assert "vllm" in report["versions"]
    assert done.stdout.strip() == dated.with_suffix(".md").read_text().strip()
    assert {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]} == before, "it leaves no session"
