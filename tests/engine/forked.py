"""Programs of tests in processes that are forked from one which has imported vLLM: that is most of what a start costs.

Engines and workers are forked too, which is what vLLM does on CUDA; its CPU platform starts each as a program of its own. And
they sleep between two looks for each other's messages, where vLLM's take a core.

A test of kills starts its first server as users do; with TTT_SPAWN in the environment all are started so.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any

from vllm_ttt.eval.server import process_group

#: What a server imports.
NEEDED = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.main", "vllm.v1.engine.core")
NEEDED += ("vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm_ttt.cli", "vllm_ttt.engine.scheduler")
NEEDED += ("vllm_ttt.frontend.routes", "vllm_ttt.worker.cpu_worker")

#: As a worker finds it that counts its one core: numba, which makes n-gram drafts, counts them at its import.
ONE_CORE = {"NUMBA_NUM_THREADS": "1"}

#: Linux's `prctl`: orphans below this process become its children.
SUBREAPER = 36


class Popen(subprocess.Popen):
    """`subprocess.Popen` of ``[python, "-m", MODULE, ...]`` or ``[python, FILE, ...]``, forked: a child of this process, in a
    session of its own. ``stdout``: the file that takes its output and its errors.
    """

    _parent: subprocess.Popen | None = None

    def __init__(self, args: list[str], stdout: IO[bytes], env: dict[str, str], **_: Any):
        self.args, self.returncode = args, None
        self.stdin = self.stdout = self.stderr = None
        self.pid = self._fork({"argv": args[1:], "env": env, "output": os.fspath(stdout.name)})

    @classmethod
    def _fork(cls, order: dict[str, Any]) -> int:
        if cls._parent is None:
            # Ends with this process, whose end closes its input.
            cls._parent = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        assert cls._parent.stdin is not None
        assert cls._parent.stdout is not None
        ctypes.CDLL(None).prctl(SUBREAPER, 1)
        try:
            cls._parent.stdin.write(json.dumps(order).encode() + b"\n")
            cls._parent.stdin.flush()
            return int(cls._parent.stdout.readline())
        finally:
            ctypes.CDLL(None).prctl(SUBREAPER, 0)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.02)
        return code


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, output and errors) of a program, as for `Popen`; ``environment`` is added to this process's."""
    with process_group(command, log, environment=environment, popen=Popen) as process:
        code = process.wait()
    return code, log.read_text()


def bind() -> None:
    """A worker's OpenMP read its environment in the parent already: do here what that says of threads and cores.

    torch makes its pool of threads anew after a fork, when it is first told how many it has: before others could, two at once,
    of which one would find none ("Invalid thread pool!", caffe2/utils/threadpool/pthreadpool-cpp.cc).
    """
    import torch

    threads = torch.get_num_threads()
    if places := os.environ.get("OMP_PLACES"):
        cores = {int(core) for core in places.strip("{}").split(",")}
        os.sched_setaffinity(0, cores)
        threads = len(cores)
    torch.set_num_threads(threads)


def prepare() -> None:
    os.environ.update(ONE_CORE)
    import setproctitle
    import torch
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.utils import system_utils

    setproctitle.getproctitle()  # looks for its place while the environment is where the system put it
    torch.set_num_threads(1)  # threads that the parent had used would be missing in its children
    # For a second after each message its processes look for the next one in a loop, which takes a core from others.
    shm_broadcast.sched_yield = lambda: time.sleep(2e-4)  # pyright: ignore[reportPrivateImportUsage]
    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    for module in NEEDED:
        importlib.import_module(module)
    os.register_at_fork(after_in_child=bind)
    gc.freeze()  # no collection walks over it, or copies its pages


def fork() -> list[str]:
    """Fork a process for each line of the input. Returns, in each of them, its arguments; else it ends."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    prepare()
    for line in sys.stdin:
        if between := os.fork():
            os.waitpid(between, 0)
            os.write(answer, b"\n")  # its child is an orphan now
            continue
        if child := os.fork():
            os.write(answer, b"%d" % child)
            os._exit(0)
        order = json.loads(line)
        os.close(answer)
        os.setsid()
        os.environ.clear()
        os.environ.update({**ONE_CORE, **order["env"]})
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        with Path(os.devnull).open("rb") as nothing, Path(order["output"]).open("ab") as output:
            for stream, file in enumerate((nothing, output, output)):
                os.dup2(file.fileno(), stream)
        return order["argv"]
    sys.exit()


if __name__ == "__main__":
    sys.argv = fork()
    # Where processes are spawned, the first one starts what removes the shared memory that others leave. An engine core that
    # has to do so takes it along when it ends.
    resource_tracker.ensure_running()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
