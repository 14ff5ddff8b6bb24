"""Slots in 8 bits on CUDA and the kernels that read them, without a GPU; tests/gpu runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


def test_each_kernel_is_what_torch_computes() -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    cases = Path(__file__).with_name("int8_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "21 passed" in done.stdout
