"""`loadtests/bench_engine.py` in small: does it measure what it says, and write it down? It brings engines of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}


def test_bench_engine(stage: Any, tmp_path: Path) -> None:
    stage.stop()
    # An odd number of rounds: the median of rates is then the rate of the median time.
    flags = {"batches": 2, "repeat": 3, "tokens-in": 40, "tokens-out": 4, "slots": 2, "max-model-len": 256}
    flags |= {"name": "small", "passes": 1, "options": json.dumps(OPTIONS), "out": tmp_path, "arms": "ttt"}
    command = [sys.executable, str(ROOT / "loadtests" / "bench_engine.py"), str(ROOT / "demo" / "model")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (dated,) = tmp_path.glob("20*-small.json")
    report = json.loads(dated.read_text())
    assert done.stdout.strip() == dated.with_suffix(".md").read_text().strip()
    cases = {name: sizes["2"] for arm in report["arms"].values() for name, sizes in arm["cases"].items()}
    assert set(cases) == {"idle", "frozen", "learn prompts", "learn all"}
    assert report["order"] == ["ttt"]
    for name, figures in cases.items():
        assert figures["wall_s"] <= figures["drained_s"]
        assert figures["tpot_p50_ms"] <= figures["tpot_p99_ms"]
        # both requests have a token after the other's first
        assert figures["decode_rate"] > figures["wall_s"] ** -1
        # 39 tokens of each prompt, and of each answer of four tokens the last three and the first
        learned = {"learn prompts": 2 * 39}.get(name, 0)
        if name != "learn all":
            assert round(figures["learned_per_s"] * figures["drained_s"]) == pytest.approx(learned, abs=2)
        assert f"| {name} / idle | 2 |" in done.stdout or name == "idle"
    assert cases["learn all"]["learned_per_s"] > 0
    assert report["arms"]["ttt"]["kv_tokens"] > 0
