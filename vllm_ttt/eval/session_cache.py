"""The session's own cache of docs/cache.md as a plain loop over dictionaries: the engine, which sorts arrays, is held to it.

What followed each context of 1 to ``orders`` tokens is counted. Of a token, PPM-C (Moffat 1990) asks the longest context
first that is known; what was not seen after it is left to the next shorter one, and at last to the model itself: so the cache
gives to no token a share that did not follow the same token in what the session sent. The probability that is served is (1 -
w) m + w c; w goes by the length of the longest context that is known and by how sure the model is, and is learned by
expectation-maximisation.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

from vllm_ttt.config import CACHE_PRIOR, CACHE_PRIOR_TOKENS, CACHE_SURE, TTTConfig

Context = tuple[int, ...]


class SessionCache:
    """One session. ``read`` says what is served of a request, ``learn`` takes it in afterwards."""

    def __init__(self, config: TTTConfig | None = None, orders: int | None = None):
        """``orders``: instead of what the config says."""
        config = config or TTTConfig()
        self.orders, self.limit = config.cache.longest if orders is None else orders, config.cache.tokens
        self.chunk, self.min_chunk = config.learn.chunk, config.learn.min_chunk
        #: what has followed a context, how often
        self.table: dict[Context, Counter[int]] = {}
        #: (what came before, token), oldest first: what the table counts
        self.entries: deque[tuple[Context, int]] = deque()
        #: by length of the context, from 1, and by how sure the model is: tokens that spoke for the model, and for the cache
        self.experience = [
            [[CACHE_PRIOR_TOKENS * (1 - share), CACHE_PRIOR_TOKENS * share] for share in shares]
            for shares in CACHE_PRIOR[: self.orders]
        ]

    def contexts(self, before: Context) -> list[Counter[int]]:
        """What has followed the last 1, 2, ... tokens of ``before``, as long as anything has."""
        found = []
        for length in range(1, min(self.orders, len(before)) + 1):
            if not (counts := self.table.get(before[-length:])):
                break
            found.append(counts)
        return found

    def parts(self, before: Context, token: int, model: float, likeliest: float) -> tuple[int, float, float]:
        """(length of the longest context, model's part, cache's part) of what is served for ``token``, whose probability under
        the model is ``model``, and that of its first choice ``likeliest``; of length 0 the cache has none.
        """
        contexts = self.contexts(before)
        if not contexts:
            return 0, model, 0.0
        p = model
        for counts in contexts:
            kinds = len(counts)
            p = (counts[token] + kinds * p) / (counts.total() + kinds)
        for_model, for_cache = self.experience[len(contexts) - 1][sureness(likeliest)]
        share = for_cache / (for_model + for_cache)
        return len(contexts), (1 - share) * model, share * p

    def read(self, ids: Sequence[int], losses: Sequence[float], tops: Sequence[float]) -> list[float]:
        """Losses of ``ids[1:]`` as they are served, where the model's are ``losses``, its first choices' ``tops``."""
        return [-math.log(sum(self._parts(ids, t, *model)[1:])) for t, model in enumerate(zip(losses, tops, strict=True), 1)]

    def learn(
        self, ids: Sequence[int], losses: Sequence[float], tops: Sequence[float], start: int = 0
    ) -> list[tuple[float, float]]:
        """Take in a request chunk by chunk, from pair ``start`` on; each is asked first how well it was known.

        Returns:
            of each chunk: its mean loss with the cache, and the share of its tokens that the cache explains.
        """
        found = []
        for first in range(start, len(losses), self.chunk):
            last = min(first + self.chunk, len(losses))
            if last - first >= self.min_chunk:
                found.append(self.commit(ids, losses, tops, first, last))
        return found

    def commit(
        self, ids: Sequence[int], losses: Sequence[float], tops: Sequence[float], first: int, last: int
    ) -> tuple[float, float]:
        """Pairs ``first`` to ``last``; pair i is what comes before token i + 1, and that token."""
        spoke, loss, known = [[[0.0, 0.0] for _ in steps] for steps in self.experience], 0.0, 0.0
        for t in range(first + 1, last + 1):
            length, model, cache = self._parts(ids, t, losses[t - 1], tops[t - 1])
            loss -= math.log(model + cache)
            known += cache / (model + cache)
            if length:
                found = spoke[length - 1][sureness(math.exp(-tops[t - 1]))]
                found[0] += model / (model + cache)
                found[1] += cache / (model + cache)
        for steps, spoken in zip(self.experience, spoke, strict=True):
            for experience, (model, cache) in zip(steps, spoken, strict=True):
                experience[0] += model
                experience[1] += cache
        for t in range(first + 1, last + 1):
            self._add(tuple(ids[max(0, t - self.orders) : t]), ids[t])
        return loss / (last - first), known / (last - first)

    def _parts(self, ids: Sequence[int], t: int, loss: float, top: float) -> tuple[int, float, float]:
        return self.parts(tuple(ids[max(0, t - self.orders) : t]), ids[t], math.exp(-loss), math.exp(-top))

    def _add(self, before: Context, token: int) -> None:
        for length in range(1, len(before) + 1):
            self.table.setdefault(before[-length:], Counter())[token] += 1
        self.entries.append((before, token))
        while len(self.entries) > self.limit:
            before, token = self.entries.popleft()
            for length in range(1, len(before) + 1):
                counts = self.table[before[-length:]]
                counts[token] -= 1
                if not counts[token]:
                    del counts[token]


def sureness(likeliest: float) -> int:
    """The step of CACHE_SURE of a model whose first choice has this probability; 0: it is sure."""
    return sum(likeliest < step for step in CACHE_SURE)
