"""Run protocols over a scorer with a progress bar, and write what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_ttt.eval import protocols, report
from vllm_ttt.eval.texts import Documents

TITLES = {"p2": "different documents of a domain", "p3": "the same document again"}


async def run(
    scorer: protocols.Scorer,
    docs: Documents,
    counts: dict[str, int],
    sessions: int,
    console: Console,
    arms: tuple[str, ...] = protocols.ARMS,
) -> dict[str, protocols.Result]:
    """Run each protocol of ``counts`` (protocol: interactions or passes), ``sessions`` of every domain side by side."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    work = {name: protocols.plan(name, docs, sessions, count) for name, count in counts.items()}
    results = {}
    with Progress(*columns, console=console) as progress:
        for name, plan in work.items():
            task = progress.add_task(TITLES[name], total=protocols.requests(name, plan, arms))
            results[name] = await protocols.run(name, scorer, plan, arms, lambda task=task: progress.advance(task))
    return results


def write_json(file: str | Path, results: dict[str, protocols.Result], about: dict[str, Any], preset: str = "last") -> None:
    """Write the curves of ``preset`` (the layout of recorded ones), with ``about`` and every session's losses beside them."""
    sessions = {name: vars(result) for name, result in results.items()}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report.curves(results, preset), "about": about, "sessions": sessions}, indent=1)
    Path(file).write_text(text + "\n", encoding="utf-8")
