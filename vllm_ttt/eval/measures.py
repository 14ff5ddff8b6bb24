"""What is measured of a request that a model has read, and what many such measurements say together.

One forward gives all of it: the loss of each token, and whether it is the one that the model holds most likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

#: Nats per token by which a request must be worse than under the frozen model to count as harmed.
HARM = 0.005

#: 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, 1.96 + 2.4 / df is right to 0.003.
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_QUANTILES += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


@dataclass(frozen=True)
class Reading:
    """What a model made of a request: one entry for each token but the first.

    Attributes:
        losses: negative log-likelihood of the token that is there, in nats.
        tops: id of the token that the model holds most likely; None: not known.
        top_losses: its negative log-likelihood.
        texts: the token that is there, as text; None: not known.
    """

    losses: Sequence[float]
    tops: Sequence[int] | None = None
    top_losses: Sequence[float] | None = None
    texts: Sequence[str] | None = None

    def last(self, count: int) -> Reading:
        """Of the last ``count`` tokens alone."""
        cut = [None if values is None else values[-count:] for values in (self.tops, self.top_losses, self.texts)]
        return Reading(self.losses[-count:], *cut)  # pyright: ignore


@dataclass(frozen=True)
class Measures:
    """Of the scored tokens of one request. Counts, so that those of several requests can be added; 0 where nothing is known.

    Attributes:
        nats: mean loss per token.
        tokens, right: how many there are, and of how many the token was the model's first choice.
        lines, exact: whole lines that are not blank, and those of which every token was the first choice.
        runs, characters: runs of tokens that were all the first choice, up to the one that was not, or to the end; and the
            characters in all of them. A token that is wrong right after another one ends a run of no characters.
    """

    nats: float
    tokens: int = 0
    right: int = 0
    lines: int = 0
    exact: int = 0
    runs: int = 0
    characters: int = 0


def measure(ids: Sequence[int], reading: Reading, last: int) -> Measures:
    """Measures of the last ``last`` tokens of the request ``ids``, of which ``reading`` has all or the last ones."""
    scored, nats = reading.last(last), fmean(reading.losses[-last:])
    if scored.tops is None:
        return Measures(nats)
    right = [top == token for top, token in zip(scored.tops, ids[-len(scored.tops) :], strict=True)]
    if scored.texts is None:
        return Measures(nats, len(right), sum(right))
    lines, exact = _lines(scored.texts, right)
    characters = sum(len(text) for text, good in zip(scored.texts, right, strict=True) if good)
    runs = right.count(False) + right[-1]
    return Measures(nats, len(right), sum(right), lines, exact, runs, characters)


def _lines(texts: Sequence[str], right: Sequence[bool]) -> tuple[int, int]:
    """Whole lines that are not blank, and how many are right throughout. A line ends with the token that holds its newline."""
    lines = exact = 0
    begun, blank, good = False, True, True  # what precedes the first newline is the end of a line that began unseen
    for text, token_right in zip(texts, right, strict=True):
        good, blank = good and token_right, blank and not text.strip()
        if "\n" in text:
            lines += begun and not blank
            exact += begun and not blank and good
            begun, blank, good = True, True, True
    return lines, exact


@dataclass(frozen=True)
class Estimate:
    """A mean over sessions, with its 95 % interval; no interval for one session."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def margin(self) -> float | None:
        return None if self.high is None else self.high - self.mean


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval by Student's t. ``values`` has one figure per session: sessions are what is independent."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean)
    freedom = len(values) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.4 / freedom
    margin = quantile * stdev(values) / len(values) ** 0.5
    return Estimate(mean, mean - margin, mean + margin)


def gain(rows: list[list[Measures]], base: list[list[Measures]], first: int = 1, end: int | None = None) -> Estimate:
    """Nats per token by which ``rows[request][session]`` is better than ``base``; requests ``first`` (from 0) up to ``end``."""
    pairs = zip(_sessions(rows, first, end), _sessions(base, first, end), strict=True)
    return estimate([fmean(b.nats - m.nats for m, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs])


#: measure: the counts of which it is a ratio
RATIOS = {"accuracy": ("right", "tokens"), "exact_lines": ("exact", "lines"), "characters": ("characters", "runs")}


def summary(rows: list[list[Measures]], base: list[list[Measures]]) -> dict[str, Estimate]:
    """What is said of an arm: means over the requests of each session but its first, and over sessions.

    ``*_gain`` is the difference to ``base``, the frozen model, session by session. What is not known is left out.
    """
    mine, theirs = _sessions(rows, 1), _sessions(base, 1)
    found = {"nats": estimate([fmean(m.nats for m in session) for session in mine]), "gain": gain(rows, base)}
    for name, (part, whole) in RATIOS.items():
        shares = [(_ratio(m, part, whole), _ratio(b, part, whole)) for m, b in zip(mine, theirs, strict=True)]
        known = [(m, b) for m, b in shares if m is not None and b is not None]
        if known:
            found[name] = estimate([m for m, _ in known])
            found[f"{name}_gain"] = estimate([m - b for m, b in known])
    harmed = [
        fmean(m.nats > b.nats + HARM for m, b in zip(session, frozen, strict=True))
        for session, frozen in zip(mine, theirs, strict=True)
    ]
    return found | {"harmed": estimate(harmed)}


def _sessions(rows: list[list[Measures]], first: int, end: int | None = None) -> list[list[Measures]]:
    return [list(session) for session in zip(*rows[first:end], strict=True)]


def _ratio(requests: list[Measures], part: str, whole: str) -> float | None:
    total = sum(getattr(m, whole) for m in requests)
    return sum(getattr(m, part) for m in requests) / total if total else None
