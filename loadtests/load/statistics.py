"""Percentiles and rates of one arm, from every single time: locust's own percentiles are rounded."""

from __future__ import annotations

from collections import Counter, defaultdict
from statistics import mean, quantiles
from typing import Any


class Statistics:
    """Times in ms by what was measured ("answer", "TTFT", "TPOT", "left", "asked") and by kind of user."""

    def __init__(self) -> None:
        self.times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()

    def note(self, request_type: str, name: str, response_time: float, exception: Exception | None = None, **_: Any) -> None:
        """A listener of locust's event ``request``."""
        if exception is not None:
            self.errors[f"{request_type} {name}: {exception}"] += 1
        else:
            self.times[request_type, name].append(response_time)

    def figures(self, seconds: float) -> dict[str, Any]:
        """For JSON; ``seconds`` is how long the run took."""
        rows = [
            {"what": what, "kind": kind, **spread(times), "per_s": len(times) / seconds}
            for (what, kind), times in sorted(self.times.items())
        ]
        return {"seconds": seconds, "rows": rows, "errors": dict(self.errors)}


def spread(times: list[float]) -> dict[str, float]:
    """Count, mean, median, 95th and 99th percentile."""
    cuts = quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return {"count": len(times), "mean": mean(times), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}
