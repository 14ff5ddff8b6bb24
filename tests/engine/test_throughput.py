"""`loadtests/bench_engine.py` in small: does it measure what it says, and write it down? It brings engines of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_engine
import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}


def test_bench_engine(stage: Any, tmp_path: Path) -> None:
    stage.stop()
    # An odd number of rounds: the median of rates is then the rate of the median time.
    flags = {"batches": 2, "repeat": 3, "tokens-in": 40, "tokens-out": 4, "slots": 2, "max-model-len": 256, "name": "small"}
    flags |= {"options": json.dumps(OPTIONS), "out": tmp_path, "arms": "ttt"}
    command = [sys.executable, str(ROOT / "loadtests" / "bench_engine.py"), str(ROOT / "demo" / "model")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (dated,) = tmp_path.glob("20*-small.json")
    report = json.loads(dated.read_text())
    assert done.stdout.strip() == dated.with_suffix(".md").read_text().strip()
    cases = {name: sizes["2"] for arm in report["arms"].values() for name, sizes in arm["cases"].items()}
    assert set(cases) == {"idle", "frozen", "learn prompts", "learn all"}
    for name, figures in cases.items():
        assert figures["wall_s"] <= figures["drained_s"]
        assert figures["tpot_p50_ms"] <= figures["tpot_p99_ms"]
        # 39 tokens of each prompt, and of each answer of four tokens the last three and the first
        learned = {"learn prompts": 2 * 39}.get(name, 0)
        if name != "learn all":
            assert round(figures["learned_per_s"] * figures["drained_s"]) == pytest.approx(learned, abs=2)
        assert f"| {name} / idle | 2 |" in done.stdout or name == "idle"
    assert cases["learn all"]["learned_per_s"] > 0
    assert report["arms"]["ttt"]["kv_tokens"] > 0


@pytest.mark.parametrize(("arms", "first"), [(["stock", "ttt"], "stock"), (["ttt"], "idle")])
def test_ratios_are_to_the_first_line(arms: list[str], first: str) -> None:
    """To stock vLLM; where that was not run, to ttt without sessions."""
    figures = dict.fromkeys(bench_engine.figures([bench_engine.Round(8, 4, 2.0, 4.0, [1.0], [0.5], [0.5])], 1), 3.0)
    cases = {"stock": {"stock": {"64": figures}}, "ttt": {"idle": {"64": figures}, "frozen": {"64": figures}}}
    report = {"arms": {arm: {"kv_tokens": 10, "device_mib": None, "cases": cases[arm]} for arm in arms}}
    lines = [line.split(" | ")[0].strip("| ") for line in bench_engine.table(report).splitlines()[2:]]
    expected = [first, *(f"{name} / {first}" for name in ("idle", "frozen") if name != first)]
    assert lines == expected
    assert f"/ {arms[0]} |" in bench_engine.memory_table(report)
