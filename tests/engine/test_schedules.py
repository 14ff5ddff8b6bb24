"""Whatever the schedule: every session has learned what it should have, once (schedules.py draws them)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
#: Each takes some seconds; `TTT_EXAMPLES=200 pytest tests/engine/test_schedules.py` looks further.
EXAMPLES = os.environ.get("TTT_EXAMPLES", "8")


@pytest.mark.parametrize("preset", ["last", "deep"])
def test_random_schedules(stage: Any, tmp_path: Path, preset: str) -> None:
    """In a process of its own: the engine runs inside it, and vLLM's CPU worker binds the process to a core."""
    stage.stop()
    command = [sys.executable, str(HERE / "schedules.py"), str(HERE.parents[1] / "demo" / "model"), preset, EXAMPLES]
    # One thread: the oracle and the engine take turns, and threads that spin while the other works would slow both.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    code, output = forked.run(command, tmp_path / "log", environment)
    assert code == 0, output[-6000:]
    seen = json.loads(output[output.rindex("SEEN ") + 5 :].splitlines()[0])
    for what in ("sessions", "chunks", "history", "grow", "repeat", "aborted", "preempted", "compared"):
        assert seen[what] > 0, f"the schedules were tame: {seen}"
