"""The no-regret scale (docs/algorithm.md): which multiple of its B a session is served with, chosen from its own past losses.

Plain numbers on the host: a handful per request, when the measured losses have come home.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: One request moves the losses of two scales apart by at most so many nats: what it gained must not outweigh what follows.
LARGEST_SPREAD = 0.04


def measured(scales: Sequence[float]) -> list[float]:
    """The scales under which a loss is computed: at most three, since over a range this small it is a parabola in the scale."""
    return list(scales) if len(scales) <= 3 else [scales[0], scales[(len(scales) - 1) // 2], scales[-1]]


def loss_at(scale: float, known: Sequence[float], losses: Sequence[float]) -> float:
    """The loss under ``scale``, from those under the ``known`` scales: Lagrange's polynomial through them."""
    total = 0.0
    for i, (own, loss) in enumerate(zip(known, losses, strict=True)):
        total += loss * math.prod((scale - x) / (own - x) for j, x in enumerate(known) if j != i)
    return total


def add(past: Sequence[float], scales: Sequence[float], losses: Sequence[float], share: float, memory: float) -> list[float]:
    """What a session knows of its scales after one more request.

    Args:
        past: nats by scale, as this function returned them; all 0 for a fresh session.
        losses: mean loss of the request under each of `measured(scales)`, finite.
        share: how much of a request it is, tokens of the chunk / tokens of a full chunk.
        memory: the share of ``past`` that a whole request leaves.
    Returns:
        nats by scale; only their differences mean anything.
    """
    known = measured(scales)
    new = [loss_at(scale, known, losses) for scale in scales]
    lowest = min(new)
    shrink = min(1.0, LARGEST_SPREAD / max(max(new) - lowest, 1e-12))
    keep = memory**share
    return [keep * p + share * shrink * (x - lowest) for p, x in zip(past, new, strict=True)]


def choose(past: Sequence[float], scales: Sequence[float], rate: float) -> float:
    """The scale to serve with: the mean of ``scales``, weighted by exp(-rate * past)."""
    lowest = min(past)
    weights = [math.exp(-rate * (p - lowest)) for p in past]
    return sum(w * s for w, s in zip(weights, scales, strict=True)) / sum(weights)
