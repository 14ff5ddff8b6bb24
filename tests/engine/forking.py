"""`python -m forking MODULE ARGS`: MODULE as it is, but that vLLM forks its engine and workers, which is what it does on CUDA.

Its CPU platform starts each as a program of its own: two more imports of vLLM, two thirds of the time that a start takes. And
these processes sleep between two looks for each other's messages, where vLLM's take a core.

Half of the kills of `test_survival.py` start their servers as users do, and so do tests of several engines or ranks behind one
server.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import sys
import time

#: What the children would import.
NEEDED = ("vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
NEEDED += ("vllm.v1.worker.cpu_worker", "vllm_ttt.engine.scheduler", "vllm_ttt.worker.cpu_worker")


def bind() -> None:
    """A worker's OpenMP read its environment in the parent already: do here what that says of threads and cores."""
    if places := os.environ.get("OMP_PLACES"):
        import torch

        cores = {int(core) for core in places.strip("{}").split(",")}
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


def main() -> None:
    # As a worker finds it that counts its one core; numba, which makes n-gram drafts, counts them at its import.
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    import torch
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.utils import system_utils

    torch.set_num_threads(1)  # threads that the parent had used would be missing in its children
    # For a second after each message its processes look for the next one in a loop, which takes a core from others.
    shm_broadcast.sched_yield = lambda: time.sleep(2e-4)  # pyright: ignore[reportPrivateImportUsage]
    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    for module in NEEDED if "serve" in sys.argv else ():
        importlib.import_module(module)
    os.register_at_fork(after_in_child=bind)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
