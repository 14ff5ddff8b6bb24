"""Slots in 8 bits on CUDA and the kernels that read them, without a GPU; tests/gpu runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.unit


def test_each_kernel_is_what_torch_computes() -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    cases = Path(__file__).with_name("int8_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "21 passed" in done.stdout


@pytest.mark.parametrize(("capability", "room"), [(80, 166_912), (89, 101_376), (90, 232_448)])
def test_what_is_read_ahead_fits_into_shared_memory(capability: int, room: int) -> None:
    """Of the largest ranks that there are. Triton compiles for a GPU that is not there.

    Args:
        room: bytes that a program may have.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_ttt.config import RANKS
    from vllm_ttt.worker.serve import gpu_kernels as kernels

    assert max(RANKS) == 512
    for rank in (128, 512):
        sizes = kernels.shrinking(torch.empty(rank, 4096, dtype=torch.bfloat16, device="meta")) | {"PER": 3}
        warps = {"num_warps": sizes.pop("num_warps")}
        types = dict.fromkeys(("x", "a"), "*bf16") | {"parts": "*fp32"} | dict.fromkeys(("N", "K", "x_stride"), "i32")
        names = kernels._shrink.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        values = {(names.index(name),): size for name, size in sizes.items()}
        whole = {(names.index(name),): [["tt.divisibility", 16]] for name in types}  # else nothing is read ahead
        source = ASTSource(kernels._shrink, signature, values, whole)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=warps)
        assert made.metadata.shared <= room, (rank, made.metadata.shared)
