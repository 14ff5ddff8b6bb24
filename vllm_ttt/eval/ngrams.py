"""The baseline that learns nothing but what followed what: the session's own n-grams, mixed with a model's probabilities.

A token's probability is (1 - w) m + w c: m is the model's, c that of PPM-C (Moffat 1990) over the session's earlier requests
and the request so far. w depends on how long a context was found, and is learned by expectation-maximisation over earlier
requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from vllm_ttt.eval.measures import Reading

#: Tokens of the longest context.
ORDER = 6
#: Tokens of which the n-grams know nothing but that they exist. Few tokenizers have more. To a model of 49,152 the true number
#: would give 0.001 nats per token at most (ten domains, ten requests in each).
VOCABULARY = 2**18
#: Share of the n-grams before anything was seen, by length of the context that was found; worth so many tokens of experience.
PRIOR = (0.0005, 0.001, 0.005, 0.02, 0.08, 0.15, 0.25)
PRIOR_TOKENS = 40


class Context:
    """What followed one sequence of tokens: ``counts`` by token, their sum, and the largest of them."""

    __slots__ = ("counts", "most", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total = self.most = 0

    def add(self, token: int) -> None:
        count = self.counts[token] = self.counts.get(token, 0) + 1
        self.total += 1
        self.most = max(self.most, count)


class Choice(NamedTuple):
    token: int
    probability: float


class NGrams:
    """PPM-C over what one session sent; contexts of 0 to ``order`` tokens, which lie within one request."""

    def __init__(self, order: int = ORDER, vocabulary: int = VOCABULARY):
        self.vocabulary = vocabulary
        self.tables: list[dict[tuple[int, ...], Context]] = [{} for _ in range(order + 1)]

    def contexts(self, ids: tuple[int, ...], t: int) -> list[Context]:
        """What has followed the last 0, 1, ... tokens before position ``t``, as long as anything has."""
        found = []
        for length, table in enumerate(self.tables[: t + 1]):
            context = table.get(ids[t - length : t])
            if context is None:
                break
            found.append(context)
        return found

    def learn(self, ids: tuple[int, ...], t: int) -> None:
        """``ids[t]`` has followed what is before it."""
        for length, table in enumerate(self.tables[: t + 1]):
            key = ids[t - length : t]
            context = table.get(key)
            if context is None:
                context = table[key] = Context()
            context.add(ids[t])

    def probability(self, contexts: list[Context], token: int) -> float:
        """Of ``token`` after ``contexts``: each order leaves a share to the next lower one, for what it has not seen itself; it
        grows with the number of different tokens that it has.
        """
        p = 1 / self.vocabulary
        for context in contexts:
            kinds = len(context.counts)
            p = (context.counts.get(token, 0) + kinds * p) / (context.total + kinds)
        return p

    def best(self, contexts: list[Context], least: float) -> Choice | None:
        """The most likely token, if it is more likely than ``least``."""
        bounds = [1 / self.vocabulary]  # no token is more likely than this, by the orders below
        for context in contexts:
            kinds = len(context.counts)
            bounds.append((context.most + kinds * bounds[-1]) / (context.total + kinds))
        best, passed_on = None, 1.0
        for context, bound in zip(reversed(contexts), bounds[:0:-1], strict=True):  # of what was not seen in a longer context:
            if passed_on * bound <= least:
                break
            for token in context.counts:
                p = self.probability(contexts, token)
                if p > least:
                    best, least = Choice(token, p), p
            kinds = len(context.counts)
            passed_on *= kinds / (context.total + kinds)
        return best


class Mixture:
    """A session's n-grams beside a model: ``read`` its requests in the order in which they were sent."""

    def __init__(self, order: int = ORDER, vocabulary: int = VOCABULARY, prior: Sequence[float] = PRIOR):
        self.ngrams = NGrams(order, vocabulary)
        #: by length of the context: tokens that spoke for the model, and for the n-grams
        self.experience = [[PRIOR_TOKENS * (1 - share), PRIOR_TOKENS * share] for share in prior[: order + 1]]

    def read(self, ids: Sequence[int], reading: Reading) -> Reading:
        """What model and n-grams together make of a request; each token is scored before anything is learned of it.

        The first choice is that of a predictor which knows the model's first choice and its probability, and of other tokens
        what the n-grams say.
        """
        request = tuple(ids)
        shares = [ngrams / (model + ngrams) for model, ngrams in self.experience]
        losses, tops, spoke = [], [], [[0.0, 0.0] for _ in shares]
        for t, loss in enumerate(reading.losses, 1):
            contexts = self.ngrams.contexts(request, t)
            length = max(0, len(contexts) - 1)
            share = shares[length]
            by_model = (1 - share) * math.exp(-loss)
            by_ngrams = share * self.ngrams.probability(contexts, request[t])
            both = by_model + by_ngrams
            losses.append(-math.log(both))
            spoke[length][0] += by_model / both
            spoke[length][1] += by_ngrams / both
            if reading.tops is not None and reading.top_losses is not None:
                tops.append(self._first(contexts, share, reading.tops[t - 1], reading.top_losses[t - 1]))
            self.ngrams.learn(request, t)
        for experience, (model, ngrams) in zip(self.experience, spoke, strict=True):
            experience[0] += model
            experience[1] += ngrams
        return Reading(losses, tops if reading.tops is not None else None, None, reading.texts)

    def _first(self, contexts: list[Context], share: float, top: int, top_loss: float) -> int:
        """The token that both together hold most likely: the model's first choice, or one that the n-grams have seen."""
        least = (1 - share) * math.exp(-top_loss) / share + self.ngrams.probability(contexts, top)
        found = self.ngrams.best(contexts, least)
        return found.token if found else top


def mix(windows: Sequence[Sequence[int]], readings: Sequence[Reading]) -> list[Reading]:
    """What the requests ``windows`` of a new session become, which a model has read as ``readings``."""
    mixture = Mixture()
    return [mixture.read(ids, reading) for ids, reading in zip(windows, readings, strict=True)]
