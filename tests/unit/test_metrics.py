"""Metrics: what is counted, what an API server makes of it, and that vLLM's own /metrics keeps every byte."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from test_admin import Engine
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from world import World

from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.counts import EngineCounts, snapshot
from vllm_ttt.engine.ledger import ASKED_FOR
from vllm_ttt.frontend import exposition
from vllm_ttt.frontend.exposition import Figures, MetricsMiddleware
from vllm_ttt.metrics import BY_NAME, METRICS, PREFIX, REASONS, Values
from vllm_ttt.types import ChunkReason, ChunkReport, Trial
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.learn.budget import Budget
from vllm_ttt.worker.learn.device_times import DeviceTimes

pytestmark = pytest.mark.unit


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """(name, values of our own label and le) -> value, of all our series."""
    found = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            if s.name.startswith(PREFIX):
                own = tuple(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "engine"))
                assert (s.name, own) not in found, "a series is there twice"
                found[s.name.removeprefix(PREFIX), own] = s.value
    return found


def chunk(skipped: ChunkReason | None = None, loss: float = 2.0, frozen: float | None = None, tokens: int = 256) -> ChunkReport:
    return ChunkReport(1, "r", tokens, loss, frozen, skipped, tokens, 1, 0.012, None if skipped else 0.12)


# Names


def test_names_follow_the_practice_of_prometheus() -> None:
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|percent|count|sum|bucket)(_|$)", metric.name), "base units only"
        assert bool(metric.label) == bool(metric.values), "every label has values that are known from the start"
        assert metric.label not in ("model_name", "engine", "le")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith(".")


def test_a_label_that_nobody_thought_of_does_not_make_a_series() -> None:
    values = Values("skipped_tokens_total")
    for i in range(1000):
        values.add("skipped_tokens_total", 1, f"reason-{i}")
    assert set(values.snapshot()["skipped_tokens_total"]) == set(REASONS)
    assert values.snapshot()["skipped_tokens_total"][REASONS[-1]] == 1000


# Counting


def test_chunks_are_counted_by_what_became_of_them() -> None:
    counts = EngineCounts()
    for report in (
        chunk(frozen=2.5), chunk(frozen=2.001), chunk(frozen=1.5, tokens=100), chunk(), chunk("loss", 9.0),
        chunk("nonfinite", math.inf), chunk("short", math.nan, tokens=5), chunk("error", math.nan),
        chunk(loss=math.nan, frozen=1.0),
    ):  # fmt: skip
        counts.chunk(report)
    found = counts.snapshot()
    assert found["learned_tokens_total"][""] == 4 * 256 + 100
    assert found["commits_total"][""] == found["chunks_total"]["learned"] == 5
    assert {k: n for k, n in found["chunks_total"].items() if n} == {
        "learned": 5,
        "loss": 1,
        "nonfinite": 1,
        "short": 1,
        "error": 1,
    }
    assert found["skipped_tokens_total"]["short"] == 5
    assert found["skipped_tokens_total"]["loss"] == 256
    assert found["measured_total"] == {"better": 1, "even": 1, "worse": 1}, "what is not finite was not measured"
    assert found["measured_loss_nats"]["frozen"][0] == pytest.approx(2.5 + 2.001 + 1.5)
    assert found["measured_loss_nats"]["session"][0] == 6.0
    assert sum(found["chunk_loss_nats"][""][1:]) == 5, "finite losses alone"
    assert sum(found["delta_norm_ratio"][""][1:]) == 5
    assert sum(found["rate"][""][1:]) == 5, "with each commit"
    assert found["rate"][""][0] == pytest.approx(5 * 0.012)


def test_what_the_guard_found_is_counted() -> None:
    counts = EngineCounts()
    for trial in (Trial(1, 16, 0.01, None), Trial(1, 32, 0.02, None), Trial(1, 48, 0.4, 32)):
        counts.tried(trial)
    found = counts.snapshot()
    assert found["guard_trials_total"] == {"good": 2, "bad": 1}
    assert found["rollbacks_total"] == {"guard": 1, "request": 0}


def test_an_observation_falls_into_the_bucket_that_it_is_no_larger_than() -> None:
    values = Values("delta_norm_ratio")
    bounds = BY_NAME["delta_norm_ratio"].buckets
    for value in (0.0, bounds[0], bounds[0] * 1.001, bounds[-1], bounds[-1] * 2):
        values.observe("delta_norm_ratio", value)
    counts = values.snapshot()["delta_norm_ratio"][""][1:]
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (2, 1, 1, 1)
    assert sum(counts) == 5


def test_the_workers_times() -> None:
    import torch

    budget = Budget(512, 1.25)
    budget.calibrate(512, 0.05)
    times = DeviceTimes(Clock(torch.device("cpu")), budget)
    times.learned(512, 0.03, "serving")
    times.serving += 0.5
    times.under_way.append((10.0, 10.25, 512, "idle"))
    found = times.snapshot()
    assert budget.costs == {512: pytest.approx(1.2 * (0.8 * 0.05 + 0.2 * 0.03))}, (
        "each step corrects its cost, by a fifth at most"
    )
    assert found["learning_seconds_total"] == {"serving": 0.03, "idle": 0.25}
    assert found["serving_seconds_total"] == {"": 0.5}
    assert sum(found["step_seconds"][""][1:]) == 2
    assert times.snapshot() == found, "nothing is counted twice"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "state", limit=3)
    yield world
    world.end()


def figures_of(world: World) -> dict[str, dict[str, Any]]:
    scheduler = SimpleNamespace(
        ttt_config=TTTConfig(), ttt_tiers=world.tiers, ttt_ledger=world.ledger, ttt_counts=world.tiers.counts,
        ttt_guard=SimpleNamespace(errors=SimpleNamespace(count=3)), ttt_probe=SimpleNamespace(text=[[1, 2]]),
        ttt_holding=SimpleNamespace(count=1),
    )  # fmt: skip
    worker = {
        "slots": {"": [*list(world.ledger.by_adapter)[-1:], 10**6]},
        "evictions_total": {"device": 7},
        "errors_total": {"worker": 2},
        "pending_tokens": {"": 5},
        "guard_active": {"": 1},
    }
    return snapshot(scheduler, worker)


def test_sessions_are_counted_where_they_are(world: World) -> None:
    for i in range(5):
        world.use(f"s{i}", 1.0)
        world.save(f"s{i}")
    fresh = world.use("frozen", 1.0)
    fresh.frozen = ASKED_FOR
    found = figures_of(world)
    assert found["sessions"] == {"slot": 1, "memory": 2, "disk": 3, "new": 0}
    assert found["frozen_sessions"] == {"guard": 0, "request": 1}
    assert found["unsaved_sessions"] == {"": 1}
    assert found["saves_total"] == {"done": 5, "failed": 0}
    assert sum(found["save_seconds"][""][1:]) == 5
    assert found["evictions_total"] == {"device": 7, "memory": 3}
    assert found["errors_total"] == {"engine": 3, "worker": 2}
    assert found["held_requests"] == {"": 1}
    assert found["state_dir_bytes"][""] == sum(f.stat().st_size for f in world.store.folder.root.rglob("*.safetensors")) > 0
    world.use("s0")
    assert figures_of(world)["loads_total"] == {"done": 1, "failed": 0, "damaged": 0}
    world.run()
    Engine(world).ask("reset", "s1")
    world.run()
    reset = figures_of(world)
    assert reset["sessions"]["new"] == 1
    assert sum(reset["sessions"].values()) == 6
    assert reset["state_dir_bytes"][""] == sum(f.stat().st_size for f in world.store.folder.root.rglob("*.safetensors"))


def test_a_save_that_fails_is_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ttt.errors import RequestError

    def no_room(uid: str) -> str:
        raise OSError(28, "No space left on device")

    world.use("a", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(world.store.folder, "new_file", no_room)
        with pytest.raises(RequestError, match="No space left"):
            world.save("a")
    assert figures_of(world)["saves_total"] == {"done": 0, "failed": 1}


def test_the_admin_operation_asks_the_worker_once(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    engine = Engine(world)
    engine.scheduler.ttt_counts, engine.scheduler.ttt_holding = world.tiers.counts, SimpleNamespace(count=0)
    engine.scheduler.ttt_guard, engine.scheduler.ttt_probe = (
        SimpleNamespace(errors=SimpleNamespace(count=0)),
        SimpleNamespace(text=[]),
    )
    found = engine.ask("metrics")
    assert engine.calls == ["ttt_metrics"]
    assert set(found) == set(BY_NAME) - {"snapshot_age_seconds"}, "the whole list of metrics, and nothing else"
    for name, series in found.items():
        assert set(series) == set(BY_NAME[name].values or ("",)), name
    world.end()


# Showing


def everything() -> dict[str, dict[str, Any]]:
    values = Values(*BY_NAME)
    values.add("learned_tokens_total", 1234)
    values.observe("held_seconds", 0.02)
    values.observe("held_seconds", 1e9)
    return values.snapshot()


#: what a Prometheus server sends
SCRAPER = {
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}


class Core:
    """An engine that is asked."""

    def __init__(self) -> None:
        self.asked, self.answer, self.gate = 0, {"ok": True, "result": everything()}, asyncio.Event()
        self.gate.set()

    async def ask(self) -> dict[str, Any]:
        self.asked += 1
        await self.gate.wait()
        return self.answer


def test_the_text_is_what_was_counted() -> None:
    figures = Figures([Core().ask], "m")
    asyncio.run(figures.refresh())
    found = samples(figures.text().decode())
    assert found["learned_tokens_total", ()] == 1234
    assert found["held_seconds_count", ()] == 2
    assert found["held_seconds_bucket", ("0.025",)] == 1
    assert found["held_seconds_bucket", ("0.01",)] == 0
    assert found["held_seconds_bucket", ("+Inf",)] == 2
    for metric in METRICS:
        for value in metric.values or ("",):
            own = (value,) if value else ()
            assert (metric.name + ("_count" if metric.kind == "histogram" else ""), own) in found


def test_figures_of_several_engines_are_one_text() -> None:
    """Each family once, as Prometheus wants it, with the numbers of the engines; one that does not answer hides no other."""

    async def story() -> None:
        first, second = Core(), Core()
        second.answer["result"]["learned_tokens_total"][""] = 5
        figures = Figures([first.ask, second.ask], "m")
        second.gate.clear()
        await figures.refresh()
        assert learned(figures) == {"0": 1234}
        second.gate.set()
        await asyncio.sleep(0)
        await figures.refresh()
        assert learned(figures) == {"0": 1234, "1": 5}

    def learned(figures: Figures) -> dict[str, float]:
        families = list(text_string_to_metric_families(figures.text().decode()))
        assert len({family.name for family in families}) == len(families) == len(METRICS)
        return {s.labels["engine"]: s.value for f in families for s in f.samples if s.name == f"{PREFIX}learned_tokens_total"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exposition, "PATIENCE", 0.05)
        asyncio.run(story())


def serve(core: Core | None, monkeypatch: pytest.MonkeyPatch, **changes: float) -> FastAPI:
    """vLLM's own /metrics, with ours."""
    for name, value in changes.items():
        monkeypatch.setattr(exposition, name, value)
    app = FastAPI()
    attach_router(app)
    app.add_middleware(MetricsMiddleware)
    if core is not None:
        app.state.ttt_figures = Figures([core.ask], "m")
    return app


async def get(app: FastAPI, path: str = "/metrics", **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        return await http.request(options.pop("method", "GET"), path, **options)


@pytest.mark.parametrize("several", [False, True], ids=["one process", "several"])
def test_vllms_own_metrics_come_first_and_unchanged(several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    if several:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    core = Core()
    with_ours, without = serve(core, monkeypatch), serve(None, monkeypatch)
    answer, stock = asyncio.run(get(with_ours)), asyncio.run(get(without))
    names = lambda text: re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)  # noqa: E731
    ours = names(answer.text)[len(names(stock.text)) :]
    assert names(answer.text)[: len(names(stock.text))] == names(stock.text)
    assert len(ours) == len(METRICS)
    assert all(name.startswith(PREFIX) for name in ours)
    assert answer.headers["content-type"] == stock.headers["content-type"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    others = [get(with_ours, method="POST"), get(with_ours, method="HEAD"), get(with_ours, "/metricsx")]
    for other in others:
        assert not samples(asyncio.run(other).text)
    assert core.asked == 1, "nobody but GET /metrics asks the engine"


@pytest.mark.parametrize("headers", [{}, {"Accept-Encoding": "gzip"}, SCRAPER], ids=["plain", "gzip", "a scraper"])
def test_the_route_with_a_slash_says_the_same(headers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with_ours, without = serve(Core(), monkeypatch), serve(None, monkeypatch)
    answer, stock = (asyncio.run(get(app, "/metrics/", headers=headers)) for app in (with_ours, without))
    found, plain = samples(answer.text), samples(asyncio.run(get(with_ours)).text)
    age = ("snapshot_age_seconds", ())
    changing = lambda key: key == age or key[0].endswith("_created")  # noqa: E731
    assert {k: v for k, v in found.items() if not changing(k)} == {k: v for k, v in plain.items() if not changing(k)}
    assert found["learned_tokens_total", ()] == 1234
    assert answer.headers["content-type"] == stock.headers["content-type"]
    families = text_string_to_metric_families
    if "openmetrics" in answer.headers["content-type"]:
        assert answer.text.endswith("\n# EOF\n")
        families = openmetrics_families
    names = {family.name for family in families(answer.text)}
    assert names == {family.name for family in families(stock.text)} | {PREFIX + m.name.removesuffix("_total") for m in METRICS}


def test_the_engine_is_asked_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    app = serve(core, monkeypatch, FRESH=60.0)  # a slow machine takes over a second for fifty answers

    async def many() -> list[httpx.Response]:
        return [*await asyncio.gather(*(get(app) for _ in range(50))), await get(app)]

    answers = asyncio.run(many())
    assert core.asked == 1
    assert all(samples(answer.text)["learned_tokens_total", ()] == 1234 for answer in answers)


def test_an_engine_that_does_not_answer_costs_a_moment_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    app = serve(core, monkeypatch, PATIENCE=0.05, FRESH=0.0)

    async def story() -> None:
        core.gate.clear()
        assert not samples((await get(app)).text), "it has never answered"
        await get(app)
        assert core.asked == 1, "it is not asked again before it has answered"
        core.gate.set()
        await asyncio.sleep(0.01)
        assert samples((await get(app)).text)["learned_tokens_total", ()] == 1234
        core.gate.clear()
        await asyncio.sleep(0.1)
        late = samples((await get(app)).text)
        assert late["learned_tokens_total", ()] == 1234
        assert late["snapshot_age_seconds", ()] >= 0.1, "old figures say that they are old"
        core.gate.set()

    asyncio.run(story())


def test_an_engine_that_is_gone_leaves_vllms_own_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Core):
        async def ask(self) -> dict[str, Any]:
            raise RuntimeError("EngineCore is dead")

    answer = asyncio.run(get(serve(Dead(), monkeypatch)))
    assert answer.status_code == 200
    assert not samples(answer.text)


def test_without_stats_there_are_no_figures() -> None:
    from argparse import Namespace

    from vllm_ttt.frontend.endpoint import endpoint_plugin

    engine = SimpleNamespace(
        engine_core=SimpleNamespace(call_utility_async=print), model_config=SimpleNamespace(served_model_name="m")
    )
    for off in (True, False):
        state: Any = SimpleNamespace()
        asyncio.run(endpoint_plugin().init_state(engine, state, Namespace(disable_log_stats=off)))
        assert hasattr(state, "ttt_figures") is not off
