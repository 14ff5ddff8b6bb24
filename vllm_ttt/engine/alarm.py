"""Wakes an engine core that rests, so that what sessions have learned is saved in time."""

from __future__ import annotations

import threading
import time
from typing import Any

from vllm.v1.engine import EngineCoreRequestType

from vllm_ttt.engine.tiers import Tiers


class Alarm:
    """A thread that looks every ``seconds`` whether there is something to be done, and does nothing else."""

    def __init__(self, engine: Any, seconds: float, tiers: Tiers):
        """``engine``: vLLM's EngineCoreProc, whose input queue is how its idle loop is woken."""
        self.engine, self.seconds, self.tiers = engine, seconds, tiers
        threading.Thread(target=self._run, name="ttt-alarm", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self.seconds)
            if self.tiers.busy:
                self.engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
