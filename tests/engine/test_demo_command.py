"""The demo's parts against a server that learns, and the whole command, interrupted."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import MODEL, Stage
from served import Documents, Served

from vllm_ttt.eval import rounds
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.measures import Measures
from vllm_ttt.eval.protocols import Result

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


def test_rounds_of_all_arms_and_a_question(deep: Served, documents: Documents):
    domains = ["kjv", "man_fr"]
    work = rounds.Library(domains, [[ids[: rounds.WINDOW + 1] for ids in documents[d][:3]] for d in domains], {})
    seen: list[tuple[str, int, Measures]] = []

    async def show() -> tuple[Result, rounds.Answers]:
        async with Client(deep.url) as client:
            result = await rounds.compare(client, work, lambda *saw: seen.append(saw))
            text = (ROOT / "README.md").read_text(encoding="utf-8")
            return result, await rounds.question(client, text, lambda: None)

    result, answers = asyncio.run(show())
    assert len(seen) == rounds.requests(work) == 24
    first = result.arms["frozen"][0]
    assert result.arms["retrieval"][0] == result.arms["context"][0] == first, "nothing was sent before"
    assert [m.nats for m in result.arms["ttt"][0]] == pytest.approx([m.nats for m in first], abs=0.01), "nor learned"
    for s in range(len(domains)):
        assert result.arms["ttt"][2][s].nats < result.arms["frozen"][2][s].nats - 0.01
        assert result.arms["context"][2][s].nats != pytest.approx(result.arms["frozen"][2][s].nats, abs=0.001)
        assert result.arms["ttt"][2][s].characters > 0
    for domain in domains:
        assert deep.session(rounds.name_of(domain))["tokens_learned"] == 3 * rounds.WINDOW
    assert answers.losses[-1] < answers.losses[0] - 1
    assert None not in answers.asked, "the model has a chat template"
    right = [rounds.agree(text, answers.truth) for text in answers.went_on]
    assert right[1] > right[0], "it has read the page, and can go on"
    assert deep.session(rounds.name_of("readme"))["tokens_learned"] == rounds.READINGS * (rounds.PAGE - 1), "no question was"
    for name in (*map(rounds.name_of, domains), rounds.name_of("readme")):
        deep.http.delete(f"/v1/ttt/sessions/{name}")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder whose name is short, as those of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def test_ctrl_c_leaves_no_process_and_no_file(stage: Stage, tmp_path: Path, scratch: Path):
    stage.stop()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vllm_ttt.cli", "demo", "--model", str(MODEL), "--quick", "--out", str(out)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell's background jobs ignore it
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes) as demo:
        assert demo.stdout is not None
        said, found = [], None
        for line in demo.stdout:
            said.append(line)
            if found := re.search(r"watch it learn: (http://127\.0\.0\.1:\d+)/ttt", line):
                break
        assert found is not None, "".join(said)
        running = re.compile(r"^vllm:num_requests_running{.*} [1-9]", re.M)
        while not running.search(httpx.get(f"{found[1]}/metrics", trust_env=False).text):
            assert demo.poll() is None
        started = psutil.Process(demo.pid).children(recursive=True)
        assert started
        assert (out / "server.log").is_file()
        assert list(scratch.iterdir())
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()
        assert demo.wait(60) != 0
    gone, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert len(gone) == len(started)
    assert not [*tmp_path.rglob("*"), *scratch.rglob("*")], "no file is left"
