"""Watch a server with a real Prometheus and the files of configs/observability, ask what every panel asks, and draw it.

python loadtests/dashboard.py --target 127.0.0.1:8000 --seconds 300 --out dashboard.png

Needs `prometheus` on PATH (apt-get install prometheus; or PROMETHEUS=/path/to/it), and a server that has something to do.
It takes Grafana's place, not its looks: the queries and their variables are those that Grafana sends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from vllm_ttt.eval.server import end_group, free_port

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "observability"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "vllm-ttt.json"
#: Seconds between two looks. Grafana's $__rate_interval is at least four of them.
INTERVAL = 5

Series = list[tuple[str, list[tuple[float, float]]]]


def binary() -> str | None:
    """Where Prometheus is; None: it is not installed."""
    return os.environ.get("PROMETHEUS") or shutil.which("prometheus")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


@contextlib.contextmanager
def prometheus(target: str, interval: int = INTERVAL) -> Iterator[str]:
    """A Prometheus of our own, with the rules of the repository; its address. It ends, and its data go, with the context."""
    program = binary()
    if program is None:
        sys.exit("there is no prometheus: apt-get install prometheus, or PROMETHEUS=/path/to/it")
    config = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
    config["global"] = dict.fromkeys(config["global"], f"{interval}s")
    config["rule_files"] = [str(FOLDER / "prometheus" / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    with tempfile.TemporaryDirectory() as folder:
        file, url = Path(folder) / "prometheus.yaml", f"http://127.0.0.1:{free_port()}"
        file.write_text(yaml.safe_dump(config))
        place = [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={url.removeprefix('http://')}"]
        with (Path(folder) / "log").open("wb") as log:
            command = [program, f"--config.file={file}", *place]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                _ready(process, url, Path(folder) / "log")
                yield url
            finally:
                end_group(process)


def _ready(process: subprocess.Popen, url: str, log: Path) -> None:
    while True:
        if process.poll() is not None:
            sys.exit(f"prometheus ended with code {process.returncode}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200:
                return
        time.sleep(0.2)


def ask(url: str, path: str, **query: Any) -> Any:
    """What Prometheus answers. Raises RuntimeError where it does not like the question."""
    answer = httpx.get(f"{url}/api/v1/{path}", params=query, trust_env=False, timeout=30).json()
    if answer["status"] != "success":
        raise RuntimeError(f"{query}: {answer['error']}")
    return answer["data"]


def data(url: str, target: dict[str, Any], seconds: float, interval: int = INTERVAL) -> Series:
    """What a panel's query has for the last ``seconds``: (label, points) of each series, points as (time, value)."""
    text = target["expr"].replace("$__rate_interval", f"{max(4 * interval, 4)}s").replace("$instance", ".*")
    now = time.time()
    found = ask(url, "query_range", query=text, start=now - seconds, end=now, step=interval)["result"]
    legend = target.get("legendFormat") or ""
    series = []
    for one in found:
        label = legend
        for name, value in one["metric"].items():
            label = label.replace(f"{{{{{name}}}}}", value)
        points = [(float(at), float(value)) for at, value in one["values"]]
        series.append((label, [(at, value) for at, value in points if value == value]))  # a rate of nothing is NaN
    return [(label, points) for label, points in series if points]


def draw(found: list[tuple[dict[str, Any], Series]], file: Path, title: str) -> None:
    """One small chart for each panel, in the order of the dashboard."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(found) // 4)
    figure, axes = pyplot.subplots(rows, 4, figsize=(17, 2.5 * rows), layout="constrained")
    start = min((at for _, series in found for _, points in series for at, _ in points), default=0)
    for axis, (panel, series) in zip(axes.flat, found, strict=False):
        for label, points in series:
            axis.plot([(at - start) / 60 for at, _ in points], [value for _, value in points], label=label or None)
        axis.set_title(f"{panel['title']} [{panel['fieldConfig']['defaults']['unit']}]", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if any(label for label, _ in series):
            axis.legend(fontsize=6, frameon=False)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:8000", help="the server's host and port")
    parser.add_argument("--seconds", type=int, default=300, help="how long to watch")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    given = parser.parse_args()
    with prometheus(given.target) as url:
        print(f"Prometheus looks at {given.target} every {INTERVAL} s for {given.seconds} s: {url}", flush=True)
        time.sleep(given.seconds)
        found = [(p, [s for target in p["targets"] for s in data(url, target, given.seconds)]) for p in panels()]
        groups = ask(url, "rules")["groups"]
    version = subprocess.run([str(binary()), "--version"], capture_output=True, text=True, check=True)
    title = f"{(version.stdout or version.stderr).split(' (')[0]}: the dashboard's panels; time in minutes"
    draw(found, given.out, title)
    for panel, series in found:
        print(f"{panel['title']}: {len(series)} series, {sum(len(points) for _, points in series)} points")
    rules = [rule for group in groups for rule in group["rules"]]
    print(f"{len(rules)} rules, {sum(rule['health'] == 'ok' for rule in rules)} evaluated without an error")
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    print(f"alerts that fire: {', '.join(firing) or 'none'}")
    empty = [panel["title"] for panel, series in found if not series]
    sys.exit(f"without data: {', '.join(empty)}" if empty else 0)


if __name__ == "__main__":
    main()
