"""A session's cache as it is at one version: never changed, so that versions, forks and snapshots are references to it.

`vllm_ttt.eval.session_cache` is the plain loop that this is held to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_ttt.config import CACHE_PRIOR, CACHE_PRIOR_TOKENS, CACHE_SURE, CacheConfig
from vllm_ttt.worker.ngrams import stream as streams
from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.stream import BREAK, LONGEST, Tokens

#: The loss of a model's first choice at the steps of CACHE_SURE.
STEPS = -np.log(CACHE_SURE)


class Known(NamedTuple):
    """How well a chunk was known before it was learned."""

    #: nats per token, with the cache
    loss: float
    #: share of its tokens that the cache explains
    share: float


class NGrams:
    """``stream``: what it remembers. ``experience`` [orders, steps, 2], by length of the context from 1 and by how sure the
    model is: tokens that spoke for the model, and for the cache. Neither ever changes."""

    __slots__ = ("experience", "index", "shares", "stream")

    def __init__(self, stream: Tokens, experience: NDArray[np.float64]):
        self.stream, self.experience = stream, experience
        for array in (stream, experience):
            array.setflags(write=False)
        #: the cache's share, by length of the context from 1, and by STEPS
        self.shares: list[list[float]] = (experience[..., 1] / experience.sum(-1)).tolist()
        #: `Indexes` has it, or not
        self.index: Index | None = None

    @classmethod
    def fresh(cls, orders: int) -> NGrams:
        return cls(streams.EMPTY.copy(), _prior(orders))

    @property
    def tokens(self) -> int:
        """That it remembers."""
        return streams.count(self.stream)

    def to_state(self) -> list[list[list[float]]]:
        """What a file says of it besides the stream, for JSON."""
        return self.experience.tolist()

    @classmethod
    def revive(cls, stream: Tokens, experience: Sequence[Sequence[Sequence[float]]], config: CacheConfig) -> NGrams:
        """What a file has, as this configuration wants it. Raises ValueError where ``experience`` is none."""
        found = np.asarray(experience, np.float64)
        own = _prior(config.longest) if config.longest else found.copy()  # a server without caches keeps it as it was
        if not (np.isfinite(found).all() and (found > 0).all()):
            raise ValueError("the weights of its cache are not positive numbers")
        if found.shape[1:] == own.shape[1:]:  # other steps: its weights begin anew
            kept = min(len(own), len(found))
            own[:kept] = found[:kept]
        return cls(streams.trim(stream, config.tokens), own)


class Indexes:
    """The index of each session that is being served: the last ``most`` that were asked for."""

    def __init__(self, most: int):
        self.most = most
        self.recent: OrderedDict[int, NGrams] = OrderedDict()

    def of(self, ngrams: NGrams) -> Index:
        self.recent[id(ngrams)] = ngrams
        self.recent.move_to_end(id(ngrams))
        while len(self.recent) > self.most:
            self.recent.popitem(last=False)[1].index = None
        if ngrams.index is None:
            ngrams.index = Index(ngrams.stream, len(ngrams.experience))
        return ngrams.index

    def forget(self, ngrams: NGrams | None) -> None:
        """Nobody is served with it any more."""
        if ngrams is not None:
            self.recent.pop(id(ngrams), None)
            ngrams.index = None


def commit(
    ngrams: NGrams, index: Index, text: Tokens, rows: int, losses: NDArray[np.float64], tops: NDArray[np.float64], limit: int
) -> tuple[NGrams, Known]:
    """Take a chunk in. It is asked first how well it was known, and from that the weights learn. What it becomes has its index,
    which `Indexes` does not know yet.

    Args:
        text: its tokens, which are the last ``rows`` ones, and up to LONGEST before them; BREAK for those that are not learned,
            which nothing is learned of or after.
        losses, tops: [rows], the model's loss of each, and of its first choice there.
        limit: tokens that are remembered at most.
    """
    before, tokens = text[: len(text) - rows], text[len(text) - rows :]
    padded = np.concatenate((np.full(LONGEST - len(before), BREAK, np.int32), text))
    windows, learned = np.lib.stride_tricks.sliding_window_view(padded[:-1], LONGEST), tokens != BREAK
    length, share, left = index.parts(windows[learned], tokens[learned])
    model, experience = np.exp(-losses[learned]), ngrams.experience.copy()
    kind = np.where(length, (length - 1) * (len(STEPS) + 1) + STEPS.searchsorted(tops[learned]), experience[..., 0].size)
    flat = experience.reshape(-1, 2)
    weight = np.append(flat[:, 1] / flat.sum(1), 0.0)[kind]
    for_model, for_cache = (1 - weight) * model, weight * (share + left * model)
    both = np.maximum(for_model + for_cache, np.finfo(np.float64).tiny)
    for column, spoke in enumerate((for_model / both, for_cache / both)):
        flat[:, column] += np.bincount(kind, spoke, len(flat) + 1)[:-1]
    whole = streams.join(ngrams.stream, before, tokens)
    grown, places = NGrams(streams.trim(whole, limit), experience), np.flatnonzero(whole >= 0)
    added, removed = places[places >= len(ngrams.stream)], places[: max(0, len(places) - limit)]
    grown.index = index.moved(whole, added, removed)
    return grown, Known(float(-np.log(both).mean()), float((for_cache / both).mean()))


def _prior(orders: int) -> NDArray[np.float64]:
    shares = np.array(CACHE_PRIOR[:orders]).reshape(-1, len(STEPS) + 1)
    return CACHE_PRIOR_TOKENS * np.stack((1 - shares, shares), -1)
