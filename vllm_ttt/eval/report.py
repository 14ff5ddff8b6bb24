"""What a run found: curves as JSON, tables, and the comparison with curves recorded before. (plots.py draws it.)"""

from __future__ import annotations

import math
from dataclasses import asdict
from statistics import fmean
from typing import Any

from rich.table import Table

from vllm_ttt.eval.measures import Estimate, Measures, gain, summary
from vllm_ttt.eval.protocols import Result

LABELS = {
    "frozen": "frozen model",
    "retrieval": "BM25 retrieval",
    "context": "last documents",
    "ngrams": "n-grams",
    "ttt": "TTT session",
    "ttt_ngrams": "TTT + n-grams",
}
#: what a request of a protocol is called
STEPS = {"p2": "interaction", "p3": "one document, pass", "long": "document"}
#: Requests at either end of a long session that are looked at by themselves.
ENDS = 10

Curves = dict[str, dict[str, Any]]


def curves(results: dict[str, Result], preset: str = "last") -> Curves:
    """Results as curves of nats per token, in the layout of the recorded ones.

    ``frozen`` holds losses without learning: ``p2``, ``p2_rag`` (retrieval), ``p2_context``, ``p2_ngrams``, ``p2_by_domain``;
    ``preset`` holds gains over the frozen model: ``p2``, ``p2_ngrams``, ``p2_by_domain``, ``p2_ngrams_by_domain``. The same for
    other protocols. One entry per interaction, the mean of all sessions.
    """
    frozen, gains = {}, {}
    for name, result in results.items():
        for arm, suffix in (("frozen", ""), ("retrieval", "_rag"), ("context", "_context"), ("ngrams", "_ngrams")):
            if rows := result.nats(arm):
                frozen[name + suffix] = [round(fmean(row), 4) for row in rows]
        frozen[f"{name}_by_domain"] = _by_domain(result.domains, result.frozen)
        for arm, suffix in (("ttt", ""), ("ttt_ngrams", "_ngrams")):
            if rows := result.nats(arm):
                gained = [[f - t for f, t in zip(*pair, strict=True)] for pair in zip(result.frozen, rows, strict=True)]
                gains[name + suffix] = [round(fmean(row), 4) for row in gained]
                gains[f"{name}{suffix}_by_domain"] = _by_domain(result.domains, gained)
    return {"frozen": frozen, preset: gains}


def ends(count: int) -> dict[str, tuple[int, int]]:
    """(first, end) of the requests of a long session that are looked at together, counted from 0, by what they are called."""
    first, last = min(count, 1 + ENDS), max(1, count - ENDS)
    return {f"requests 2 to {count}": (1, count), f"2 to {first}": (1, first), f"{last + 1} to {count}": (last, count)}


def summaries(results: dict[str, Result]) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """``[protocol][arm][measure]`` = {mean, low, high}; of `long` also the gain of its first and last requests."""
    found = {}
    for name, result in results.items():
        base = result.arms["frozen"]
        found[name] = {arm: summary(rows, base) for arm, rows in result.arms.items()}
        if name == "long":
            for arm, rows in result.arms.items():
                found[name][arm] |= {f"gain, {what}": gain(rows, base, *span) for what, span in ends(len(rows)).items()}
    return {n: {arm: {what: asdict(e) for what, e in s.items()} for arm, s in arms.items()} for n, arms in found.items()}


def characters(row: list[Measures]) -> float | None:
    """Characters accepted before the first wrong token, in all requests of ``row``; None: not known."""
    runs = sum(m.runs for m in row)
    return sum(m.characters for m in row) / runs if runs else None


def compare(measured: Curves, reference: Curves) -> dict[str, float]:
    """The worst absolute difference, in nats per token, of every curve that both have.

    Where the domains differ, only those that both have are compared, and no mean over domains is.
    """
    worst = {}
    known = next((n for n in measured["frozen"] if n.endswith("_by_domain") and n in reference["frozen"]), "")
    domains = [set(side["frozen"].get(known, ())) for side in (measured, reference)]
    for kind, name in [(k, n) for k, names in measured.items() for n in names if n in reference.get(k, {})]:
        ours, theirs = measured[kind][name], reference[kind][name]
        if not isinstance(ours, dict) and domains[0] and domains[0] != domains[1]:
            continue
        pairs = [(ours[d], theirs[d]) for d in ours if d in theirs] if isinstance(ours, dict) else [(ours, theirs)]
        differences = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=False)]
        if differences:
            worst[f"{kind}/{name}"] = round(max(differences), 4)
    return worst


def table(results: dict[str, Result]) -> Table:
    """One table of perplexities for people, a section per protocol."""
    shown = Table(title="Perplexity per token (lower is better)", title_justify="left")
    shown.add_column("", no_wrap=True)
    arms = [arm for arm in LABELS if any(arm in result.arms for result in results.values())]
    for arm in arms:
        shown.add_column(LABELS[arm], justify="right")
    shown.add_column("TTT/frozen", justify="right")
    for name, result in results.items():
        for i, row in enumerate(result.frozen):
            cells = [f"{math.exp(fmean(result.nats(arm)[i])):.2f}" if arm in result.arms else "" for arm in arms]
            change = f"{math.expm1(fmean(result.ttt[i]) - fmean(row)):+.1%}" if result.ttt else ""
            shown.add_row(f"{STEPS[name]} {i + 1}", *cells, change, end_section=i + 1 == len(result.frozen))
    return shown


def measures(name: str, result: Result) -> Table:
    """What one protocol says of each arm, for people: each measure, and the difference to the frozen model's."""
    count, sessions = len(result.frozen), len(result.domains)
    title = f"{name}: requests 2 to {count} of {sessions} session{'s' * (sessions > 1)}"
    if sessions > 1:
        title += "; ±: 95 % over sessions"
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    spans = ends(count) if name == "long" else {"gain, nats": (1, count)}
    for what in ("nats/token", *spans, "top-1", "whole lines", "characters", "harmed"):
        shown.add_column(what, justify="right")
    base = result.arms["frozen"]
    for arm, rows in result.arms.items():
        found = summary(rows, base)
        other = arm != "frozen"
        gains = [_gained(gain(rows, base, *span), ".3f") if other else "" for span in spans.values()]
        shares = [_beside(found, what, form, other) if what in found else "" for what, form in COLUMNS.items()]
        harmed = f"{found['harmed'].mean:.0%}" if other else ""
        shown.add_row(LABELS[arm], f"{found['nats'].mean:.3f}", *gains, *shares, harmed)
    return shown


#: measure: how it is written
COLUMNS = {"accuracy": ".1%", "exact_lines": ".1%", "characters": ".1f"}


def _beside(found: dict[str, Estimate], what: str, form: str, other: bool) -> str:
    """A measure, and by how much it is more than the frozen model's."""
    gained = f" ({_gained(found[f'{what}_gain'], form)})" if other else ""
    return f"{found[what].mean:{form}}{gained}"


def _gained(value: Estimate, form: str) -> str:
    return f"{value.mean:+{form}}" + ("" if value.margin is None else f" ±{value.margin:{form}}")


def _by_domain(domains: list[str], rows: list[list[float]]) -> dict[str, list[float]]:
    return {
        domain: [round(fmean(x for d, x in zip(domains, row, strict=True) if d == domain), 4) for row in rows]
        for domain in dict.fromkeys(domains)
    }
