"""A server of our own for the demo: started in a process group of its own, which never outlives the context."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import httpx

from vllm_ttt.errors import TTTError

#: Seconds that the group may take to end after SIGTERM, before SIGKILL.
PATIENCE = 15.0

#: Seconds that Python's resource trackers may take after that.
TRACKERS = 5.0

#: Ports for servers of ours, below those that Linux and macOS give to connections.
PORTS = range(20_000, 32_000)
_given: set[int] = set()

#: What a server of ours is told, unless the environment says otherwise. Its model is found in its own folder only: nothing is
#: fetched, nothing reported. Idle connections outlive those of every client: vLLM closes them after 5 s, just when httpx thinks
#: of its own as usable for the last time, and a request that meets the end of its connection is lost.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75"}


class StartError(TTTError):
    """The server ended before it was healthy, or did not become so in time."""


def free_port() -> int:
    """One that nobody has, and that this process was not given before. It is none of those that the system gives to connections
    and to whoever asks for any: somebody would have it before a server has started."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def dtype_flags() -> list[str]:
    """Flags of a server, float32 for a model in bfloat16, on a CPU whose products in 16 bits are several times slower."""
    import torch

    from vllm_ttt.worker.step.tail import step_dtype

    slow = not torch.cuda.is_available() and step_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32
    return ["--dtype", "float32"] if slow else []


def serve(
    args: list[str], port: int, log: Path, keep: bool, environment: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[subprocess.Popen]:
    """``process_group`` of ``vllm-ttt serve ARGS`` on 127.0.0.1:``port``."""
    here = ["--host", "127.0.0.1", "--port", str(port)]
    return process_group([sys.executable, "-m", "vllm_ttt.cli", "serve", *args, *here], log, keep, environment)


@contextlib.contextmanager
def process_group(
    command: list[str],
    log: Path,
    keep: bool = False,
    environment: dict[str, str] | None = None,
    popen: type[subprocess.Popen] = subprocess.Popen,
) -> Iterator[subprocess.Popen]:
    """Run ``command`` in a process group of its own, output to ``log``; at exit end the whole group.

    ``environment`` is added to this process's. ``popen`` starts it.

    SIGTERM and SIGHUP to this process unwind the context as Ctrl-C does. With ``keep`` a normal exit leaves it running.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with _signals_unwind(), log.open("wb") as output:
        process = popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**ENVIRONMENT, **os.environ, **(environment or {})},
            start_new_session=True,
        )
        kept = False
        try:
            yield process
            kept = keep
        finally:
            if not kept:
                end_group(process)


def wait_healthy(process: subprocess.Popen, port: int, log: Path, timeout: float = 600) -> None:
    """Return when /health answers 200. Raises StartError, with the end of the log, when that cannot be any more."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"the server ended with code {process.returncode}; the end of {log}:\n{tail(log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise StartError(f"the server was not healthy after {timeout:.0f} s; the end of {log}:\n{tail(log)}")


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def end_group(process: subprocess.Popen, patience: float = PATIENCE) -> None:
    """SIGTERM to the leader, which ends its children in order; then SIGKILL to whatever the group still holds.

    Signals that would interrupt this are ignored meanwhile.
    """
    ignored = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if process.poll() is None:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        _kill(process.pid)
        process.wait()
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)


def _kill(group: int) -> None:
    """SIGKILL to a process group. Python's resource trackers come last: they remove the shared memory that the others leave."""
    for pid, command in _members(group):
        if b"resource_tracker" not in command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + TRACKERS
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _members(group: int) -> list[tuple[int, bytes]]:
    """(pid, command line) of each process of a group that has not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends just now
            state, _, of_group = (folder / "stat").read_bytes().rpartition(b") ")[2].split()[:3]
            if int(of_group) == group and state != b"Z":
                found.append((int(folder.name), (folder / "cmdline").read_bytes()))
    return found


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
