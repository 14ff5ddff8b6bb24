"""How long learning and serving take on the device, for ``/metrics``."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from vllm_ttt.metrics import Snapshot, Values
from vllm_ttt.worker.clock import Clock


class DeviceTimes(Values):
    """Fed with times that are known anyway. Iterations without learning cost one addition."""

    def __init__(self, clock: Clock):
        super().__init__("step_seconds", "learning_seconds_total", "serving_seconds_total")
        self.clock = clock
        #: seconds of iterations that served requests, learning apart
        self.serving = 0.0
        #: (before, after) of learning while nobody was served, whose times are not known yet
        self.idle: deque[tuple[Any, Any]] = deque(maxlen=4096)

    def learned(self, seconds: float, load: Literal["serving", "idle"]) -> None:
        """The learning before one iteration took ``seconds`` of the device."""
        self.add("learning_seconds_total", seconds, load)
        self.observe("step_seconds", seconds)

    def snapshot(self) -> Snapshot:
        while self.idle and self.clock.done(self.idle[0][1]):
            self.learned(self.clock.seconds(*self.idle.popleft()), "idle")
        self.set("serving_seconds_total", self.serving)
        return super().snapshot()
