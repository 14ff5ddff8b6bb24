"""What the dashboard and the rules under configs/observability ask Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "configs" / "observability"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "vllm-ttt.json"
RULES = FOLDER / "prometheus" / "rules.yaml"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*queries, *(rule["expr"] for rule in rules())]


def named() -> set[str]:
    """Every metric of vLLM and of ours that they name, as it stands on /metrics."""
    return {name for text in expressions() for name in re.findall(r"\bvllm:\w+", text)}
