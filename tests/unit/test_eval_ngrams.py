"""The session's n-grams: what the definition says, computed slowly, and that nothing is known before it was scored."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.eval.measures import Reading
from vllm_ttt.eval.ngrams import PRIOR_TOKENS, Mixture, NGrams, mix

pytestmark = pytest.mark.unit

#: Few tokens, so that contexts come back.
requests = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=30), min_size=1, max_size=4)
ORDER, VOCABULARY = 3, 6
#: So much for the n-grams that they often decide.
SHARES = (0.1, 0.2, 0.4, 0.6)


def followers(sent: list[list[int]], context: list[int]) -> Counter[int]:
    """What has followed ``context`` in ``sent``, where a request's first token follows nothing."""
    n = len(context)
    return Counter(ids[t] for ids in sent for t in range(max(n, 1), len(ids)) if ids[t - n : t] == context)


def slow_probability(sent: list[list[int]], past: list[int], token: int) -> tuple[float, int]:
    """PPM-C by its definition, from the text itself: probability, and length of the longest context that anything followed."""
    p, longest = 1 / VOCABULARY, 0
    for n in range(min(ORDER, len(past)) + 1):
        seen = followers([*sent, past], past[len(past) - n :])
        if not seen:
            break
        p = (seen[token] + len(seen) * p) / (seen.total() + len(seen))
        longest = n
    return p, longest


Slow = tuple[list[float], list[list[float]]]


def slow_mix(sent: list[list[int]], readings: list[Reading], prior: tuple[float, ...]) -> list[Slow]:
    """Of each request: the loss of each token, and how much speaks for each token that could be the first choice."""
    experience = [(PRIOR_TOKENS * (1 - share), PRIOR_TOKENS * share) for share in prior]
    found = list[Slow]()
    for i, (ids, reading) in enumerate(zip(sent, readings, strict=True)):
        losses, choices, spoke = [], [], defaultdict[tuple[int, str], float](float)
        for t in range(1, len(ids)):
            p, n = slow_probability(sent[:i], ids[:t], ids[t])
            model, ngrams = experience[n]
            parts = model / (model + ngrams) * math.exp(-reading.losses[t - 1]), ngrams / (model + ngrams) * p
            losses.append(-math.log(sum(parts)))
            for_it = [ngrams / (model + ngrams) * slow_probability(sent[:i], ids[:t], v)[0] for v in range(VOCABULARY)]
            assert reading.tops is not None
            assert reading.top_losses is not None
            for_it[reading.tops[t - 1]] += model / (model + ngrams) * math.exp(-reading.top_losses[t - 1])
            choices.append(for_it)
            spoke[n, "model"] += parts[0] / sum(parts)
            spoke[n, "ngrams"] += parts[1] / sum(parts)
        experience = [(m + spoke[n, "model"], g + spoke[n, "ngrams"]) for n, (m, g) in enumerate(experience)]
        found.append((losses, choices))
    return found


def some_reading(ids: list[int], seed: int = 0) -> Reading:
    """Of a model whose first choice is the token before, as likely as the token there or more."""
    losses = [0.3 + (7 * t + seed) % 11 / 2 for t in range(1, len(ids))]
    tops = [ids[t] if losses[t - 1] < 0.6 else ids[t - 1] for t in range(1, len(ids))]
    return Reading(losses, tops, [min(loss, 0.9 + (3 * t + seed) % 5) for t, loss in enumerate(losses)])


@given(requests)
def test_mixture_is_the_definition(sent: list[list[int]]):
    readings = [some_reading(ids, i) for i, ids in enumerate(sent)]
    mixture = Mixture(ORDER, VOCABULARY, SHARES)
    found = [mixture.read(ids, reading) for ids, reading in zip(sent, readings, strict=True)]
    for mixed, (losses, choices) in zip(found, slow_mix(sent, readings, SHARES), strict=True):
        assert mixed.losses == pytest.approx(losses, rel=1e-9)
        assert mixed.tops is not None
        for top, for_it in zip(mixed.tops, choices, strict=True):
            assert for_it[top] == pytest.approx(max(for_it), rel=1e-9)


@given(requests)
def test_probabilities_are_a_distribution_and_the_best_is_the_best(sent: list[list[int]]):
    ngrams = NGrams(ORDER, VOCABULARY)
    for ids in map(tuple, sent):
        for t in range(1, len(ids)):
            contexts = ngrams.contexts(ids, t)
            each = [ngrams.probability(contexts, token) for token in range(VOCABULARY)]
            assert sum(each) == pytest.approx(1)
            best = ngrams.best(contexts, 0.0)
            if contexts:
                assert best is not None
                assert best.probability == max(each) == each[best.token]
                assert ngrams.best(contexts, best.probability) is None
                for least in each:
                    assert least == max(each) or ngrams.best(contexts, least) == best
            ngrams.learn(ids, t)


@given(requests, st.data())
def test_no_token_is_known_before_it_was_scored(sent: list[list[int]], data: st.DataObject):
    """Another future leaves every loss and every choice before it as it was: counts and weights are of the past alone."""
    i = data.draw(st.integers(0, len(sent) - 1))
    t = data.draw(st.integers(1, len(sent[i]) - 1))
    other = [
        *sent[:i],
        sent[i][:t] + data.draw(st.lists(st.integers(0, 4), min_size=len(sent[i]) - t, max_size=len(sent[i]) - t)),
    ]
    readings = [Reading([1.0] * (len(ids) - 1), [0] * (len(ids) - 1), [0.5] * (len(ids) - 1)) for ids in sent]
    one, two = mix(sent, readings), mix(other, readings[: i + 1])
    for k in range(i + 1):
        end = t - 1 if k == i else None
        assert one[k].losses[:end] == two[k].losses[:end]
        assert (one[k].tops or [])[: t if k == i else None] == (two[k].tops or [])[: t if k == i else None]


def test_weights_follow_experience():
    """Where the n-grams are right and the model is not, they are believed more with each request, but not within one."""
    ids, reading = [1, 2, 3, 4] * 8, Reading([5.0] * 31)
    one, two, three = mix([ids] * 3, [reading] * 3)
    assert sum(one.losses) > sum(two.losses) > sum(three.losses)
    assert one.losses[-1] > 1.0, "the prior alone does not trust them much"
    assert max(two.losses[6:]) < 0.7
    assert max(three.losses[6:]) < 0.5
    assert two.losses[6:] == pytest.approx([two.losses[6]] * 25, abs=0.01), "weights do not move within a request"


def test_n_grams_that_are_wrong_cost_little():
    """Text in which nothing comes back: the mixture is the model's."""
    ids = list(range(1000))
    (mixed,) = mix([ids], [Reading([1.0] * 999)])
    assert sum(mixed.losses) / 999 == pytest.approx(1.0, abs=0.001)


def test_first_choice_is_that_of_both_together():
    """The model prefers 9, weakly; the session has shown what follows 1 2 3."""
    ids = [1, 2, 3, 4] * 8
    unsure = Reading([3.0] * 31, [9] * 31, [2.0] * 31)
    sure = Reading([3.0] * 31, [9] * 31, [0.01] * 31)
    _, after = mix([ids, ids], [unsure, unsure])
    assert after.tops is not None
    assert list(after.tops[6:]) == ids[7:]
    _, after = mix([ids, ids], [sure, sure])
    assert after.tops is not None
    assert after.tops[0] == 9
