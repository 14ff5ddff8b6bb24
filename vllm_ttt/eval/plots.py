"""A plot of what a run found: one panel per protocol."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_ttt.eval.measures import estimate
from vllm_ttt.eval.protocols import Result
from vllm_ttt.eval.report import LABELS, characters

#: of the reference categorical palette that colour-blind readers can tell apart (Okabe & Ito 2008)
COLOURS = {
    "frozen": "#7f7f7f",
    "retrieval": "#E69F00",
    "context": "#CC79A7",
    "ngrams": "#009E73",
    "ttt": "#0072B2",
    "ttt_ngrams": "#56B4E9",
}
#: Sessions from which on an interval is drawn: with fewer it hides everything else.
SESSIONS = 5
#: Documents of a long session over which its curve is averaged: they differ too much for a curve of single ones.
WINDOW = 5

TITLES = {"p2": "Different documents of one domain", "p3": "The same document again", "long": "Many documents of one domain"}


def plot(results: dict[str, Result], file: str | Path, title: str) -> None:
    """Draw one panel per protocol; the format follows the file's name.

    p2: perplexity relative to the frozen model's, since documents differ in difficulty; with the session's 95 % interval.
    p3: perplexity. long: gain in nats per token, mean of the last WINDOW documents.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False, layout="constrained")
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        {"p2": _different, "p3": _again, "long": _long}[name](axis, result)
        _frame(axis, TITLES[name])
    axes[0][0].legend(frameon=False)
    _save(figure, file, title)


def plot_rounds(result: Result, file: str | Path, title: str) -> None:
    """Draw what the demo found, by document of a session: loss, loss less the frozen model's, and accepted characters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = range(1, len(result.frozen) + 1)
    for arm, rows in result.arms.items():
        for axis, ys in zip(
            axes,
            (
                [fmean(row) for row in result.nats(arm)],
                [-fmean(row) for row in _gains(result, arm)],
                [characters(row) or 0.0 for row in rows],
            ),
            strict=True,
        ):
            _line(axis, steps, ys, arm)
    labels = "loss, nats per token", "loss, less the frozen model's", "characters"
    titles = "Loss (less is better)", "The difference (less is better)", "Accepted characters (more is better)"
    for axis, label, name in zip(axes, labels, titles, strict=True):
        _frame(axis, name)
        axis.set_xticks(steps)
        axis.set(xlabel="document of the session", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(result.arms), frameon=False)
    _save(figure, file, title)


def _frame(axis: Any, title: str) -> None:
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def _save(figure: Any, file: str | Path, title: str) -> None:
    from matplotlib import pyplot

    figure.suptitle(title)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _gains(result: Result, arm: str) -> list[list[float]]:
    return [[b - x for x, b in zip(*rows, strict=True)] for rows in zip(result.nats(arm), result.frozen, strict=True)]


def _different(axis: Any, result: Result) -> None:
    for arm in result.arms:
        gains = [estimate(row) for row in _gains(result, arm)]
        steps = range(1, len(gains) + 1)
        _line(axis, steps, [100 * math.exp(-g.mean) for g in gains], arm)
        if arm == "ttt" and len(result.domains) >= SESSIONS:
            low, high = ([100 * math.exp(-(getattr(g, end) or 0)) for g in gains] for end in ("high", "low"))
            axis.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
    axis.set_xticks(range(1, len(result.frozen) + 1))
    axis.set(xlabel="interaction of the session", ylabel="perplexity, frozen model = 100")


def _again(axis: Any, result: Result) -> None:
    for arm in result.arms:
        ys = [math.exp(fmean(row)) for row in result.nats(arm)]
        _line(axis, range(1, len(ys) + 1), ys, arm)
    axis.set_xticks(range(1, len(result.frozen) + 1))
    axis.set(xlabel="pass", ylabel="perplexity per token")
    axis.set_ylim(bottom=0)


def _long(axis: Any, result: Result) -> None:
    for arm in result.arms:
        gains = [fmean(row) for row in _gains(result, arm)]
        ys = [fmean(gains[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(gains))]
        _line(axis, range(1, len(ys) + 1), ys, arm)
    axis.set(xlabel="document of the session", ylabel=f"gain, nats per token (mean of {WINDOW})")


def _line(axis: Any, xs: range, ys: list[float], arm: str) -> None:
    marker = "o" if arm == "ttt" and len(xs) <= 12 else None
    axis.plot(xs, ys, color=COLOURS[arm], label=LABELS[arm], marker=marker)
