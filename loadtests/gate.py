"""For runs that start at once and are timed one after the other."""

from __future__ import annotations

import argparse
import fcntl
import time
from pathlib import Path
from typing import TextIO


def add_gate(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pass_gate`."""
    parser.add_argument(
        "--gate", metavar="FILE",
        help="start engines at once, and time one after the other: once --engines of them are up, by a lock on this file, "
        "which is new, and which other runs may share; --options needs a kv_cache_memory_bytes and a gpu_memory_utilization "
        "that leave room for all",
    )  # fmt: skip
    parser.add_argument("--engines", type=int, default=1, help="that come to the gate")


def pass_gate(args: argparse.Namespace) -> TextIO | None:
    """Before anything is timed: wait until nobody starts or is timed. The gate is passed until what this returns is closed."""
    if args.gate is None:
        return None
    file = Path(args.gate).open("a")  # noqa: SIM115
    print(end=".", file=file, flush=True)
    while Path(args.gate).stat().st_size < args.engines:
        time.sleep(0.1)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
