"""How long learning and serving take on the device, for ``/metrics``."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from vllm_ttt.metrics import Snapshot, Values
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.learn.budget import Budget

#: What the device does besides.
Load = Literal["serving", "idle"]


class DeviceTimes(Values):
    """Fed with times that are known anyway. Iterations without learning cost one addition."""

    def __init__(self, clock: Clock, budget: Budget):
        super().__init__("step_seconds", "learning_seconds_total", "serving_seconds_total")
        self.clock, self.budget = clock, budget
        #: seconds of iterations that served requests, learning apart
        self.serving = 0.0
        #: (before, after, tokens, load) of learning whose times are not known yet
        self.under_way: deque[tuple[Any, Any, int, Load]] = deque(maxlen=4096)

    def learned(self, tokens: int, seconds: float, load: Load) -> None:
        """The learning of so many tokens took ``seconds`` of the device."""
        self.budget.learned(tokens, seconds, load == "serving")
        self.add("learning_seconds_total", seconds, load)
        self.observe("step_seconds", seconds)

    def read(self) -> None:
        """Take in what is known by now."""
        while self.under_way and self.clock.done(self.under_way[0][1]):
            before, after, tokens, load = self.under_way.popleft()
            self.learned(tokens, self.clock.seconds(before, after), load)

    def snapshot(self) -> Snapshot:
        self.read()
        self.set("serving_seconds_total", self.serving)
        return super().snapshot()
