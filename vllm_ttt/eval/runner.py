"""Run protocols over a scorer with a progress bar, and write what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_ttt.eval import protocols, report
from vllm_ttt.eval.texts import Documents

TITLES = {"p2": "different documents of a domain", "p3": "the same document again", "long": "many documents of a domain"}


async def run(
    scorer: protocols.Scorer,
    docs: Documents,
    counts: dict[str, int],
    sessions: int,
    console: Console,
    arms: tuple[str, ...] = ("frozen", "retrieval", "ttt"),
    context_documents: int = protocols.CONTEXT_DOCUMENTS,
) -> dict[str, protocols.Result]:
    """Run each protocol of ``counts`` (protocol: how many requests), ``sessions`` of every domain side by side."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    work = {name: protocols.plan(name, docs, sessions, count) for name, count in counts.items()}
    results = {}
    with Progress(*columns, console=console) as progress:
        for name, plan in work.items():
            task = progress.add_task(TITLES[name], total=protocols.requests(name, plan, arms))
            tick = lambda task=task: progress.advance(task)  # noqa: E731
            results[name] = await protocols.run(name, scorer, plan, arms, tick, context_documents)
    return results


def write_json(file: str | Path, results: dict[str, protocols.Result], about: dict[str, Any], preset: str = "last") -> None:
    """Write the curves of ``preset`` (the layout of recorded ones), the measures, ``about`` and every session's losses."""
    measures = report.summaries(results)
    sessions = {name: {"domains": r.domains} | {arm: r.nats(arm) for arm in r.arms} for name, r in results.items()}
    accepted = {
        name: {arm: [report.characters(row) for row in rows] for arm, rows in result.arms.items()}
        for name, result in results.items()
    }
    found = {
        **report.curves(results, preset),
        "about": about,
        "measures": measures,
        "characters": accepted,
        "sessions": sessions,
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
