"""/metrics of a server that learns: what they say is what happened, and everything that the dashboard names is there."""

from __future__ import annotations

import os
import re
import time

import pytest
from dashboard import ask, binary, data, panels, prometheus
from dashboards import named
from prometheus_client.parser import text_string_to_metric_families
from served import Documents, Served, completion

from vllm_ttt.frontend.exposition import FRESH
from vllm_ttt.metrics import METRICS, PREFIX

pytestmark = pytest.mark.engine

Metrics = dict[tuple[str, str], float]


def scrape(served: Served) -> Metrics:
    """(name without prefix, value of our own label) -> value; histograms as their _count and _sum."""
    time.sleep(FRESH)  # figures that are younger are shown again
    found: Metrics = {}
    for family in text_string_to_metric_families(served.http.get("/metrics").text):
        for s in family.samples:
            if s.name.startswith(PREFIX) and "le" not in s.labels:
                own = [v for k, v in s.labels.items() if k not in ("model_name", "engine")]
                found[s.name.removeprefix(PREFIX), own[0] if own else ""] = s.value
                assert s.labels["model_name"] == "demo"
    return found


def change(before: Metrics, after: Metrics) -> Metrics:
    return {key: round(value - before[key], 6) for key, value in after.items() if value != before[key]}


def test_every_metric_is_there_from_the_start(exact: Served) -> None:
    found = scrape(exact)
    for metric in METRICS:
        for value in metric.values or ("",):
            assert (metric.name + ("_count" if metric.kind == "histogram" else ""), value) in found, metric.name
    assert found["slowdown_limit_ratio", ""] == 0.25
    assert found["backlog_limit_tokens", ""] == 65536


def test_what_is_counted_is_what_happened(exact: Served, documents: Documents) -> None:
    before = scrape(exact)
    name, ids = exact.fresh(), documents["kjv"][2]
    for part in (ids[:700], ids[:5]):
        exact.complete(part, name)
    exact.complete(ids[:100], name, vllm_xargs={"ttt_learn": 0})
    exact.settle()
    session, moved = exact.session(name), change(before, scrape(exact))
    assert moved["learned_tokens_total", ""] == session["tokens_learned"] == 699
    assert moved["commits_total", ""] == moved["chunks_total", "learned"] == session["version"] == 3
    assert moved["skipped_tokens_total", "short"] == session["tokens_skipped"]["short"] == 4
    assert moved["session_requests_total", "yes"] == 2
    assert moved["session_requests_total", "no"] == 1
    assert moved["chunk_loss_nats_count", ""] == 3
    assert moved["chunk_loss_nats_sum", ""] == pytest.approx(sum(chunk["loss"] for chunk in session["losses"]), abs=1e-3)
    measured = [chunk for chunk in session["losses"] if chunk["frozen_loss"] is not None]
    assert moved["measured_loss_nats_count", "frozen"] == moved["measured_loss_nats_count", "session"] == len(measured) > 0
    assert moved["delta_norm_ratio_count", ""] == 3
    assert sum(moved.get(("learning_seconds_total", load), 0.0) for load in ("serving", "idle")) > 0
    assert moved["serving_seconds_total", ""] > 0
    assert moved["step_seconds_count", ""] > 0
    assert not [key for key in moved if key[0] in ("errors_total", "refused_requests_total", "saves_total", "loads_total")]
    text = exact.http.get("/metrics").text
    assert name not in text
    assert not re.search(r"ttt:\d", text), "sessions' adapters would make a series for each set of them that ever ran"


def test_sessions_are_counted_where_they_are(exact: Served, documents: Documents) -> None:
    slots = exact.http.get("/v1/ttt/config").json()["sessions"]["resident"]
    for _ in range(slots + 2):
        exact.complete(documents["kjv"][0][:60], exact.fresh())
    exact.settle()
    found = scrape(exact)
    listed = exact.http.get("/v1/ttt/sessions").json()["sessions"]
    for tier in ("slot", "memory", "disk", "new"):
        assert found["sessions", tier] == sum(session["tier"] == tier for session in listed)
    assert 0 < found["sessions", "slot"] <= slots
    assert found["sessions", "memory"] >= 2
    assert found["pending_tokens", ""] == found["held_requests", ""] == 0


def test_a_request_that_waits_for_its_session_is_held(exact: Served, documents: Documents) -> None:
    name, before = exact.fresh(), scrape(exact)
    exact.together(*(completion(documents["man2"][i][:900], name) for i in range(3)))
    exact.settle()
    moved = change(before, scrape(exact))
    assert moved["held_seconds_count", ""] == 2, "the first had nothing to wait for"
    assert moved["held_seconds_sum", ""] > 0
    assert ("held_requests", "") not in moved


def test_base_requests_count_nothing(exact: Served, documents: Documents) -> None:
    before = scrape(exact)
    exact.complete(documents["kjv"][0][:200])
    moved = change(before, scrape(exact))
    assert set(moved) <= {("serving_seconds_total", ""), ("snapshot_age_seconds", "")}


def test_everything_that_dashboard_and_rules_name_exists(exact: Served) -> None:
    present = set(re.findall(r"^(vllm:\w+)", exact.http.get("/metrics").text, re.MULTILINE))
    names = named()
    assert len(names) > 20
    assert names <= present, f"nowhere on /metrics: {sorted(names - present)}"


#: Panels of what a server without a state dir does not do.
ON_DISK = {"How long a save takes"}


@pytest.mark.skipif(binary() is None and not os.environ.get("CI"), reason="no Prometheus: apt-get install prometheus")
def test_a_real_prometheus_has_data_for_every_panel(exact: Served, documents: Documents) -> None:
    name, looks = exact.fresh(), 60
    with prometheus(exact.url.removeprefix("http://"), interval=1) as url:
        while not ask(url, "query", query="vllm:ttt_sessions")["result"]:
            time.sleep(0.2)
        exact.together(*(completion(documents["man2"][i][:900], name) for i in range(3)))
        exact.settle()
        empty: set[str] = {"not looked yet"}
        while not empty <= ON_DISK and (looks := looks - 1):
            exact.complete(documents["man2"][3][:600], name)  # a rate needs two looks
            empty = {p["title"] for p in panels() if not any(data(url, target, 300, 1) for target in p["targets"])}
        rules = [rule for group in ask(url, "rules")["groups"] for rule in group["rules"]]
    assert len(panels()) > 20
    assert empty <= ON_DISK
    assert len(rules) > 10
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, "unknown: its first turn has not come"
