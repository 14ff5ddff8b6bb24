"""Buffers that do not fit are refused at start, with numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PROGRAM = """
import vllm_ttt
from vllm import LLM
config = {"schedule": {"backlog_tokens": 2**24}, "sessions": {"resident": 2}}
LLM("MODEL", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=2**40, **vllm_ttt.engine_args(config=config))
"""


def test_buffers_that_do_not_fit_are_refused(stage: Any) -> None:
    """The KV cache is given more than the machine has, so that the test does not depend on its size."""
    stage.stop()
    program = PROGRAM.replace("MODEL", str(ROOT / "demo" / "model"))
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    error = done.stderr[done.stderr.rindex("ConfigError") :]
    assert "--plugin ttt needs" in error
    assert "leaves 0.00 GiB" in error, error
    assert "activations of 16,778,240 tokens that may wait to be learned (schedule.backlog_tokens)" in error
    assert "Raise --gpu-memory-utilization, or lower" in error
