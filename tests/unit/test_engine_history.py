"""What a session is thought to know of a prompt, beside lists of tokens compared one by one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.engine.history import LIMIT, History
from vllm_ttt.engine.ledger import Open, Session
from vllm_ttt.types import ChunkReport, SessionKey

pytestmark = pytest.mark.unit

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(tokens, st.integers(0, 11)), max_size=20), tokens)
def test_history_is_the_longest_learned_prefix(requests: list[tuple[list[int], int]], prompt: list[int]) -> None:
    history, plain = History(), {}
    for sent, learned in requests:
        history.add(sent, [len(sent)], learned)
        plain[tuple(sent)] = min(learned, len(sent) - 1)
    known = [learned for sent, learned in plain.items() if len(sent) < len(prompt) and tuple(prompt[: len(sent)]) == sent]
    assert history.known(prompt) == max(known, default=0)
    assert History.from_state(history.to_state()).known(prompt) == max(known, default=0)


def test_what_was_not_learned_in_the_end_is_not_history() -> None:
    history = History()
    prefixes = history.add(range(100), [60, 80, 100], 99)
    assert history.known(range(200)) == 99
    history.settle(prefixes, 64, version=1)
    assert history.known(range(200)) == 64
    assert history.known(range(70)) == 59, "of a shorter prefix no more than it has"


def test_what_was_learned_after_a_version_is_forgotten_with_it() -> None:
    history = History()
    first = history.add(range(100), [100], 99)
    history.settle(first, 99, version=3)
    second = history.add(range(300), [300], 299)
    history.settle(second, 299, version=7)
    history = History.from_state(json.loads(json.dumps(history.to_state())))
    unsettled = history.add(range(900), [900], 899)
    history.back_to(5)
    assert history.known(range(1000)) == 99
    history.settle(unsettled, 899, version=5)
    assert history.known(range(1000)) == 99, "it was given up with the rest"
    history.back_to(2)
    assert history.known(range(1000)) == 0


def test_it_is_bounded_and_keeps_what_was_met_last() -> None:
    history = History()
    history.add(range(50), [50], 49)
    for i in range(LIMIT + 20):
        history.add([1000 + i, 1], [2], 1)
        assert history.known(range(60)) == 49, "it was met a moment ago"
    assert len(history.prefixes) == LIMIT
    assert history.known([1000, 1, 2]) == 0


def test_what_is_kept_with_a_version_is_what_it_has_learned() -> None:
    """A save may come while a request is under way: its prompt is history only as far as the saved delta has learned it."""
    session = Session(SessionKey("-", "s"), 7, recent=4)
    session.history.add(range(50), [50], 49)
    session.open["r"] = Open(1, prefixes=session.history.add(range(1000), [1000], 999))
    session.record(ChunkReport(7, "r", 256, 2.0, None, None, 256, 1))
    back = Session(SessionKey("-", "s"), 8, recent=4)
    back.from_state(json.loads(json.dumps(session.to_state())))
    assert back.history.known(range(2000)) == 256
    assert back.history.known(range(60)) == 49
