"""Room in the backlog: which prompts may begin to be read, in the order in which they came.

Counted in pages, as the worker keeps them: a chunk takes one, however short it is. Who has begun never asks again: nobody waits
for tokens of its own. While somebody waits for room, nobody who came later takes it.
"""

from __future__ import annotations


class Room:
    def __init__(self, tokens: int, chunk: int):
        """``tokens``: that may wait to be learned. ``chunk``: tokens of a page."""
        self.pages, self.chunk = max(1, tokens // chunk), chunk
        #: by request, pages that its prompt is going to fill
        self.promised: dict[str, int] = {}
        self.total = 0
        #: by request that found no room, its order of arrival
        self.waiting: dict[str, int] = {}

    def takes(self, request_id: str, arrival: int, pairs: int, queued: int) -> bool:
        """Whether a prompt with so many pairs to learn may begin; its room is taken then. More than there is counts as all.

        Args:
            queued: pages that wait for their step.
        """
        needed = min(-(-max(pairs, 1) // self.chunk), self.pages)
        others = self.total - self.promised.get(request_id, 0)
        first = min(self.waiting.values(), default=arrival)
        if queued + others + needed > self.pages:
            self.waiting[request_id] = arrival
            return False
        if first < arrival:
            return False
        self.leave(request_id)
        self.promised[request_id] = needed
        self.total += needed
        return True

    def leave(self, request_id: str) -> None:
        """Its prompt has been read, or is not to be learned."""
        self.waiting.pop(request_id, None)
        self.total -= self.promised.pop(request_id, 0)
