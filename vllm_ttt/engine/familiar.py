"""How much a prompt has in common with what its session sent before: a new subject shows before it is served.

The no-regret scale follows a change of subject when the first prompt of the new one has been measured, too late for that
prompt. Its first tokens say enough: of a text like those before, a large share of the neighbouring pairs has been seen.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

#: Pairs that are remembered of a session; with fewer than half of them nothing can be called unfamiliar. 32 KiB.
PAST = 8192
#: Tokens at the beginning of a prompt by which it is judged: what follows them is served knowing nothing of itself.
HEAD = 256
#: The share of pairs that any two texts have in common.
CHANCE = 0.05


class Past:
    """Pairs of neighbouring tokens of one session, the last PAST of them, as 32-bit hashes. ``changes`` counts the notes."""

    __slots__ = ("changes", "pairs")

    def __init__(self) -> None:
        self.pairs = np.zeros(0, np.uint32)
        self.changes = 0

    def to_text(self) -> str:
        """For the metadata of a file; `from_text` takes it back."""
        return base64.b64encode(self.pairs.astype("<u4").tobytes()).decode()

    @classmethod
    def from_text(cls, text: str) -> Past:
        past = cls()
        past.pairs = np.frombuffer(base64.b64decode(text), "<u4").astype(np.uint32)[-PAST:]
        return past

    def note(self, ids: Sequence[int]) -> None:
        """The session has sent these tokens for learning."""
        self.pairs = np.concatenate((self.pairs, _pairs(ids[-PAST - 1 :])))[-PAST:]
        self.changes += 1

    def ceiling(self, ids: Sequence[int], start: int, familiar: float, largest: float) -> float:
        """The largest scale of the delta that the prompt ``ids`` should be served with.

        Args:
            start: where what is new to the session begins; the prompt is judged by HEAD tokens from there on, or by its last.
            familiar: the share of known pairs from which on ``largest`` is allowed; 0: it always is.
        """
        first = max(0, min(start, len(ids) - 1 - HEAD))
        head = _pairs(ids[first : first + HEAD + 1])
        if familiar == 0 or len(self.pairs) < PAST // 2 or not len(head):
            return largest
        share = float(np.isin(head, self.pairs).mean())
        return largest * min(1.0, max(0.0, (share - CHANCE) / (familiar - CHANCE)))


def _pairs(ids: Sequence[int]) -> np.ndarray:
    tokens = np.asarray(ids, np.uint32)
    return tokens[:-1] * np.uint32(2654435761) ^ tokens[1:]  # wraps around, as a hash should
