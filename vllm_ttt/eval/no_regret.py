"""The no-regret scale of docs/algorithm.md for the oracle: plain, and on its own, so that the engine's can be held to it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vllm_ttt.config import LearnConfig

#: Pairs of neighbouring tokens that count as a session's past; with fewer than half of them nothing is called unfamiliar.
PAST = 8192
#: Tokens at the beginning of a prompt by which it is judged.
HEAD = 256
#: The share of known pairs that any two texts have.
CHANCE = 0.05
#: The most by which one request moves the losses of two scales apart, in nats.
SPREAD = 0.04


class NoRegret:
    """The scale of one session."""

    def __init__(self, learn: LearnConfig):
        self.learn, self.scales = learn, np.array(learn.scales)
        self.losses = np.zeros(len(self.scales))
        self.pairs: list[tuple[int, int]] = []

    @property
    def on(self) -> bool:
        return len(self.scales) > 1

    @property
    def measured(self) -> np.ndarray:
        return self.scales if len(self.scales) <= 3 else self.scales[[0, (len(self.scales) - 1) // 2, -1]]

    @property
    def chosen(self) -> float:
        """By the losses alone."""
        weights = np.exp(-self.learn.scale_rate * (self.losses - self.losses.min()))
        return float(weights @ self.scales / weights.sum())

    def served(self, ids: list[int], start: int = 0) -> float:
        """For a prompt that is new from pair ``start`` on: no more than what HEAD tokens from there on, or its last, have in
        common with the session's past."""
        familiar = self.learn.familiar
        if not self.on or familiar == 0 or len(self.pairs) < PAST // 2:
            return self.chosen
        head, past = list(pairwise(ids[(first := max(0, min(start, len(ids) - 1 - HEAD))) : first + HEAD + 1])), set(self.pairs)
        share = sum(pair in past for pair in head) / max(1, len(head))
        return min(self.chosen, max(0.0, self.scales[-1] * (share - CHANCE) / (familiar - CHANCE)))

    def note(self, ids: list[int]) -> None:
        """The prompt has been sent for learning."""
        self.pairs = (self.pairs + list(pairwise(ids)))[-PAST:]

    def add(self, losses: list[float], tokens: int) -> None:
        """``losses`` of the measured scales, on a chunk of so many tokens."""
        curve = np.polyfit(self.measured, losses, len(self.measured) - 1)
        new = np.polyval(curve, self.scales)
        new = (new - new.min()) * min(1.0, SPREAD / max(np.ptp(new), 1e-12))
        share = tokens / self.learn.chunk
        self.losses = self.learn.scale_memory**share * self.losses + share * new
