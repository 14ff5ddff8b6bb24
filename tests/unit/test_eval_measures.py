"""What is measured, on readings made by hand; intervals; and the windows that published figures are measured on."""

from __future__ import annotations

import hashlib
import random
from statistics import fmean

import pytest

from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.measures import Measures, Reading, estimate, gain, measure, summary
from vllm_ttt.eval.report import ends
from vllm_ttt.eval.retrieval import recent
from vllm_ttt.eval.texts import Documents, interactions, long, repeats

pytestmark = pytest.mark.unit

#: Three whole lines, one of them after a blank one, between the end of a line and the beginning of another; by token.
TEXTS = ["end", "\n", "x", " =", " 12", "\n", "yes", "\n", "\n", "no", "\n", "tail"]


def read(wrong: set[int]) -> tuple[list[int], Reading]:
    ids = list(range(100, 101 + len(TEXTS)))
    tops = [0 if i in wrong else ids[i + 1] for i in range(len(TEXTS))]
    return ids, Reading([float(i) for i in range(len(TEXTS))], tops, [0.1] * len(TEXTS), TEXTS)


@pytest.mark.parametrize(
    ("wrong", "right", "exact", "runs", "characters"),
    [
        (set(), 12, 3, 1, 23),
        ({4}, 11, 2, 2, 20),  # a token within a line
        ({7}, 11, 2, 2, 22),  # its newline
        ({0, 1, 8, 11}, 8, 3, 4, 14),  # the line that began unseen, the blank one, and the one that does not end: not counted
        (set(range(12)), 0, 0, 12, 0),
    ],
)
def test_measures_by_hand(wrong: set[int], right: int, exact: int, runs: int, characters: int):
    assert measure(*read(wrong), 12) == Measures(5.5, 12, right, 3, exact, runs, characters)


def test_only_the_last_tokens_are_scored():
    ids, reading = read({0, 1, 2, 3})
    assert measure(ids, reading, 8) == Measures(7.5, 8, 8, 2, 2, 1, 16), "the line that begins before them does not count"


def test_what_a_scorer_does_not_know_is_left_out():
    assert measure([1, 2, 3], Reading([1.0, 2.0]), 2) == Measures(1.5)
    assert measure([1, 2, 3], Reading([1.0, 2.0], [2, 9], [0.5, 0.5]), 2) == Measures(1.5, 2, 1)
    rows = [[Measures(1.0)], [Measures(2.0)]]
    assert set(summary(rows, rows)) == {"nats", "gain", "harmed"}


def test_interval_is_students():
    """Five figures, by the textbook: mean 3, standard error 0.7071, t(4) = 2.776."""
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - 1.963, 3 + 1.963), abs=0.001)
    assert found.margin == pytest.approx(1.963, abs=0.001)
    assert estimate([2.0]).low is estimate([2.0]).margin is None


@pytest.mark.parametrize("count", [2, 3, 10, 31, 40])
def test_interval_holds_the_mean_95_times_in_100(count: int):
    draw = random.Random(count)
    held = 0
    for _ in range(2000):
        found = estimate([draw.gauss(0.3, 1) for _ in range(count)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_summary_is_over_requests_and_then_over_sessions():
    """The first request does not count; gains are session by session, and so are their intervals."""
    base = [
        [Measures(2.0, 10, 5, 4, 1, 2, 10)] * 2,
        [Measures(2.0, 10, 5, 4, 1, 2, 10)] * 2,
        [Measures(3.0, 10, 5, 0, 0, 2, 10)] * 2,
    ]
    rows = [
        [Measures(9.0, 10, 0, 4, 0, 9, 0)] * 2,
        [Measures(1.5, 10, 6, 4, 2, 2, 20), Measures(2.004, 10, 5, 4, 1, 1, 10)],
        [Measures(2.5, 10, 8, 0, 0, 2, 20), Measures(3.006, 10, 5, 0, 0, 2, 10)],
    ]
    found = summary(rows, base)
    assert found["nats"].mean == pytest.approx(fmean([2.0, 2.505]))
    assert found["gain"].mean == pytest.approx(fmean([0.5, -0.005]))
    assert found["gain"].margin == pytest.approx(12.706 * 0.505 / 2)
    assert found["accuracy"].mean == pytest.approx(fmean([0.7, 0.5]))
    assert found["accuracy_gain"].mean == pytest.approx(fmean([0.2, 0.0]))
    assert found["exact_lines"].mean == pytest.approx(fmean([0.5, 0.25]))
    assert found["characters"].mean == pytest.approx(fmean([10, 20 / 3]))
    assert found["harmed"].mean == 0.25, "worse by 0.004 is no harm, worse by 0.006 is"
    assert gain(rows, base, 2, 3).mean == pytest.approx(fmean([0.5, -0.006]))


def test_ends_of_a_long_session():
    assert ends(40) == {"requests 2 to 40": (1, 40), "2 to 11": (1, 11), "31 to 40": (30, 40)}
    assert ends(11) == {"requests 2 to 11": (1, 11), "2 to 11": (1, 11)}


def some_documents() -> Documents:
    """Domains with enough documents, with few, and with hardly any."""
    draw = random.Random(0)
    sizes = {"few": [3000, 900, 1500], "many": [1100 + 13 * i for i in range(30)], "one": [1026]}
    return {name: [[draw.randrange(1000) for _ in range(n)] for n in each] for name, each in sizes.items()}


def fingerprint(windows: list[list[list[int]]]) -> str:
    return hashlib.sha256(repr(windows).encode()).hexdigest()[:16]


def test_windows_are_those_of_the_published_figures():
    """The selection, its seeds and its order, recorded from an implementation of its own."""
    docs = some_documents()
    found = interactions(docs, 1, 10)
    assert found.domains == ["few", "many", "one"]
    assert fingerprint(found.windows) == "65d17797a8dfc5ed"
    docs["one"] *= 2
    assert fingerprint(interactions(docs, 2, 10).windows) == "61139eb943a1e83b"
    assert [windows[0] for windows in repeats(docs, 1, 4).windows] == [w[0] for w in interactions(docs, 1, 1).windows]
    assert fingerprint(repeats(docs, 1, 1).windows) == "8b0999f9304ed8db"


def test_long_never_sends_a_document_again():
    docs = {"many": some_documents()["many"]}
    assert long(docs, 1, 30).windows == interactions(docs, 1, 30).windows
    with pytest.raises(ConfigError, match=r"'many' has 30 different .*--documents 30"):
        long(docs, 1, 31)


def test_last_documents_fill_the_room():
    earlier = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert recent(earlier, 2, 100) == [4, 5, 6, 7, 8, 9]
    assert recent(earlier, 7, 8) == [2, 3, 4, 5, 6, 7, 8, 9], "the oldest is cut at its beginning"
    assert recent(earlier, 2, 0) == recent([], 2, 10) == []
