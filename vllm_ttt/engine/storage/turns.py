"""Whose turn it is on the thread that writes: in the order of asking, but what takes long lets pass what comes later."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

#: So many that were asked for later pass one that yields, while both wait: it has its turn in the end.
_PASS = 16


class Turns:
    """A queue from one thread to another, of what yields and of what does not; each in its order."""

    def __init__(self) -> None:
        self._prompt = deque[Any]()
        #: with how many of the others had been put before
        self._yielding = deque[tuple[int, Any]]()
        #: of those that do not yield: put, taken, and taken when one that yields last had its turn
        self._put = self._taken = self._since = 0
        self._ends = False
        self._changed = threading.Condition()

    def put(self, item: Any, yields: bool = False) -> None:
        """``yields``: what is put later may have its turn before it. None: there is no more."""
        with self._changed:
            if item is None:
                self._ends = True
            elif yields:
                self._yielding.append((self._put, item))
            else:
                self._prompt.append(item)
                self._put += 1
            self._changed.notify()

    def get(self) -> Any:
        """Wait for the next one; None where there is none and there is no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._prompt or self._yielding or self._ends)
            if self._yielding:
                before, item = self._yielding[0]
                if not self._prompt or self._taken - max(before, self._since) >= _PASS:
                    self._since = self._taken
                    self._yielding.popleft()
                    return item
            if not self._prompt:
                return None
            self._taken += 1
            return self._prompt.popleft()
