"""Whose turn it is on the thread that writes: in the order of asking, but what takes long lets others pass."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

#: So many pass one that yields, while both wait: it has its turn in the end.
_PASS = 16


class Turns:
    """A queue from one thread to another, of what yields and of what does not; each in its order."""

    def __init__(self) -> None:
        self._waiting: tuple[deque[Any], deque[Any]] = deque(), deque()
        self._passed, self._ends = 0, False
        self._changed = threading.Condition()

    def put(self, item: Any, yields: bool = False) -> None:
        """``yields``: others may have their turn before it. None: there is no more."""
        with self._changed:
            if item is None:
                self._ends = True
            else:
                self._waiting[yields].append(item)
            self._changed.notify()

    def get(self) -> Any:
        """Wait for the next one; None where there is none and there is no more."""
        prompt, yielding = self._waiting
        with self._changed:
            self._changed.wait_for(lambda: prompt or yielding or self._ends)
            if yielding and (not prompt or self._passed == _PASS):
                self._passed = 0
                return yielding.popleft()
            self._passed += bool(yielding)
            return prompt.popleft() if prompt else None
