"""How many users there are at each moment."""

from __future__ import annotations

SHAPES = ("ramp", "spike", "soak")


def users(shape: str, peak: int, at: float) -> int:
    """Users at a moment of the run.

    Args:
        shape: "ramp": from one to ``peak``, evenly; "spike": a quarter, in the middle fifth all, a quarter; "soak": all.
        peak: users at most.
        at: 0 the beginning, 1 the end.
    """
    if shape == "ramp":
        return max(1, round(peak * at))
    if shape == "spike":
        return peak if 0.4 <= at < 0.6 else max(1, peak // 4)
    return peak
