"""A worker of which the second rank sees another time than the first, and can be broken."""

from __future__ import annotations

from typing import Any

from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.cpu_worker import TTTCPUWorker


class SlowClock(Clock):
    """Every second takes a hundred, and what is done is seen late."""

    def __init__(self, clock: Clock):
        self.cuda, self.asked = clock.cuda, 0

    def seconds(self, first: Any, second: Any) -> float:
        return 100 * super().seconds(first, second)

    def done(self, mark: Any) -> bool:
        self.asked += 1
        return self.asked % 3 == 0


class SlowRank(TTTCPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if not self.ranks.first:
            self.clock = self.trainer.clock = self.trainer.guard.clock = SlowClock(self.clock)

    def test_slow(self) -> dict[str, int]:
        """How often this rank has asked its clock, if that is wrong; the digest of what it has done."""
        return {"asked": getattr(self.clock, "asked", 0), "digest": getattr(self.ranks, "digest", 0)}

    def test_break(self, rank: int) -> None:
        """The next step of that rank fails in the middle."""
        if self.ranks.rank == rank:
            self.trainer.compute.tail.head_VD = None  # type: ignore[assignment]
