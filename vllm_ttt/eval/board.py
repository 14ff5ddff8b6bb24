"""What the demo shows while it runs: a table that fills, a cell for each arm of each round, and how far it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_ttt.eval.measures import HARM, Measures
from vllm_ttt.eval.protocols import Result
from vllm_ttt.eval.report import LABELS, characters

#: Heads of columns: two groups of them must fit 80 characters.
HEADS = {"frozen": "frozen", "retrieval": "BM25", "context": "context", "ttt": "session"}


def progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


class Board:
    """Rich draws it again and again; ``saw`` is given each document as it was read.

    Args:
        rounds: rows of the table.
        sessions: how many documents make a cell, which has the mean of those read so far.
        bar: shown below the table.
    """

    def __init__(self, rounds: int, sessions: int, bar: Progress):
        self.rounds, self.sessions, self.bar = rounds, sessions, bar
        self.cells: dict[str, list[Measures]] = defaultdict(list)

    def saw(self, arm: str, measures: Measures) -> None:
        self.cells[arm].append(measures)

    def row_is_whole(self) -> bool:
        """Whether what was seen last was the last of its round."""
        counts = {len(self.cells[arm]) for arm in HEADS}
        return len(counts) == 1 and counts.pop() % self.sessions == 0

    def __rich__(self) -> RenderableType:
        return Group(self.table(), self.bar)

    def table(self) -> Table:
        """The best of a row is marked once all of it is known, and so are those that equal it."""
        title = "loss, nats per token, and characters accepted before a wrong token"
        shown = Table(
            box=box.SIMPLE, padding=(0, 1), collapse_padding=True, title=f"{title}, by document", title_justify="left"
        )
        shown.add_column("", justify="right")
        for what in ("loss", "chars"):
            for head in HEADS.values():
                shown.add_column(f"{what}\n{head}", justify="right")
        for i in range(self.rounds):
            read = [self.cells[arm][i * self.sessions : (i + 1) * self.sessions] for arm in HEADS]
            whole = all(len(row) == self.sessions for row in read)
            last = i + 1 == self.rounds
            shown.add_row(str(i + 1), *_row(read, whole and i > 0), end_section=last)
            if last and whole:
                later = [self.cells[arm][self.sessions :] for arm in HEADS]
                shown.add_row(f"2-{self.rounds}", *_row(later, True))
        return shown


def _row(read: list[list[Measures]], best: bool) -> list[str]:
    losses = _cells([_loss(row) for row in read], ".3f", min if best else None)
    return losses + _cells([characters(row) for row in read], ".2f", max if best else None)


def _loss(row: list[Measures]) -> float | None:
    return fmean(m.nats for m in row) if row else None


def _cells(values: list[float | None], form: str, best: Callable[[Iterable[float]], float] | None) -> list[str]:
    shown = ["" if value is None else f"{value:{form}}" for value in values]
    if best is None or None in values:
        return shown
    winner = f"{best(value for value in values if value is not None):{form}}"
    return [f"[bold green]{text}[/]" if text == winner else text for text in shown]


def later(result: Result) -> dict[str, dict[str, float | None]]:
    """Loss and characters of each arm, of all documents but the first: of all sessions' runs together, as in the table."""
    rows = {arm: [m for row in rows[1:] for m in row] for arm, rows in result.arms.items()}
    return {arm: {"nats": _loss(row), "characters_pooled": characters(row)} for arm, row in rows.items()}


def verdict(result: Result) -> list[str]:
    """Who wins where, in words: by document, from the second on, and by session; and whom it harms."""
    others = range(1, len(result.frozen))
    losses = {arm: [fmean(row) for row in result.nats(arm)] for arm in result.arms}
    accepted = {arm: [characters(row) or 0.0 for row in rows] for arm, rows in result.arms.items()}
    least = [min(losses, key=lambda arm, i=i: losses[arm][i]) for i in others]
    most = [max(accepted, key=lambda arm, i=i: accepted[arm][i]) for i in others]
    best = []
    for s, domain in enumerate(result.domains):
        means = {arm: fmean(rows[i][s].nats for i in others) for arm, rows in result.arms.items()}
        best.append(f"{domain}: {LABELS[min(means, key=lambda arm, means=means: means[arm])]}")
    harmed = []
    for arm in [arm for arm in result.arms if arm != "frozen"]:
        pairs = [(m, b) for i in others for m, b in zip(result.arms[arm][i], result.arms["frozen"][i], strict=True)]
        worse = sum(m.nats > b.nats + HARM for m, b in pairs)
        harmed.append(f"{LABELS[arm]} {worse} of {len(pairs)}")
    return [
        f"least loss, by document: {_count(least)}",
        f"most characters accepted, by document: {_count(most)}",
        f"least loss, by session: {', '.join(best)}",
        f"documents that are worse than under the frozen model: {', '.join(harmed)}",
    ]


def _count(winners: list[str]) -> str:
    return ", ".join(f"{LABELS[arm]} {winners.count(arm)} of {len(winners)}" for arm in dict.fromkeys(winners))
