"""The load tests' own arithmetic: books, shapes, statistics, slopes, hosts, and the report's table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from load.books import Book, Rule
from load.hosts import check_host
from load.logs import unexpected
from load.memory import slope
from load.report import table
from load.shapes import SHAPES, users
from load.statistics import Statistics, spread

pytestmark = pytest.mark.unit

RULE = Rule(chunk=256, min_chunk=8)
ROOT = Path(__file__).parents[2]


def session(version: int, seen: int, skipped: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    skipped = skipped or {}
    learned = seen - sum(skipped.values())
    return {
        "version": version,
        "tokens_seen": seen,
        "tokens_learned": learned,
        "tokens_skipped": skipped,
        "losses": [],
        "requests_open": 0,
        "tokens_pending": 0,
        "frozen": False,
        **more,
    }


def answer(version: int, learned: int) -> dict[str, Any]:
    return {"session_id": "s", "version": version, "tokens_learned": learned}


@pytest.mark.parametrize(
    ("pairs", "accepted", "chunks"),
    [(0, 0, 0), (7, 0, 0), (8, 8, 1), (255, 255, 1), (256, 256, 1), (263, 256, 1), (264, 264, 2), (1024, 1024, 4)],
)
def test_the_rule(pairs: int, accepted: int, chunks: int) -> None:
    assert RULE.accepted(pairs) == accepted
    assert RULE.chunks(pairs) == chunks


def test_a_session_that_agrees_and_each_way_not_to() -> None:
    book = Book("s", RULE)
    book.answered(list(range(601)), 601, answer(0, 600))
    book.answered(list(range(1, 302)), 301, answer(3, 300))
    assert book.check(session(5, 900)) == []
    assert book.check(session(4, 900)) == ["s: version 4 and 0 chunks skipped; the client counted 5"]
    assert book.check(session(6, 900))
    assert book.check(session(5, 899)), "tokens_seen"
    assert book.check({**session(5, 900), "tokens_learned": 899}), "one is neither learned nor skipped"
    loss = {"skipped": "loss"}
    assert book.check(session(4, 900, {"loss": 256}, losses=[loss])) == []
    assert book.check(session(5, 900, {"loss": 256}, losses=[loss]))
    assert book.check(session(5, 900, {"loss": 256})), "tokens were skipped, and no chunk was"


@pytest.mark.parametrize(
    "wrong", [None, {"session_id": "t", "version": 0, "tokens_learned": 600}, answer(1, 600), answer(0, 599)]
)
def test_answers_that_do_not_agree(wrong: Any) -> None:
    book = Book("s", RULE)
    book.answered(list(range(601)), 601, wrong)
    assert book.check(session(3, 600))


def test_when_a_session_has_settled() -> None:
    book, done = Book("s", RULE), session(2, 512)
    assert book.settled(done, None)
    assert not book.settled({**done, "tokens_learned": 256}, None), "its last chunk has not been reported"
    assert not book.settled({**done, "tokens_pending": 256}, done)
    assert not book.settled({**done, "requests_open": 1}, done)
    book.left(100)
    assert not book.settled(done, None)
    assert not book.settled(done, {**done, "version": 1})
    assert book.settled(done, {**done, "tier": "slot"})


def test_an_answer_that_did_not_wait() -> None:
    book = Book("s", RULE)
    book.answered(list(range(257)), 257, answer(0, 256))
    book.answered(list(range(1, 258)), 257, answer(0, 256))
    assert book.check(session(2, 512)) == ["s: 1 answers did not wait for what had been sent before"]
    assert book.check(session(1, 512, {"loss": 256}, losses=[{"skipped": "loss"}])) == []


def test_what_repeats_itself_is_not_counted() -> None:
    book = Book("s", RULE)
    book.answered(list(range(1025)), 1025, answer(0, 768))
    assert book.check(session(3, 1024, {"repetition": 256})) == []
    assert book.check(session(3, 1024, {"short": 256}))
    assert book.check(session(4, 1024, {"repetition": 256}))


def test_after_a_rollback_only_the_most_is_known() -> None:
    book = Book("s", RULE)
    book.answered(list(range(1025)), 1025, answer(0, 1024))
    reason = {"frozen": True, "frozen_reason": "at version 4 its delta ...; it is back at version 2"}
    assert book.check(session(2, 1024, **reason)) == []
    assert book.check(session(5, 1024, **reason))


def test_what_went_before_is_history() -> None:
    book = Book("s", RULE)
    first = list(range(100))
    book.answered(first, 100, answer(0, 99))
    book.answered([*first, *range(200)], 300, answer(1, 200))
    assert book.check(session(2, 99 + 299, {"history": 99})) == []
    book.answered(first, 100, answer(2, 99))
    assert book.problems == [], "the same again is learned again"


def test_a_rest_that_was_too_short_is_learned_with_the_next_turn() -> None:
    book = Book("s", RULE)
    book.answered(list(range(261)), 261, answer(0, 256))
    book.answered(list(range(300)), 300, answer(1, 43))
    assert book.problems == []
    assert book.chunks == 2


def test_what_was_given_up_is_bounded() -> None:
    book = Book("s", RULE)
    book.answered(list(range(257)), 257, answer(0, 256))
    book.left(513)
    for version in (1, 2, 3):
        assert book.check(session(version, 768, {"short": 256 * (3 - version)})) == []
    assert book.check(session(4, 768))
    assert book.check(session(0, 768))


def test_a_session_that_learns_nothing_stays_at_0() -> None:
    book = Book("s", RULE, learn=False)
    book.answered(list(range(601)), 601, answer(0, 0))
    assert book.check(session(0, 0)) == []
    assert book.check(session(1, 0))


def test_requests_that_the_server_would_not_learn() -> None:
    book = Book("s", RULE)
    book.answered(list(range(257)), 257, answer(0, 0))
    assert book.check(session(0, 256, {"frozen": 256})) == []
    assert book.check(session(0, 256, {"short": 256})), "the session does not say that it refused any"


@given(st.sampled_from(SHAPES), st.integers(1, 100), st.floats(0, 1))
def test_shapes(shape: str, peak: int, at: float) -> None:
    assert 1 <= users(shape, peak, at) <= peak
    assert max(users(shape, peak, i / 100) for i in range(101)) == peak


def test_statistics() -> None:
    assert spread([5.0]) == {"count": 1, "mean": 5.0, "p50": 5.0, "p95": 5.0, "p99": 5.0}
    assert spread([float(i) for i in range(101)]) == {"count": 101, "mean": 50.0, "p50": 50.0, "p95": 95.0, "p99": 99.0}
    statistics = Statistics()
    statistics.note("answer", "base", 12.0)
    statistics.note("answer", "base", 1.0, exception=RuntimeError("500"))
    figures = statistics.figures(seconds=2.0)
    assert figures["errors"] == {"answer base: 500": 1}
    assert figures["rows"][0]["count"] == 1, "what failed is not among the times"


def test_slope() -> None:
    rising = slope([(t, 100.0 + (50 if t < 40 else 50 + t / 60)) for t in map(float, range(100))])
    assert rising["per_minute"] == pytest.approx(1.0)
    assert slope([(float(t), 200.0) for t in range(100)])["per_minute"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "http://localhost:1", "http://[::1]:5"])
def test_this_machine(url: str) -> None:
    check_host(url, allow=False)


@pytest.mark.parametrize(
    "url", ["http://example.org", "http://127.0.0.1.example.org", "http://10.0.0.1:80", "http://0.0.0.0:80"]
)
def test_other_machines_are_not_loaded_by_mistake(url: str) -> None:
    with pytest.raises(ValueError, match="--allow-host"):
        check_host(url, allow=False)
    check_host(url, allow=True)


@pytest.mark.parametrize(
    "script", [["run_load.py", "--base-url"], ["-m", "locust", "--headless", "-f", "locustfile.py", "--host"]]
)
def test_the_programs_refuse_other_hosts(script: list[str]) -> None:
    command = [sys.executable, *script, "http://example.org"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "loadtests", timeout=60)
    assert done.returncode != 0
    assert "needs --allow-host" in done.stderr


def test_the_table_has_the_arms_side_by_side() -> None:
    row = {"what": "TTFT", "kind": "base", **spread([1.0, 2.0]), "per_s": 1.0}
    audit = {
        "exact": 2,
        "bounded": 1,
        "rolled_back": 0,
        "owned": 5,
        "versions": 9,
        "tokens": 20,
        "skipped": {"history": 5},
        "problems": [],
    }
    rising = slope([(float(t), float(t)) for t in range(9)])
    arm = {
        "seconds": 2.0,
        "rows": [row],
        "errors": {"x": 3},
        "audit": audit,
        "memory": {"VLLM::Worker": rising},
    }
    asked = [{**row, "what": "asked", "kind": kind} for kind in ("hostile: bad id", "hostile: oversized", "owner: fork")]
    other = {**arm, "rows": [{**row, "kind": "chat"}, *asked], "memory": {}}
    text = table({"arms": {"alone": other, "learning": arm}})
    assert "| TTFT | chat | 2, 2, 2 (2) |  |" in text
    assert "| TTFT | base |  | 2, 2, 2 (2) |" in text
    assert "| refusals that were provoked | 4 | 0 |" in text
    assert "| calls of owners | 2 | 0 |" in text, "they are no refusals"
    assert "| errors that were not | 3 | 3 |" in text
    assert "| learning | VLLM::Worker | 4 | 8 | 8 | +60.00 |" in text


def test_what_a_log_must_not_say() -> None:
    refusal = "(APIServer pid=1) ERROR 11-24 15:29:23 [validation.py:151] Traceback (most recent call last):"
    fine = ["INFO: 127.0.0.1 - POST /v1/completions 200 OK", refusal]
    bad = [
        "(EngineCore pid=1) ERROR [core.py:12] Traceback (most recent call last):",
        'INFO: "POST /x" 500 Internal Server Error',
    ]
    bad += ["ERROR vllm-ttt: _take failed (error 1)"]
    assert unexpected("\n".join([*fine, *bad])) == bad


#: An owner at version 5, who asks to go back to version 3 and is refused; argv[1]: what the session has afterwards.
REFUSED_OWNER = """
import json, random, sys
from types import SimpleNamespace
from load.owners import OwnerUser
after = {"tokens_learned": 9, "tokens_seen": 9, "tokens_skipped": {}, "tokens_pending": 0, "requests_open": 0}
owner = OwnerUser.__new__(OwnerUser)
owner.name, owner.rng, owner.state = "s", random.Random(0), {"version": 5, "versions": [3]}
refusal = {"error": {"message": "no version 3"}}
owner.client = SimpleNamespace(ask=lambda kind, method, path, expected, **_: refusal if 409 in expected else None)
owner.world = SimpleNamespace(get=lambda path: {**after, **json.loads(sys.argv[1])}, problems=[])
owner.roll_back()
print(len(owner.world.problems), owner.state["version"])
"""


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"version": 5, "versions": [4, 5]}, "0 5"),  # a save has taken its place
        ({"version": 5, "versions": [3, 5]}, "1 5"),  # it is there all the same
        ({"version": 3, "versions": [3]}, "1 3"),  # it was done all the same
    ],
)
def test_an_owner_whose_version_is_gone(after: dict[str, Any], said: str) -> None:
    """In a process of its own: locust changes the standard library's sockets for everybody."""
    command = [sys.executable, "-c", REFUSED_OWNER, json.dumps(after)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "loadtests", timeout=60)
    assert done.stdout.strip() == said
