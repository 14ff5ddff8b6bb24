"""Resident memory of a server's processes, sampled; whether it is flat is a slope."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import numpy as np
import psutil

#: Of the run, the part in which pools fill up and code is met for the first time.
WARM_UP = 0.4
#: Samples that a report keeps of each process.
SHOWN = 100


class Memory(threading.Thread):
    """Samples each process under ``pid``, itself included, until `stop`. Shared pages count for each."""

    def __init__(self, pid: int, every: float = 1.0):
        super().__init__(daemon=True)
        self.root, self.every, self.ended = psutil.Process(pid), every, threading.Event()
        #: name: [(s since the start, MB)]
        self.samples: dict[str, list[tuple[float, float]]] = {}
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        while not self.ended.wait(self.every):
            with contextlib.suppress(psutil.Error):
                for process in [self.root, *self.root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        size = process.memory_info().rss / 1e6
                        if size > 100:  # helpers that only wait
                            self.samples.setdefault(_name(process), []).append((time.monotonic() - began, size))

    def stop(self) -> dict[str, dict[str, Any]]:
        """`slope` by process, and as ``samples`` up to SHOWN of what was measured, evenly."""
        self.ended.set()
        self.join()
        enough = {name: samples for name, samples in self.samples.items() if len(samples) > 4}
        shown = lambda samples: [[round(x) for x in sample] for sample in samples[:: -(-len(samples) // SHOWN)]]  # noqa: E731
        return {name: {**slope(samples), "samples": shown(samples)} for name, samples in enough.items()}


def slope(samples: list[tuple[float, float]]) -> dict[str, float]:
    """MB at the end of the warm-up and at the end, the peak, and what it grew by from then on: least squares, MB a minute."""
    at, size = np.asarray(samples).T
    late = at >= at[0] + WARM_UP * (at[-1] - at[0])
    per_second = float(np.polyfit(at[late], size[late], 1)[0])
    return {"warm": float(size[late][0]), "end": float(size[-1]), "peak": float(size.max()), "per_minute": 60 * per_second}


def _name(process: psutil.Process) -> str:
    """As vLLM calls it, else the program; each process of a server has its own."""
    name = process.name()
    return name if name.startswith("VLLM") else "API server"
