"""ASGI middleware: what the engine has counted, in Prometheus' text format, at the end of vLLM's own ``/metrics``.

The engine core is asked when somebody asks for ``/metrics``, and never otherwise: the figures are the same whichever API server
answers, and nothing is sent or counted in the meantime. (vLLM's own way, `SchedulerStats`, has no field for an extension.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_ttt.metrics import BY_NAME, METRICS, PREFIX, Snapshot

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
#: Asks the engine; returns the answer of the admin operation `metrics`.
Ask = Callable[[], Awaitable[dict[str, Any]]]

#: Seconds for which figures are fresh enough: however often somebody asks, the engine is not asked more often.
FRESH = 1.0
#: Seconds to wait for an engine that is in a long step, before the figures of last time are shown.
PATIENCE = 2.0


class Figures:
    """The latest figures of one engine, and how they are asked for: once at a time, whoever wants them."""

    def __init__(self, ask: Ask, model: str, engine: str = "0"):
        """``model``, ``engine``: the labels that vLLM's own metrics have."""
        self.ask, self.model, self.engine = ask, model, engine
        self.snapshot: Snapshot = {}
        self.taken = 0.0
        self.asking: asyncio.Task | None = None
        self.registry = CollectorRegistry()
        self.registry.register(_Families(self))

    async def text(self) -> bytes:
        """The metrics in Prometheus' text format; nothing while the engine has never answered."""
        if time.monotonic() - self.taken > FRESH:
            if self.asking is None:
                self.asking = asyncio.create_task(self._refresh())
            await asyncio.wait({self.asking}, timeout=PATIENCE)
        return generate_latest(self.registry) if self.snapshot else b""

    async def _refresh(self) -> None:
        try:
            answer = await self.ask()
            if answer["ok"]:
                self.snapshot, self.taken = answer["result"], time.monotonic()
        except Exception as error:
            logger.debug("vllm-ttt: the engine does not say what it has counted: %s", error)
        finally:
            self.asking = None

    def families(self) -> Iterator[Metric]:
        self.snapshot["snapshot_age_seconds"] = {"": time.monotonic() - self.taken}
        for metric in METRICS:
            if metric.name in self.snapshot:
                yield self._family(metric.name)

    def _family(self, name: str) -> Metric:
        metric = BY_NAME[name]
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        labels = ["model_name", "engine", *([metric.label] if metric.label else [])]
        family = kinds[metric.kind](PREFIX + name, metric.help, labels=labels)
        for value, found in self.snapshot[name].items():
            where = [self.model, self.engine, *([value] if metric.label else [])]
            if isinstance(found, list):
                family.add_metric(where, _cumulative(metric.buckets, found[1:]), sum_value=found[0])
            else:
                family.add_metric(where, found)
        return family


class _Families(Collector):
    def __init__(self, figures: Figures):
        self.figures = figures

    def describe(self) -> list[Metric]:
        return []  # nothing is known before the engine was asked

    def collect(self) -> Iterator[Metric]:
        return self.figures.families()


class MetricsMiddleware:
    """Adds ours to the answer of ``GET /metrics``. Every other request passes untouched."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) not in ("/metrics", "/metrics/"):
            return await self.app(scope, receive, send)
        figures: Figures | None = getattr(scope["app"].state, "ttt_figures", None)
        if figures is None or scope["method"] != "GET":
            return await self.app(scope, receive, send)
        ours = await figures.text()
        appending = False

        async def append(message: Message) -> None:
            nonlocal appending
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                plain = headers.get(b"content-type", b"").startswith(b"text/plain") and b"content-encoding" not in headers
                appending = message["status"] == 200 and plain
                if appending:
                    longer = lambda n, v: str(int(v) + len(ours)).encode() if n.lower() == b"content-length" else v  # noqa: E731
                    message = {**message, "headers": [(name, longer(name, value)) for name, value in message["headers"]]}
            elif appending and not message.get("more_body", False):
                message = {**message, "body": message.get("body", b"") + ours}
            await send(message)

        return await self.app(scope, receive, append)


def _cumulative(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many observations were at most so large."""
    total, buckets = 0, []
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
