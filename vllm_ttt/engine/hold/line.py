"""Who waits for something, in order. The line for places in the worker's memory is one for requests and operations alike."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from typing import Any

#: Where somebody stands. Of requests the first number is that of their arrival.
Order = tuple[float, ...]


class Line:
    """Whoever waits, in some order. One that leaves before its turn is passed over when that comes."""

    def __init__(self) -> None:
        #: each of them knows its line
        self.heap: list[tuple[Order, Any]] = []
        self.count = 0

    def push(self, order: Order, waiter: Any) -> None:
        heapq.heappush(self.heap, (order, waiter))
        waiter.line = self
        self.count += 1

    def first(self) -> Any:
        """Who is next; None: nobody waits."""
        while self.heap and self.heap[0][1].line is not self:
            heapq.heappop(self.heap)
        return self.heap[0][1] if self.heap else None

    def remove(self, waiter: Any) -> None:
        waiter.line = None
        self.count -= 1
        if len(self.heap) > 2 * self.count + 16:
            self.heap = [(order, other) for order, other in self.heap if other.line is self]
            heapq.heapify(self.heap)


@dataclass(slots=True, eq=False)
class Turn:
    """Of an operation."""

    order: Order
    line: Line | None = None


class Places(Line):
    """The line for places in memory, in the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        #: arrival of the newest request
        self.newest = 0

    def turn(self) -> Turn:
        """Of an operation that begins to wait now: behind all requests that have come, and samples of theirs that have not."""
        return Turn((self.newest, math.inf, next(self.numbers)))

    def passes(self, order: Order) -> bool:
        """Whether nobody waits who came before."""
        first = self.first()
        return first is None or order < first.order
