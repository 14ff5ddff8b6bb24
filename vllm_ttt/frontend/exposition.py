"""ASGI middleware: what the engine has counted, in Prometheus' text format, at the end of vLLM's own ``/metrics``.

The engine core is asked when somebody asks for ``/metrics``, and never otherwise: the figures are the same whichever API server
answers, and nothing is sent or counted in the meantime. (vLLM's own way, `SchedulerStats`, has no field for an extension.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vllm_ttt.frontend.paths import path_of
from vllm_ttt.metrics import BY_NAME, METRICS, PREFIX, Snapshot

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
#: Asks an engine; returns the answer of the admin operation `metrics`.
Ask = Callable[[], Awaitable[dict[str, Any]]]

_OPEN_METRICS = "application/openmetrics-text"
#: Seconds for which figures are fresh enough: however often somebody asks, the engine is not asked more often.
FRESH = 1.0
#: Seconds to wait for an engine that is in a long step, before the figures of last time are shown.
PATIENCE = 2.0


class Figures:
    """The latest figures of the engines, and how they are asked for: each once at a time, whoever wants them."""

    def __init__(self, asks: Sequence[Ask], model: str):
        """``asks``: one for each engine. ``model``: a label that vLLM's own metrics have, too; as the engine's number."""
        self.model, self.engines = model, [_Engine(ask) for ask in asks]
        self.registry = CollectorRegistry()
        self.registry.register(_Families(self))

    async def refresh(self) -> None:
        """Ask the engines that were not asked lately. One that does not answer keeps nobody's figures back but its own."""
        if asking := {engine.asked() for engine in self.engines if time.monotonic() - engine.taken > FRESH}:
            await asyncio.wait(asking, timeout=PATIENCE)

    def text(self, kind: str = "text/plain") -> bytes:
        """The metrics in the format of the content type ``kind``; none while no engine has ever answered."""
        encode, _ = choose_encoder(kind)
        return encode(self.registry)

    def families(self) -> Iterator[Metric]:
        for engine in self.engines:
            if engine.snapshot:
                engine.snapshot["snapshot_age_seconds"] = {"": time.monotonic() - engine.taken}
        for metric in METRICS:
            if any(metric.name in engine.snapshot for engine in self.engines):
                yield self._family(metric.name)

    def _family(self, name: str) -> Metric:
        metric = BY_NAME[name]
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        labels = ["model_name", "engine", *([metric.label] if metric.label else [])]
        family = kinds[metric.kind](PREFIX + name, metric.help, labels=labels)
        for number, engine in enumerate(self.engines):
            for value, found in engine.snapshot.get(name, {}).items():
                where = [self.model, str(number), *([value] if metric.label else [])]
                if isinstance(found, list):
                    family.add_metric(where, _cumulative(metric.buckets, found[1:]), sum_value=found[0])
                else:
                    family.add_metric(where, found)
        return family


class _Engine:
    """One of them."""

    def __init__(self, ask: Ask):
        self.ask = ask
        self.snapshot: Snapshot = {}
        self.taken = 0.0
        self.asking: asyncio.Task | None = None

    def asked(self) -> asyncio.Task:
        """Is done when it has answered."""
        if self.asking is None:
            self.asking = asyncio.create_task(self._ask())
        return self.asking

    async def _ask(self) -> None:
        try:
            answer = await self.ask()
            if answer["ok"]:
                self.snapshot, self.taken = answer["result"], time.monotonic()
        except Exception as error:
            logger.debug("vllm-ttt: the engine does not say what it has counted: %s", error)
        finally:
            self.asking = None


class _Families(Collector):
    def __init__(self, figures: Figures):
        self.figures = figures

    def describe(self) -> list[Metric]:
        return []  # nothing is known before the engine was asked

    def collect(self) -> Iterator[Metric]:
        return self.figures.families()


class MetricsMiddleware:
    """Adds ours to the answer of ``GET /metrics``, with a slash or without. Every other request passes untouched."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] != "http" or path_of(scope) not in ("/metrics", "/metrics/"):
            return await self.app(scope, receive, send)
        figures: Figures | None = getattr(scope["app"].state, "ttt_figures", None)
        if figures is None or scope["method"] != "GET":
            return await self.app(scope, receive, send)
        await figures.refresh()
        # The mounted app behind /metrics/ would compress, and nothing can be added to compressed bytes.
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"accept-encoding"]
        start: Message = {}
        body = b""

        async def append(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
            elif message["type"] == "http.response.body":
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_both(start, body, figures, send)
            else:
                await send(message)

        return await self.app({**scope, "headers": headers}, receive, append)


async def _send_both(start: Message, body: bytes, figures: Figures, send: Callable[[Message], Awaitable[None]]) -> None:
    """vLLM's answer with ours at its end, in the format that it has."""
    found = {name.lower(): value for name, value in start["headers"]}
    kind = found.get(b"content-type", b"").decode("latin-1")
    if start["status"] == 200 and kind.startswith(("text/plain", _OPEN_METRICS)) and b"content-encoding" not in found:
        if kind.startswith(_OPEN_METRICS):
            body = body.removesuffix(b"# EOF\n")  # ours ends with it
        body += figures.text(kind)
    headers = [(name, str(len(body)).encode() if name.lower() == b"content-length" else v) for name, v in start["headers"]]
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _cumulative(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus' buckets: how many observations were at most so large."""
    total, buckets = 0, []
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
