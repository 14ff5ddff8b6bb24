"""The caches of all sessions: learning a chunk that has been committed, and which requests are served with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_ttt.config import CacheConfig
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog, Chunk
from vllm_ttt.worker.deltas.masters import WorkerSession
from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.ngrams import Indexes, Known, NGrams, commit
from vllm_ttt.worker.ngrams.stream import BREAK, Tokens


class Text(NamedTuple):
    """A chunk on its way into its session's cache."""

    #: its tokens, and before them those of their context; BREAK for those that are not learned
    tokens: Tokens
    #: [rows], the loss of each of its tokens, and that of the model's first choice there
    losses: NDArray[np.float64]
    tops: NDArray[np.float64]


class Served(NamedTuple):
    """What is mixed into the rows of a session."""

    followed: Index
    #: the cache's share, by length of the context from 1, and by how sure the model is
    shares: list[list[float]]


class Caches:
    def __init__(self, config: CacheConfig, sessions: Mapping[int, WorkerSession], resident: int):
        """``sessions``: as the worker knows them. ``resident``: how many may be served at once."""
        self.config, self.sessions, self.indexes = config, sessions, Indexes(resident)
        #: running requests that are served with a cache, and their sessions
        self.requests: dict[str, int] = {}

    @property
    def on(self) -> bool:
        return self.config.orders > 0

    def start(self, request: str, plan: RequestPlan) -> None:
        """A request of a session begins."""
        if self.on and plan.cache:
            self.requests[request] = plan.session

    def finish(self, request: str) -> None:
        self.requests.pop(request, None)

    def served(self, request: str) -> Served | None:
        """What is mixed into the request's rows as its session is served now; None: nothing."""
        session = self.sessions.get(self.requests.get(request, -1))
        ngrams = None if session is None else session.served_ngrams
        if ngrams is None or not len(ngrams.stream):
            return None
        return Served(self.indexes.of(ngrams), ngrams.shares())

    def texts(self, chunks: Sequence[Chunk], backlog: Backlog, rows_2SC: Tensor | None) -> list[Text | None]:
        """Of each chunk of a step that has run, whose page is still its own. ``rows_2SC``: as `accumulate` gives them."""
        return [self._text(chunk, backlog, None if rows_2SC is None else rows_2SC[:, s]) for s, chunk in enumerate(chunks)]

    def commit(self, session: WorkerSession, text: Text) -> Known:
        """The chunk has been learned: from the version that follows on, the session remembers it."""
        ngrams = session.ngrams or NGrams.fresh(self.config.orders)
        index = self.indexes.of(ngrams)
        session.ngrams, known = commit(ngrams, index, text.tokens, len(text.losses), text.losses, text.tops, self.config.tokens)
        if session.served_ngrams is not ngrams:
            self.indexes.forget(ngrams)
        return known

    def drop(self, key: int) -> None:
        """The session leaves memory, or is not what it was any more: nothing of what it was sent stays behind."""
        if (session := self.sessions.get(key)) is not None:
            for ngrams in (session.ngrams, session.serving_ngrams):
                self.indexes.forget(ngrams)

    def _text(self, chunk: Chunk, backlog: Backlog, rows_2C: Tensor | None) -> Text | None:
        if not self.on or chunk.before is None or rows_2C is None:
            return None
        learned = backlog.t_PC[chunk.page, : chunk.rows].clone()
        for first, end in chunk.left_out:
            learned[first:end] = BREAK
        tokens = np.concatenate((chunk.before.numpy(), learned.numpy())).astype(np.int32)
        losses, tops = rows_2C[:, : chunk.rows].double().numpy()
        return Text(tokens, losses * (chunk.rows - chunk.out), tops)
