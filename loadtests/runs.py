"""What the load tests have in common: the server that they start, what they say of a run, and where they write it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_ttt.config import EXPERIMENTS
from vllm_ttt.eval import server

os.environ[EXPERIMENTS] = "1"  # servers that load tests start may be given constants
HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
#: Arguments of a server of the demo's model.
SERVE = [
    *(str(DEMO / "model"), "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**29), *server.dtype_flags()),
    *("--served-model-name", "demo"),
]
EAGER = [*SERVE, "--enforce-eager"]


def exactly() -> list[str]:
    """More arguments of a server whose losses are compared with a plain loop's: on a CPU float32, and little KV cache. On CUDA
    it is as users have it."""
    import torch

    cpu = ["--kv-cache-memory-bytes", str(2**29), "--dtype", "float32", "--enforce-eager"]
    return [] if torch.cuda.is_available() else cpu


@contextlib.contextmanager
def served(flags: Sequence[str] = EAGER, config: dict[str, Any] | str = "{}", url: str | None = None) -> Iterator[str]:
    """The URL of a server with these arguments and vllm-ttt's settings, as YAML or read from it; it ends with the block.

    Args:
        url: of a server that runs, which is taken instead.
    """
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        file, log, port = Path(folder) / "ttt.yaml", Path(folder) / "server.log", server.free_port()
        file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        with server.serve([*flags, "--ttt-config", str(file)], port, log, keep=False) as process:
            print(f"starting vLLM on port {port}: a minute", file=sys.stderr)
            server.wait_healthy(process, port, log)
            yield f"http://127.0.0.1:{port}"


def hardware() -> str:
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores; load average at the start {load}"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    from vllm_ttt.metadata import ensure_vllm_metadata

    return {"vllm": ensure_vllm_metadata() or "?", "vllm-ttt": version("vllm-ttt"), "python": platform.python_version()}


def about(script: str, hidden: dict[str, str] | None = None) -> dict[str, Any]:
    """When, how and on what a run is made; call it before.

    Args:
        hidden: arguments of the command line that are of this machine alone, and what stands for them.
    """
    arguments = [(hidden or {}).get(x, x) for x in sys.argv[1:]]
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"loadtests/{script}", *arguments]),
        "hardware": hardware(),
        "versions": versions(),
    }


def save(title: str, report: dict[str, Any], body: str, out: str | Path, name: str) -> Path:
    """Print ``body`` below what ``report`` says of the run (see `about`), and write both to OUT/DATE-NAME.md and .json.

    Returns:
        the path of the JSON.
    """
    text = f"# {title}\n\n{report['hardware']}; {report['versions']}; {report['date']}\n\n    {report['command']}\n"
    text += (f"    {report['server']}\n" if report.get("server") else "") + f"\n{body}\n"
    print(text)
    stem = Path(out) / f"{report['date']}-{name}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    return stem.with_suffix(".json")
