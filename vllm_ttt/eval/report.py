"""What a run found: curves as JSON, a table, a plot, and the comparison with curves recorded before."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from vllm_ttt.eval.protocols import Result

#: of the reference categorical palette that colour-blind readers can tell apart (Okabe & Ito 2008)
COLOURS = {"frozen": "#7f7f7f", "retrieval": "#E69F00", "ttt": "#0072B2"}
LABELS = {"frozen": "frozen model", "retrieval": "BM25 retrieval", "ttt": "TTT session"}

Curves = dict[str, dict[str, Any]]


def curves(results: dict[str, Result], preset: str = "last") -> Curves:
    """Results as curves of nats per token, in the layout of the recorded ones.

    ``frozen`` holds losses: ``p2``, ``p3``, ``p2_rag`` (retrieval) and ``p2_by_domain``; ``preset`` holds gains over
    the frozen model: ``p2``, ``p3`` and ``p2_by_domain``. One entry per interaction, the mean of all sessions.
    """
    frozen, gains = {}, {}
    for name, result in results.items():
        frozen[name] = [round(fmean(row), 4) for row in result.frozen]
        if result.retrieval:
            frozen[f"{name}_rag"] = [round(fmean(row), 4) for row in result.retrieval]
        gain = [[f - t for f, t in zip(*rows, strict=True)] for rows in zip(result.frozen, result.ttt, strict=False)]
        if gain:
            gains[name] = [round(fmean(row), 4) for row in gain]
        if name == "p2":
            frozen["p2_by_domain"] = _by_domain(result.domains, result.frozen)
            if gain:
                gains["p2_by_domain"] = _by_domain(result.domains, gain)
    return {"frozen": frozen, preset: gains}


def compare(measured: Curves, reference: Curves) -> dict[str, float]:
    """The worst absolute difference, in nats per token, of every curve that both have.

    Where the domains differ, only those that both have are compared, and no mean over domains is.
    """
    worst = {}
    domains = [set(side["frozen"].get("p2_by_domain", ())) for side in (measured, reference)]
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
    arms = [arm for arm in COLOURS if any(getattr(result, arm) for result in results.values())]
    for arm in arms:
        shown.add_column(LABELS[arm], justify="right")
    shown.add_column("TTT/frozen", justify="right")
    for name, result in results.items():
        for i, row in enumerate(result.frozen):
            what = f"interaction {i + 1}" if name == "p2" else f"one document, pass {i + 1}"
            cells = [f"{math.exp(fmean(getattr(result, arm)[i])):.2f}" if getattr(result, arm) else "" for arm in arms]
            change = f"{math.expm1(fmean(result.ttt[i]) - fmean(row)):+.1%}" if result.ttt else ""
            shown.add_row(what, *cells, change, end_section=i + 1 == len(result.frozen))
    return shown


def plot(results: dict[str, Result], file: str | Path, title: str) -> None:
    """Draw perplexity against interaction, one panel per protocol; the format follows the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False, layout="constrained")
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for arm, colour in COLOURS.items():
            rows = getattr(result, arm)
            if not rows:
                continue
            if name == "p2":  # documents differ in difficulty: show each against the frozen model
                ys = [100 * math.exp(fmean(row) - fmean(base)) for row, base in zip(rows, result.frozen, strict=True)]
            else:
                ys = [math.exp(fmean(row)) for row in rows]
            axis.plot(range(1, len(ys) + 1), ys, color=colour, label=LABELS[arm], marker="o" if arm == "ttt" else None)
        axis.set_xticks(range(1, len(result.frozen) + 1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        if name == "p2":
            axis.set(title="Different documents of one domain", xlabel="interaction of the session")
            axis.set_ylabel("perplexity, frozen model = 100")
        else:
            axis.set(title="The same document again", xlabel="pass", ylabel="perplexity per token")
            axis.set_ylim(bottom=0)
    axes[0][0].legend(frameon=False)
    figure.suptitle(title)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _by_domain(domains: list[str], rows: list[list[float]]) -> dict[str, list[float]]:
    return {
        domain: [round(fmean(x for d, x in zip(domains, row, strict=True) if d == domain), 4) for row in rows]
        for domain in dict.fromkeys(domains)
    }
