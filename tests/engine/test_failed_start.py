"""Starts that fail: they end, with what is wrong and what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import HERE, MODEL

from vllm_ttt.eval import server as processes

pytestmark = pytest.mark.engine

PROGRAM = """
import vllm_ttt
from vllm import LLM
config = {"schedule": {"backlog_tokens": 2**24}, "sessions": {"resident": 2}}
LLM("MODEL", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=2**40, **vllm_ttt.engine_args(config=config))
"""


def test_buffers_that_do_not_fit_are_refused(stage: Any, tmp_path: Path) -> None:
    """The KV cache is given more than the machine has, so that the test does not depend on its size."""
    stage.stop()
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.replace("MODEL", str(MODEL)))
    code, output = forked.run([sys.executable, str(script)], tmp_path / "log", {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    assert code != 0
    error = output[output.rindex("ConfigError") :]
    assert "--plugin ttt needs" in error
    assert "leaves 0.00 GiB" in error, error
    assert "activations of 16,778,240 tokens that may wait to be learned (schedule.backlog_tokens)" in error
    assert "Raise --gpu-memory-utilization, or lower" in error


def test_a_start_that_fails_once_the_workers_run(stage: Any, tmp_path: Path) -> None:
    """Of a worker that is a process of its own. Sessions keep workers from ending by a signal; a start has none, and it never
    ended."""
    stage.stop()
    log, path = tmp_path / "server.log", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    flags = ["--plugin", "ttt", "--ttt-state-dir", str(tmp_path / "state"), "--worker-cls", "failing_start.FailingStart"]
    flags += ["--distributed-executor-backend", "mp", "--enforce-eager", "--port", str(processes.free_port())]
    flags += ["--max-model-len", "256", "--kv-cache-memory-bytes", str(2**28)]
    command = [sys.executable, "-m", "vllm_ttt.cli", "serve", str(MODEL), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        with processes.process_group(command, log, popen=forked.Popen) as process:
            assert process.wait(timeout=300) != 0
    assert "planted by a test" in log.read_text()
