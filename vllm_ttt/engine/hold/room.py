"""Room in the backlog: whether a prompt may begin to be read. Who asks first, and that nobody is passed, is `holding.py`'s.

Counted in pages, as the worker keeps them: a chunk takes one, however short it is. Open pages do not count: they wait for
more of their own requests. Nor does a request ask again once it has begun, so that nobody waits for tokens of its own.
"""

from __future__ import annotations

from vllm_ttt.engine.requests import Attached


class Room:
    def __init__(self, tokens: int, chunk: int):
        """``tokens``: that may wait to be learned. ``chunk``: tokens of a page."""
        self.pages, self.chunk = max(1, tokens // chunk), chunk
        #: by request, pages that its prompt is going to fill
        self.promised: dict[str, int] = {}
        self.total = 0

    def takes(self, attached: Attached, queued: int) -> bool:
        """Whether the prompt may begin; its room is taken then. What needs more than there is needs all.

        Args:
            queued: pages that wait for their step.
        """
        name, pairs = attached.request.request_id, attached.prompt - 1 - attached.start
        self.leave(name)
        needed = min(-(-max(pairs, 1) // self.chunk), self.pages)
        if queued + self.total + needed > self.pages:
            return False
        self.promised[name] = needed
        self.total += needed
        return True

    def leave(self, request_id: str) -> None:
        """Its prompt has been read, or is not to be learned."""
        self.total -= self.promised.pop(request_id, 0)
