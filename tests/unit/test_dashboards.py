"""configs/observability: every file loads, every query is well-formed and asks for metrics and labels that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards import DASHBOARD, FOLDER, RULES, expressions, named, panels, rules

from vllm_ttt.metrics import BY_NAME, METRICS, PREFIX

pytestmark = pytest.mark.unit


def metric(series: str) -> str:
    """The metric of a series of ours."""
    name = series.removeprefix(PREFIX)
    return name if name in BY_NAME else re.sub(r"_(?:bucket|sum|count)$", "", name)


def test_every_yaml_file_loads() -> None:
    files = sorted(FOLDER.rglob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file


def test_metrics_of_ours_exist_and_histograms_are_used_as_such() -> None:
    ours = {series for series in named() if series.startswith(PREFIX)}
    for series in ours:
        found = BY_NAME.get(metric(series))
        assert found is not None, series
        assert (found.kind == "histogram") == (series.removeprefix(PREFIX) != found.name), series
    shown = {metric(series) for series in ours}
    assert shown == set(BY_NAME), "the dashboard leaves metrics out"


def test_labels_and_their_values_exist() -> None:
    allowed = {"instance", "model_name", "le"}
    for text in expressions():
        for series, selector in re.findall(r"(vllm:ttt_\w+)\{([^}]*)\}", text):
            known = BY_NAME[metric(series)]
            for label, value in re.findall(r"(\w+)=~?\"([^\"]*)\"", selector):
                assert label in allowed | {known.label}, text
                if label == known.label:
                    assert set(value.split("|")) <= set(known.values), text
        grouped = {label.strip() for by in re.findall(r"\bby \(([^)]*)\)", text) for label in by.split(",")}
        labels = {m.label for m in METRICS if PREFIX + m.name in text}
        assert grouped <= allowed | labels, text


@pytest.mark.parametrize("text", expressions())
def test_queries_are_well_formed(text: str) -> None:
    for left, right in ("()", "[]", "{}"):
        depth = 0
        for character in re.sub(r'"[^"]*"', '""', text):
            depth += (character == left) - (character == right)
            assert depth >= 0
        assert depth == 0
    for function, series in re.findall(r"\b(rate|increase)\((vllm:\w+)", text):
        found = BY_NAME.get(metric(series))
        assert found is None or found.kind in ("counter", "histogram"), f"{function} of a gauge"
    for series in re.findall(r"(vllm:ttt_\w+)", text):
        if BY_NAME[metric(series)].kind != "gauge":
            assert re.search(rf"(?:rate|increase)\({series}\b[^)]*\[", text), f"{series} only ever grows: ask for its rate"
    if "histogram_quantile" in text:
        assert re.search(r"by \([^)]*\ble\b", text)


def test_rules_have_all_that_prometheus_wants() -> None:
    names = [rule.get("alert") or rule["record"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        assert set(rule) <= {"record", "alert", "expr", "for", "labels", "annotations"}
        if "record" in rule:
            assert re.fullmatch(r"[a-zA-Z_][\w:]*", rule["record"])
            continue
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        assert set(rule["annotations"]) == {"summary", "description"}
        for text in rule["annotations"].values():
            for label in re.findall(r"\$labels\.(\w+)", text):
                assert label == "instance" or label in rule["expr"], f"{rule['alert']}: {label} is aggregated away"
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == {rule["alert"] for rule in rules() if "alert" in rule}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (it comes with Prometheus)")
def test_prometheus_accepts_rules_and_queries(tmp_path: Path) -> None:
    queries = [{"record": f"q:{i}", "expr": _filled(text)} for i, text in enumerate(expressions())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": queries}]}))
    for path in (RULES, file):
        done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _filled(text: str) -> str:
    """A query as Grafana sends it."""
    return text.replace("$__rate_interval", "5m").replace("$instance", ".*")


def test_panels_do_not_overlap() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_the_containers_find_what_they_mount() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    for service in compose["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "a release, not whatever is latest"
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "nobody else's browser"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (FOLDER / source).is_dir() if source.startswith("./") else source in compose["volumes"]
    prometheus = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert all((RULES.parent / name).is_file() for name in prometheus["rule_files"])
