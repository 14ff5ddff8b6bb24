"""Blocks of vLLM's KV cache that outlive their requests: what of a request is still to be learned attends to them.

vLLM gives a request's blocks back when the request leaves the engine. Those of a request that is not learned yet are kept until
the worker says that nobody reads them any more. There is a limit to that: beyond it, and while a request waits for blocks, the
worker is told to learn what has been kept longest before it serves another batch.
"""

from __future__ import annotations

from typing import Any

from vllm_ttt.types import StepPlan, StepReport

#: Of all blocks, so many may be kept.
SHARE = 0.5


class HeldBlocks:
    """``pool`` is vLLM's BlockPool."""

    def __init__(self, pool: Any):
        self.pool = pool
        #: by request, in the order in which they left; blocks in the order in which they were given
        self.requests: dict[str, list[Any]] = {}
        #: requests of which the worker knows that they have left
        self.told: set[str] = set()
        self.count = 0
        #: requests whose blocks were given back although something waits
        self.lost: list[str] = []
        #: the request that vLLM would begin next, as far as the step that is being made has come
        self.asks: str | None = None

    def hold(self, request_id: str, blocks: list[Any]) -> None:
        """Keep the blocks of a request that leaves; they have been taken from vLLM's books."""
        if blocks:
            self.requests.setdefault(request_id, []).extend(blocks)
            self.count += len(blocks)

    def release(self, request_id: str) -> None:
        """Nobody reads the request's blocks any more."""
        self.told.discard(request_id)
        if (blocks := self.requests.pop(request_id, None)) is not None:
            self.count -= len(blocks)
            self.pool.free_blocks(reversed(blocks))  # the last are evicted first, as vLLM does it

    def read(self, plan: StepPlan, report: StepReport) -> None:
        """A step's report; ``plan`` is what the worker was told with that step."""
        for request_id in (*report.released, *(request_id for request_id, _ in report.settled)):
            self.release(request_id)
        if not self.requests:
            return
        self.told.update(plan.ended.keys() & self.requests.keys())
        if not report.busy:  # it reads nothing of the requests that it knows to have left
            for request_id in self.told & set(self.requests):
                self.release(request_id)

    def give_up(self) -> None:
        """All blocks are wanted back now, and what waits of their requests is not learned."""
        self.lost += self.requests
        for request_id in list(self.requests):
            self.release(request_id)

    def take_lost(self) -> list[str]:
        """What `give_up` has given up since the last call."""
        lost, self.lost = self.lost, []
        return lost

    def urgent(self, step: Any) -> list[str]:
        """Requests that must be learned at once, longest-kept first; one at least where vLLM had no blocks for all.

        Args:
            step: the SchedulerOutput that has been made.
        """
        short = bool(step.preempted_req_ids) or (self.asks is not None and self.asks not in step.num_scheduled_tokens)
        self.asks = None
        excess = max(self.count - SHARE * self.pool.num_gpu_blocks, int(short))
        found: list[str] = []
        for request_id, blocks in self.requests.items():
            if excess <= 0:
                break
            found.append(request_id)
            excess -= len(blocks)
        return found
