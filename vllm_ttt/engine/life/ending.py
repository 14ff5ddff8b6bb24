"""The end of a server with a state dir: what is being learned is learned, then all that has changed is saved."""

from __future__ import annotations

import time
from typing import Any

from vllm_ttt.log import logger_of

logger = logger_of(__name__)

#: Seconds from one word on what is left to the next.
_PAUSE = 5.0


class Ending:
    """``scheduler`` is the TTTScheduler."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.next_word = scheduler, 0.0

    def step(self) -> None:
        """The server is about to end: called each time round the loop until nothing is left. Says how much that is."""
        tiers, pending = self.scheduler.ttt_tiers, self.scheduler.ttt_report.pending
        tiers.close()
        if time.monotonic() < self.next_word:
            return
        self.next_word = time.monotonic() + _PAUSE
        unsaved = sum(s.unsaved for s in self.scheduler.ttt_ledger.sessions.values())
        if pending or unsaved:
            logger.info(
                "vllm-ttt: ending: %d tokens are still to be learned, and %d sessions to be saved; what is left after %d s "
                "(shutdown_timeout) is lost",
                pending, unsaved, self.scheduler.vllm_config.shutdown_timeout,
            )  # fmt: skip

    def done(self) -> None:
        """Nothing is left. The audit log says so before the workers end: that takes so long that vLLM may kill this process."""
        self.scheduler.ttt_guard(self.scheduler.ttt_tiers.audit.close)
