"""The step's kernels, between two matrix products and of the optimiser, without a GPU; tests/gpu runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("cases", "count"), [("pointwise_cases.py", 19), ("update_cases.py", 22)])
def test_each_kernel_is_what_torch_computes(cases: str, count: int) -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(Path(__file__).with_name(cases))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{count} passed" in done.stdout
