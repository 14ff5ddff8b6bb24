"""How many tokens may be learned before the next iteration, so that learning yields to serving."""

from __future__ import annotations

from collections import deque

#: Tokens of the smallest tile that is worth a step.
SMALLEST = 32


def tile_sizes(tokens_per_step: int, smallest: int = SMALLEST) -> list[int]:
    """The tiles whose cost is known: ``smallest`` and its doubles, and ``tokens_per_step``."""
    sizes = [min(smallest, tokens_per_step)]
    while sizes[-1] * 2 <= tokens_per_step:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == tokens_per_step else [*sizes, tokens_per_step]


#: A step of so large a part of a tile takes as long as the tile: the last token of a prompt is not learned.
WHOLE = 0.9
#: An iteration counts as no longer than the shortest of so many: a prefill does not buy a pause in the decoding that follows.
RECENT = 8


class Budget:
    """Time for learning, earned by time spent serving: (max_slowdown - 1) seconds for each second.

    What an iteration earns is spent before the next or lost, except for what the smallest tile costs. What a step took longer
    than was thought, or shorter, is settled when it is known.
    """

    def __init__(self, tokens_per_step: int, max_slowdown: float):
        self.tokens_per_step, self.share = tokens_per_step, max_slowdown - 1.0
        #: seconds that a tile of so many tokens takes, ascending; measured at start, corrected by each step
        self.costs: dict[int, float] = {}
        self.credit = 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)

    def calibrate(self, tokens: int, seconds: float) -> None:
        self.costs[tokens] = seconds

    def served(self, seconds: float) -> None:
        """An iteration of the engine took ``seconds``, learning apart."""
        self.recent.append(seconds)
        earned = min(self.recent) * self.share
        self.credit = min(self.credit + earned, max(earned, min(self.costs.values(), default=0.0)))

    def tokens(self) -> int:
        """How many tokens the credit buys; they are paid for by `learned`."""
        affordable = [tokens for tokens, seconds in self.costs.items() if seconds <= self.credit]
        return max(affordable, default=0) if self.share > 0.0 else 0

    def spend(self, tokens: int) -> None:
        """``tokens`` are going to be learned: take their expected cost off the credit."""
        if tokens:
            self.credit -= min(max(self.credit, 0.0), self.cost(tokens))

    def learned(self, tokens: int, seconds: float, beside: bool = True) -> None:
        """A step over ``tokens``, 0 where it had to be, took ``seconds``: correct what a tile of that size is thought to cost,
        and the credit where the step ran ``beside`` serving. One that something held up counts as twice its cost at most."""
        tile = self._tile(tokens) if tokens else None
        if tile is None:
            return
        more = min(seconds, 2 * self.costs[tile]) - self.costs[tile]
        if beside:
            self.credit -= more
        if tokens >= WHOLE * tile:
            self.costs[tile] += 0.2 * more

    def cost(self, tokens: int) -> float:
        """Seconds that a step over ``tokens`` is thought to take."""
        tile = self._tile(tokens)
        return 0.0 if tile is None else self.costs[tile]

    def _tile(self, tokens: int) -> int | None:
        """The smallest that has so many tokens, or the largest; None where none is known."""
        return next((tile for tile in self.costs if tile >= tokens), max(self.costs, default=None))
