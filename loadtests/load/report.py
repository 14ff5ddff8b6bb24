"""The Markdown of a run: its arms side by side, memory, the books, and whether learning yields."""

from __future__ import annotations

from typing import Any

TIMED = ("answer", "TTFT", "TPOT")
#: What the arms are, for people.
ARMS = {
    "alone": "base users alone",
    "unlearned": "all users; sessions learn nothing (`ttt_learn: 0`)",
    "learning": "all users; sessions learn",
}


def table(report: dict[str, Any]) -> str:
    """``report``: what `run_load.py` writes as JSON."""
    return "\n\n".join(part for part in (_times(report), _totals(report), _memory(report), _yielding(report)) if part)


def _times(report: dict[str, Any]) -> str:
    arms = report["arms"]
    head = ["measured", "users"] + [f"{arm}: p50, p95, p99 ms (number)" for arm in arms]
    lines = [_row(head), _row(["---"] * len(head))]
    keys = [(what, row["kind"]) for what in TIMED for row in _rows(arms, what)]
    for what, kind in dict.fromkeys(keys):
        cells = [_spread(_find(figures, what, kind)) for figures in arms.values()]
        lines.append(_row([what, kind, *cells]))
    return "\n".join(lines)


def _totals(report: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(report["arms"]) + " |", "| --- |" + " --- |" * len(report["arms"])]
    arms = report["arms"].values()
    count = lambda figures, what, who="": sum(  # noqa: E731
        row["count"] for row in figures["rows"] if row["what"] == what and row["kind"].startswith(who)
    )
    named = [
        ("who", [ARMS[arm] for arm in report["arms"]]),
        ("seconds", [f"{f['seconds']:.0f}" for f in arms]),
        ("answers", [count(f, "answer") for f in arms]),
        ("answers per second", [f"{count(f, 'answer') / f['seconds']:.2f}" for f in arms]),
        ("streams that clients left", [count(f, "left") for f in arms]),
        ("refusals that were provoked", [count(f, "asked", "hostile") for f in arms]),
        ("calls of owners", [count(f, "asked", "owner") for f in arms]),
        ("errors that were not", [sum(f["errors"].values()) for f in arms]),
        ("sessions at exactly the version that their client counted", [f["audit"]["exact"] for f in arms]),
        ("sessions within bounds, some of their requests having been given up", [f["audit"]["bounded"] for f in arms]),
        ("sessions that were saved, forked, rolled back, reset, frozen and deleted", [f["audit"]["owned"] for f in arms]),
        ("sessions that the guard rolled back", [f["audit"]["rolled_back"] for f in arms]),
        ("sessions that did not agree", [len(f["audit"]["problems"]) for f in arms]),
        ("versions committed", [f["audit"]["versions"] for f in arms]),
        ("tokens learned; per second", [f"{f['audit']['tokens']}; {f['audit']['tokens'] / f['seconds']:.0f}" for f in arms]),
        ("tokens skipped", [", ".join(f"{k} {v}" for k, v in f["audit"]["skipped"].items()) or "none" for f in arms]),
    ]
    return "\n".join([*lines, *(_row([name, *cells]) for name, cells in named)])


def _memory(report: dict[str, Any]) -> str:
    rows = [(arm, process, x) for arm, f in report["arms"].items() for process, x in f.get("memory", {}).items()]
    if not rows:
        return ""
    lines = ["| arm | process | resident MB after 40 % | at the end | peak | slope from then on, MB a minute |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for arm, process, x in rows:
        lines.append(_row([arm, process, *(f"{x[key]:.0f}" for key in ("warm", "end", "peak")), f"{x['per_minute']:+.2f}"]))
    return "\n".join(lines)


def _yielding(report: dict[str, Any]) -> str:
    x = report.get("yielding")
    if not x:
        return ""
    lines = ["| a backlog is learned | tokens learned per second | base tokens per second |", "| --- | --- | --- |"]
    lines.append(_row([f"while nobody is served ({x['idle']['tokens']} tokens)", f"{x['idle']['learned_per_s']:.0f}", ""]))
    name = f"beside base answers ({x['beside']['tokens']} tokens)"
    lines.append(_row([name, f"{x['beside']['learned_per_s']:.0f}", f"{x['beside']['base_per_s']:.0f}"]))
    lines.append(_row(["base answers, nothing to learn", "", f"{x['alone']['base_per_s']:.0f}"]))
    return "\n".join(lines)


def _rows(arms: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [row for figures in arms.values() for row in figures["rows"] if row["what"] == what]


def _find(figures: dict[str, Any], what: str, kind: str) -> dict[str, Any] | None:
    return next((row for row in figures["rows"] if (row["what"], row["kind"]) == (what, kind)), None)


def _spread(row: dict[str, Any] | None) -> str:
    return f"{row['p50']:.0f}, {row['p95']:.0f}, {row['p99']:.0f} ({row['count']})" if row else ""


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
