"""How many tokens may be learned before the next iteration, so that learning yields to serving."""

from __future__ import annotations

#: Tokens of the smallest tile that is worth a step.
SMALLEST = 32


class Budget:
    """Time for learning, earned by time spent serving: (max_slowdown - 1) seconds for each second.

    What is earned by an iteration is spent before the next one or lost, except for what a smallest tile costs: so a long
    prefill does not buy a long pause in the decoding that follows.
    """

    def __init__(self, tokens_per_step: int, max_slowdown: float):
        self.tokens_per_step, self.share = tokens_per_step, max_slowdown - 1.0
        self.seconds_per_token: float | None = None
        self.credit = 0.0

    def served(self, seconds: float) -> None:
        """An iteration of the engine took ``seconds``, learning apart."""
        earned = seconds * self.share
        self.credit = min(self.credit + earned, max(earned, SMALLEST * (self.seconds_per_token or 0.0)))

    def tokens(self) -> int:
        """How many tokens the credit buys: 0, or at least a smallest tile."""
        if self.share <= 0.0:
            return 0
        if self.seconds_per_token is None:
            return SMALLEST  # unknown yet: measure
        affordable = int(self.credit / self.seconds_per_token)
        return min(affordable, self.tokens_per_step) if affordable >= SMALLEST else 0

    def learned(self, tokens: int, seconds: float) -> None:
        """Learning ``tokens`` tokens took ``seconds``."""
        if tokens:
            rate = seconds / tokens
            self.seconds_per_token = rate if self.seconds_per_token is None else 0.8 * self.seconds_per_token + 0.2 * rate
            self.credit = max(0.0, self.credit - seconds)
