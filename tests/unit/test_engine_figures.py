"""What loadtests/bench_engine.py makes of its times, and that the documents' tables of runs on GPUs are what it prints."""

from __future__ import annotations

import json
import shlex
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_engine
import engine_figures
import pytest
from dummy_adapter import write_adapter
from engine_figures import EVERYWHERE, SAME, Round
from gate import Gate
from safetensors import safe_open

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
MARK = "<!-- python loadtests/bench_engine.py --compare "


def test_cases_are_chosen_of_the_arm_with_sessions_alone() -> None:
    for chosen, expected in ((None, ["idle", "learn prompts", "learn all", "frozen"]), ("frozen,idle", ["idle", "frozen"])):
        assert list(bench_engine.cases(Namespace(arm="ttt", cases=chosen))) == expected
        assert list(bench_engine.cases(Namespace(arm="stock", cases=chosen))) == ["stock"]


def test_engines_that_are_up_together_take_turns(tmp_path: Path) -> None:
    args, happened, lock = Namespace(gate=str(tmp_path / "gate"), engines=2), list[str](), threading.Lock()

    def run(name: str) -> None:
        happened.append(f"{name} up")
        gate = Gate(args)
        for _ in range(3):
            with gate.turn():
                assert lock.acquire(blocking=False), "two turns at once"
                happened.append(name)
                time.sleep(0.2)
                lock.release()

    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, "a")
        time.sleep(0.2)
        assert happened == ["a up"], "it does not wait for the other"
        second = pool.submit(run, "b")
        first.result()
        second.result()
    assert sorted(happened[2:]) == ["a", "a", "a", "b", "b", "b"]


def test_without_a_gate_nobody_waits() -> None:
    gate = Gate(Namespace(gate=None))
    with gate.turn(), gate.turn():
        pass


def a_round(wall: float = 2.0, decode: float = 3.0, **fields: Any) -> Round:
    given: dict[str, Any] = {"tokens": 8, "learned": 4, "wall": wall, "drained": 2 * wall, "decode": decode}
    given.update({"ttft": [1.0], "tpot": [0.5], "itl": [0.5], **fields})
    return Round(**given)


def test_decode_is_tokens_over_time() -> None:
    """A stall of all counts in full, which the median time between two tokens does not show; a prefill does not."""
    steady = [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]]
    assert engine_figures.decode_rate(steady) == 7 / 4, "three of the first and four of the second, in four seconds"
    stalled = [[t + 4 * (t > 3) for t in times] for times in steady]
    assert engine_figures.decode_rate(stalled) == 7 / 8
    one_after_the_other = [[1.0, 2.0], [5.0]]
    assert engine_figures.decode_rate(one_after_the_other) == 2 / 4
    assert engine_figures.decode_rate([[1.0]]) == 0.0


def test_rounds_of_all_passes_count_alike() -> None:
    """Each pass is a process of its own; a figure is the median over the rounds of all."""
    runs = [
        {"startup_s": s, "kv_tokens": 10, "together": s, "cases": {"idle": {"2": [asdict(a_round(wall)) for wall in walls]}}}
        for s, walls in ((1.0, (1.0, 2.0)), (3.0, (4.0, 8.0)))
    ]
    merged = engine_figures.merge(runs)
    figures = merged["cases"]["idle"]["2"]
    assert figures["wall_s"] == 3.0
    assert figures["rounds_tokens_per_s"] == [8.0, 4.0, 2.0, 1.0]
    assert merged["startup_s"] == [1.0, 3.0]
    assert merged["together"] == 2.0
    assert bench_engine.order(["stock", "ttt"], 3) == ["stock", "ttt", "ttt", "stock", "stock", "ttt"]


def report_of(arms: dict[str, dict[str, Round]]) -> dict[str, Any]:
    """A report with one batch of 64 for each case."""
    return {
        "date": "2026-01-01",
        "hardware": "a GPU",
        "arms": {
            arm: {"kv_tokens": 10 if arm == "stock" else 8, "device_mib": None}
            | ({"together": 4.5} if arm == "ttt" else {})
            | {"cases": {name: {"64": engine_figures.figures([each])} for name, each in cases.items()}}
            for arm, cases in arms.items()
        },
    }


@pytest.mark.parametrize(("arms", "first"), [(["stock", "ttt"], "stock"), (["ttt"], "idle")])
def test_ratios_are_to_the_first_line(arms: list[str], first: str) -> None:
    """To stock vLLM; where that was not run, to ttt without sessions."""
    cases = {"stock": {"stock": a_round()}, "ttt": {"idle": a_round(), "frozen": a_round()}}
    report = report_of({arm: cases[arm] for arm in arms})
    lines = [line.split(" | ")[0].strip("| ") for line in engine_figures.table(report).splitlines()[2:]]
    assert lines == [first, *(f"{name} / {first}" for name in ("idle", "frozen") if name != first)]
    assert f"/ {arms[0]} |" in engine_figures.memory_table(report)


def test_runs_beside_each_other(tmp_path: Path) -> None:
    whole = report_of(
        {
            "stock": {"stock": a_round()},
            "ttt": {
                "idle": a_round(decode=2.97),
                "frozen": a_round(decode=2.7),
                "learn prompts": a_round(wall=4.0, tpot=[0.6], itl=[3.0], ttft=[1.1]),
            },
            "lora": {EVERYWHERE: a_round(decode=0.75)},
            "lora-same": {SAME: a_round(decode=1.5)},
        }
    )
    older = report_of({"ttt": {"idle": a_round(), "frozen": a_round()}})
    for figures in (sizes["64"] for sizes in older["arms"]["ttt"]["cases"].values()):
        figures["decode_tokens_per_s"] = figures.pop("decode_rate")
    for name, report in (("whole", whole), ("older", older)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    text = engine_figures.comparison([f"{tmp_path / 'whole.json'}=everything", str(tmp_path / "older.json")])
    rows = {cells[0]: cells[1:] for line in text.splitlines() for cells in [[c.strip() for c in line.split("|")[1:-1]]]}
    assert rows == {
        "": ["everything", "a GPU, 2026-01-01"],
        "---": ["---", "---"],
        "requests at once": ["64", "64"],
        "beside": ["stock", "idle"],
        "decode throughput, no session in the batch": ["0.990", ""],
        "decode throughput, sessions that do not learn": ["0.900", "1.000"],
        f"decode throughput, {SAME}": ["0.500", ""],
        f"decode throughput, {EVERYWHERE}": ["0.250", ""],
        "all throughput until the last commit, sessions that learn their prompts": ["0.500", ""],
        "TPOT p99 while they learn": ["1.200", ""],
        "time between two tokens, p99, while they learn": ["6.000", ""],
        "mean time to the first token while they learn": ["1.100", ""],
        "tokens that fit into the KV cache": ["0.800", ""],
        "8 sessions together / one after the other": ["4.50", "4.50"],
        "decode throughput is from": ["tokens over time", "the median gap"],
    }


def test_the_documents_say_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table below such a comment is what the command prints; no other table of a document compares with stock vLLM."""
    monkeypatch.chdir(ROOT)
    tables = 0
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        parts = path.read_text(encoding="utf-8").split(MARK)
        for part in parts[1:]:
            files, _, rest = part.partition(" -->\n")
            expected = engine_figures.comparison(shlex.split(files))
            found = rest.lstrip("\n").partition("\n\n")[0]
            assert found == expected, f"{path.name}: put in what `python loadtests/bench_engine.py --compare {files}` prints"
            tables += 1
        assert "| decode throughput" not in parts[0]
    assert tables


def test_adapters_on_the_same_modules_as_ttt(tmp_path: Path) -> None:
    """At its rank, on its layers; vLLM's fused layers are what they are made of."""
    from transformers import AutoConfig

    model = ROOT / "demo" / "model"
    config = {"adapt": {"preset": "last"}}
    args = Namespace(arm="lora-same", model=str(model), slots=2, config=json.dumps(config))
    rank, modules = bench_engine.adapters(args)
    assert rank == 128
    hf = AutoConfig.from_pretrained(model)
    folder = write_adapter(tmp_path, hf, rank, modules)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = {name.partition("layers.")[2].rpartition(".lora")[0] for name in file.keys()}  # noqa: SIM118
    last = hf.num_hidden_layers - 1
    assert names == {f"{last}.{n}" for n in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == {
        "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    args.arm = "lora"
    assert bench_engine.adapters(args) == (16, None)
