"""For runs that start at once and are timed in turns."""

from __future__ import annotations

import argparse
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Gate:
    """Where engines wait until all are up, and then for their turns: by a lock on a file. Without a file nobody waits."""

    def __init__(self, args: argparse.Namespace):
        """Wait until nobody starts any more."""
        self.file = None
        if args.gate is not None:
            path = Path(args.gate)
            self.file = path.open("a")
            print(end=".", file=self.file, flush=True)
            while path.stat().st_size < args.engines:
                time.sleep(0.1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Time something while nobody else does. Who waits already comes before the next turn of this process."""
        if self.file is None:
            yield
            return
        fcntl.flock(self.file, fcntl.LOCK_EX)
        yield
        fcntl.flock(self.file, fcntl.LOCK_UN)
        time.sleep(0.1)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--gate", metavar="FILE",
            help="start engines at once, and time them in turns, once --engines of them are up, by a lock on this file, "
            "which is new, and which other runs may share; --options needs a kv_cache_memory_bytes and a "
            "gpu_memory_utilization that leave room for all",
        )  # fmt: skip
        parser.add_argument("--engines", type=int, default=1, help="that come to the gate")
