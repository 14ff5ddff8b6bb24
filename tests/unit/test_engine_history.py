"""What a session is thought to know of a prompt, beside lists of tokens compared one by one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.engine.ledger import Open, Session
from vllm_ttt.engine.prefix.history import LIMIT, PLACES, History
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


def learned_whole(history: History, prompt: list[int], version: int = 1) -> None:
    """The prompt is planned and learned, as the scheduler does it."""
    prefixes = history.add_prompt(prompt, history.known(prompt), len(prompt) - 1)
    history.settle(prefixes, len(prompt) - 1, version)


def test_a_template_that_takes_the_end_of_a_prompt_away() -> None:
    """Qwen3 with enable_thinking false: an empty thinking block ends each prompt, and is gone in the next turn."""
    think, history, chat = [901, 902, 903, 904], History(), list(range(300))
    for turn in range(12):
        prompt = [*chat, *think]
        known = history.known(prompt)
        assert known == (len(chat) - 161 if turn else 0), "all but the answer and the next question"
        learned_whole(history, prompt)
        chat += range(1000 * (turn + 1), 1000 * (turn + 1) + 160)
    history = History.from_state(json.loads(json.dumps(history.to_state())), 12)
    assert history.known([*chat, *think]) == len(chat) - 161


@given(st.integers(1, 600), st.integers(601, 3000))
def test_what_is_learned_again_is_about_what_has_changed(changed: int, length: int) -> None:
    prompt, history = list(range(length)), History()
    learned_whole(history, prompt)
    following = [*prompt[: length - changed], *range(5000, 5000 + changed + 50)]
    shared = length - changed - 1
    assert shared - max(changed, 4) <= history.known(following) <= shared


@pytest.mark.parametrize("turns", [1, 3])
def test_the_same_prompt_again_is_learned_again_wherever_it_is_known(turns: int) -> None:
    history, prompt = History(), list[int]()
    for turn in range(turns):
        prompt = [*prompt, *range(1000 * turn, 1000 * turn + 200)]
        learned_whole(history, prompt)
    assert history.known(prompt) == max(0, len(prompt) - 201), "what its last turn went on from"
    assert history.known([*prompt[:-3], 7, 7, 7]) == max(0, len(prompt) - 201), "another prompt of that length does not go on"
    assert history.known(prompt[:-20]) == max(0, len(prompt) - 201)
    assert history.known([*prompt, 7]) == len(prompt) - 1


def test_a_prompt_that_was_given_up_is_learned_once() -> None:
    history, prompt = History(), list(range(200))
    prefixes = history.add_prompt(prompt, 0, 199)
    history.settle(prefixes, 128, 1)
    history.give_up(prefixes)
    history = History.from_state(json.loads(json.dumps(history.to_state())), 1)
    assert history.known(prompt) == 128, "what had been learned of it"
    learned_whole(history, prompt)
    assert history.known(prompt) == 0, "it has been answered: sent again, it is sent on purpose"


@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 6, 8])
def test_an_answer_without_its_end(hidden: int) -> None:
    history, prompt, answer = History(), list(range(100)), list(range(500, 530))
    history.add_prompt(prompt, 0, 99)
    history.add_answer([*prompt, *answer], 100)
    assert history.known([*prompt, *answer[:-hidden], *range(900, 960)]) == 129 - hidden


def test_places_are_bounded() -> None:
    history = History()
    for turn in range(300):
        learned_whole(history, [turn, *range(9000)], turn)
    assert (len(history.prefixes), len(history.places)) == (LIMIT, PLACES)
    assert len(json.dumps(history.to_state())) < 25_000


def test_what_an_earlier_release_kept() -> None:
    history = History.from_state([("ab" * 16, 50, 49, 3)], 3)
    assert history.to_state() == [("ab" * 16, 50, 49, 3, 0, False)]
