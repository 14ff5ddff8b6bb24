"""The caches of all sessions: learning a chunk that has been committed, and which requests are served with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_ttt.config import CacheConfig
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog, Chunk
from vllm_ttt.worker.clock import copy_to_host, to_device
from vllm_ttt.worker.deltas.masters import WorkerSession
from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.ngrams import Indexes, Known, NGrams, commit
from vllm_ttt.worker.ngrams.stream import BREAK, LONGEST, Tokens
from vllm_ttt.worker.ngrams.tables import Tables


class Text(NamedTuple):
    """A chunk on its way into its session's cache: on the host, to be read when the mark of its step is done."""

    chunk: Chunk
    #: [LONGEST] its context, BREAK in front of it; [rows] its tokens
    before: Tensor
    learned: Tensor
    #: [2, rows], as `accumulate` gives them
    rows_2C: Tensor

    @property
    def tokens(self) -> Tokens:
        """Those of its context, and its own; BREAK for those that are not learned."""
        learned = self.learned.numpy().astype(np.int32)
        for first, end in self.chunk.left_out:
            learned[first:end] = BREAK
        before = self.before.numpy()
        return np.concatenate((before[len(before) - self.context :], learned)).astype(np.int32)

    @property
    def context(self) -> int:
        """Tokens that come before it."""
        assert self.chunk.before is not None
        return len(self.chunk.before)

    @property
    def losses(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[rows] each: of its tokens, and of the model's first choices there."""
        weighted, tops = self.rows_2C.double().numpy()
        return weighted * (self.chunk.rows - self.chunk.out), tops


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
        #: what of them is where the logits are; None: the host mixes
        self.tables: Tables | None = None

    @property
    def on(self) -> bool:
        return self.config.longest > 0

    def start(self, request: str, plan: RequestPlan) -> None:
        """A request of a session begins."""
        if self.on and plan.cache:
            self.requests[request] = plan.session

    def finish(self, request: str) -> None:
        self.requests.pop(request, None)

    def served(self, request: str) -> Served | None:
        """What is mixed into the request's rows as its session is served now; None: nothing."""
        found = self.serving(request)
        return None if found is None else Served(self.indexes.of(found[1]), found[1].shares)

    def serving(self, request: str) -> tuple[int, NGrams] | None:
        """The request's session and its cache as it is served now; None: nothing is mixed in."""
        key = self.requests.get(request, -1)
        session = self.sessions.get(key)
        ngrams = None if session is None else session.served_ngrams
        return None if ngrams is None or not len(ngrams.stream) else (key, ngrams)

    def texts(self, chunks: Sequence[Chunk], backlog: Backlog, rows_2SC: Tensor | None) -> list[Text | None]:
        """Of each chunk of a step that has been launched, whose page is still its own; copied to the host without waiting.

        Args:
            rows_2SC: as `accumulate` gives them.
        """
        joining = [s for s, chunk in enumerate(chunks) if chunk.before is not None]
        texts = list[Text | None]([None] * len(chunks))
        if not self.on or rows_2SC is None or not joining:
            return texts
        device, pages = backlog.t_PC.device, torch.tensor([chunks[s].page for s in joining])
        longest = [
            torch.nn.functional.pad(x, (LONGEST - len(x), 0), value=BREAK)
            for s in joining
            if (x := chunks[s].before) is not None
        ]
        before = copy_to_host(torch.stack(longest))
        learned, rows = copy_to_host(backlog.t_PC[to_device(pages, device)]), copy_to_host(rows_2SC)
        for number, s in enumerate(joining):
            count = chunks[s].rows
            texts[s] = Text(chunks[s], before[number], learned[number, :count], rows[:, s, :count])
        return texts

    def commit(self, session: WorkerSession, text: Text) -> Known:
        """The chunk has been learned: from the version that follows on, the session remembers it."""
        ngrams = session.ngrams or NGrams.fresh(self.config.longest)
        index = self.indexes.of(ngrams)
        session.ngrams, known = commit(ngrams, index, text.tokens, text.chunk.rows, *text.losses, self.config.tokens)
        self.indexes.of(session.ngrams)
        if session.served_ngrams is not ngrams:
            self.indexes.forget(ngrams)
        return known

    def drop(self, key: int) -> None:
        """The session leaves memory, or is not what it was any more: nothing of what it was sent stays behind."""
        if (session := self.sessions.get(key)) is not None:
            for ngrams in (session.ngrams, session.serving_ngrams):
                self.indexes.forget(ngrams)
        if self.tables is not None:
            self.tables.drop(key)
