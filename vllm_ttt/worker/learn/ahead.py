"""When the next step is launched while nobody is served: before the last one is over, so that the device need not wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_ttt.worker.learn.trainer import Trainer

#: Seconds before the end of a step in which the next one is launched: what the host takes for that, from one turn of the
#: engine's loop to the launch of some thousand kernels. A request that comes now waits for one step and this, not for two.
LEAD = 0.006


class Ahead:
    """``end``: when the steps that have been launched are thought to be over, by `time.perf_counter`."""

    def __init__(self, lead: float = LEAD):
        self.lead, self.end = lead, 0.0

    def wait(self, trainer: Trainer) -> None:
        """Until the next step may be launched: one at most is under way, and it is nearly over."""
        if trainer.ranks.size > 1:  # each has a clock of its own
            trainer.collect(0)
            return
        trainer.collect(0 if trainer.guard.outcomes else 1)
        while trainer.outcomes and (left := self.end - time.perf_counter() - self.lead) > 0:
            time.sleep(min(left, 0.001))
            trainer.collect(1)

    def launched(self, began: float, seconds: float) -> None:
        """A step of ``seconds`` was launched at ``began``; it begins when those before it are over."""
        self.end = max(began, self.end) + seconds
