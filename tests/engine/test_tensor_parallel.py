"""--tensor-parallel-size 2: two ranks learn what one does, each serves the files of the other, and base bits are stock's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import HERE, Stage, bound, running
from load.logs import unexpected
from served import SCORED, Documents, Served, logprobs
from torch import Tensor

pytestmark = [pytest.mark.engine, pytest.mark.alone]

MODULES = ["o_proj", "gate_up_proj", "down_proj"]
#: All modules, of all layers and of the last: the step begins at the embedding, or at what was captured.
ADAPT: dict[str, dict[str, Any]] = {
    "deep": {"preset": "deep", "modules": MODULES, "rank": 16},
    "last": {"preset": "last", "rank": 32},
}
#: A guard that tries every few commits, and lets everything pass.
CONFIG: dict[str, Any] = {
    "learn": {"chunk": 64},
    "schedule": {"tokens_per_step": 64},
    "sessions": {"resident": 4, "version_every": 1},
    "guard": {"every": 2, "max_regression": 100, "probe_tokens": 64},
}
READ: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0}, **SCORED}
LENGTHS = (200, 131)
LOAD, SECONDS = HERE.parents[1] / "loadtests" / "run_load.py", int(os.environ.get("TTT_SOAK", "60"))


@contextlib.contextmanager
def serving(folder: Path, preset: str, ranks: int) -> Iterator[Served]:
    """On the state dir of the preset."""
    (folder / "ttt.yaml").write_text(yaml.safe_dump({**CONFIG, "adapt": ADAPT[preset]}))
    log, state = folder / f"{preset}-{ranks}.log", str(folder / f"state-{preset}")
    flags = ["--ttt-config", str(folder / "ttt.yaml"), "--ttt-state-dir", state, "--dtype", "float32"]
    worker = ["--worker-cls", "slow_rank.SlowRank"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", **bound(range(ranks))}
    flags += [*worker, "--tensor-parallel-size", str(ranks)]
    with running(log, "vllm_ttt.cli", flags, environment) as served:
        served.http.timeout = 300
        yield served


@dataclass
class Learned:
    losses: list[float]
    version: int
    scores: list[float]
    #: the adapter, and the digest of B in float32
    adapter: dict[str, Tensor]
    digest: str


def learn(served: Served, name: str, documents: Documents) -> None:
    for text, length in zip(documents["kjv"], LENGTHS, strict=False):
        served.complete(text[:length], name, max_tokens=4)
        served.session(name)


def look(served: Served, name: str, documents: Documents) -> Learned:
    """What a session is, once it has been saved."""
    scores = logprobs(served.complete(documents["kjv"][5][:100], name, **READ))
    saved = served.http.post(f"/v1/ttt/sessions/{name}/save")
    assert saved.status_code == 200, saved.text
    session = saved.json()
    assert session["saved_version"] == session["version"]
    file = served.http.get(f"/v1/ttt/sessions/{name}/adapter").content
    with safetensors.torch.safe_open(write(served, file), "pt") as opened:  # type: ignore[attr-defined]
        digest = json.loads(opened.metadata()["provenance"])["digest_sha256"]
    losses = [chunk["loss"] for chunk in session["losses"]]
    return Learned(losses, session["version"], scores, safetensors.torch.load(file), digest)


def write(served: Served, data: bytes) -> Path:
    path = served.log.with_suffix(".safetensors")
    path.write_bytes(data)
    return path


def same_bits(one: Learned, other: Learned) -> None:
    assert (one.version, one.digest) == (other.version, other.digest)
    assert one.adapter.keys() == other.adapter.keys()
    for name, tensor in one.adapter.items():
        if "lora_B" in name:
            assert torch.equal(tensor, other.adapter[name]), name
        else:  # A is drawn anew by each server
            torch.testing.assert_close(tensor, other.adapter[name])


def near(one: Learned, other: Learned) -> None:
    """The same text has been learned."""
    assert one.version == other.version > 3
    assert one.losses == pytest.approx(other.losses, abs=1e-3)
    assert max(abs(x - y) for x, y in zip(one.scores, other.scores, strict=True)) < 0.01
    for name, b in one.adapter.items():
        if "lora_B" in name:
            assert b.any()
            assert ((b - other.adapter[name]).norm() / b.norm()).item() < 0.02, name


@pytest.fixture
def folder(stage: Stage, tmp_path: Path) -> Path:
    stage.stop()
    return tmp_path


@pytest.mark.parametrize("preset", ["deep", "last"])
def test_two_ranks_are_one_server(folder: Path, documents: Documents, preset: str) -> None:
    with serving(folder, preset, 1) as served:
        learn(served, "one", documents)
        one = look(served, "one", documents)
    with serving(folder, preset, 2) as served:
        again = look(served, "one", documents)
        same_bits(one, again)
        assert max(abs(x - y) for x, y in zip(one.scores, again.scores, strict=True)) < 0.01
        learn(served, "two", documents)
        two = look(served, "two", documents)
        near(one, two)
        together(served)
        operations(served, "two", two, documents)
        base = [logprobs(served.complete(prompt, **SCORED)) for prompt in prompts(documents)]
        learn(served, "one", documents)  # on from what one rank has learned
        both = look(served, "one", documents)
        assert both.version > one.version
        log = served.logged()
        assert "have parted" not in log
        assert "Traceback" not in log, log
    with serving(folder, preset, 1) as served:
        same_bits(two, look(served, "two", documents))
        same_bits(both, look(served, "one", documents))
    if preset == "deep":
        flags, environment = ["--dtype", "float32", "--tensor-parallel-size", "2"], {"VLLM_PLUGINS": "", **bound(range(2))}
        with running(folder / "stock.log", "vllm.entrypoints.cli.main", flags, environment) as stock:
            assert base == [logprobs(stock.complete(prompt, **SCORED)) for prompt in prompts(documents)]


def together(served: Served) -> None:
    """The ranks have done the same so far."""
    first, second = served.http.post("/collective_rpc", json={"method": "test_slow"}).json()["results"]
    assert first["asked"] == 0 < second["asked"], "the first rank's clock is right, the other's is not"
    assert first["digest"] == second["digest"] != 0


def prompts(documents: Documents) -> list[list[int]]:
    return [documents[domain][0][:200] for domain in ("kjv", "py_dns", "man_fr")]


def operations(served: Served, name: str, learned: Learned, documents: Documents) -> None:
    """What a server does with a session besides learning, on both ranks."""
    path = f"/v1/ttt/sessions/{name}"
    made = served.http.post(f"{path}/fork", json={"to": "copy"})
    assert (made.status_code, made.json()["version"]) == (200, learned.version), made.text
    served.complete(documents["py_dns"][0][:200], "copy")
    served.complete(documents["py_dns"][0][:20], "copy", **READ)
    version = served.session("copy")["version"] - 1
    assert version > learned.version
    back = served.http.post("/v1/ttt/sessions/copy/rollback", json={"version": version})
    assert (back.status_code, back.json()["version"]) == (200, version), back.text
    assert served.http.post("/v1/ttt/sessions/copy/reset").json()["version"] == 0
    assert served.http.delete("/v1/ttt/sessions/copy").json()["deleted"]
    assert served.session(name)["probe_regression"] is not None, "the guard has tried it"


@pytest.mark.skipif((os.cpu_count() or 1) < 4 and "TTT_SOAK" not in os.environ, reason="asked for with TTT_SOAK=60, seconds")
def test_under_load_the_ranks_stay_together(folder: Path) -> None:
    """Every kind of user for a while: no error that was not asked for, each session at the version that its client counted."""
    with serving(folder, "last", 2) as served:
        options = ["--arms", "learning", "--seconds", str(SECONDS), "--base-url", served.url, "--out", str(folder)]
        options += ["--server-pid", str(served.process.pid), "--no-yielding"]
        done = subprocess.run([sys.executable, str(LOAD), *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        figures = json.loads(next(folder.glob("20*-load.json")).read_text())["arms"]["learning"]
        assert (figures["errors"], figures["audit"]["problems"]) == ({}, [])
        assert figures["audit"]["exact"] >= 3, "sessions whose version was compared"
        together(served)
        assert unexpected(served.logged()) == []


def test_a_rank_that_fails_ends_the_engine_and_what_was_saved_is_there(folder: Path, documents: Documents) -> None:
    with serving(folder, "last", 2) as served:
        learn(served, "one", documents)
        one = look(served, "one", documents)
        served.rpc("test_break", 1)
        with contextlib.suppress(Exception):
            served.complete(documents["kjv"][1][:200], "one")
        assert served.process.wait(timeout=120) is not None, "the server has ended"
        assert "rank 1 of 2 ends the engine" in served.logged()
    with serving(folder, "last", 1) as served:
        assert served.session("one")["version"] == one.version
