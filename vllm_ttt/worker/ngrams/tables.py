"""The caches of sessions that are being served, where the logits are: what `Index` has, a row of static buffers for each.

Nothing here waits for the device. A row is written in the order of the stream: what was launched before still reads what was
there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_ttt.config import CacheConfig
from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.ngrams import STEPS, NGrams


class Tables:
    """``keys``: as `Index.keys`, their bits as int64. ``sums``: how often all keys before each occur. ``sizes``: keys of a row.
    ``shares``: as `NGrams.shares`."""

    def __init__(self, rows: int, config: CacheConfig, device: torch.device):
        entries = config.longest * config.tokens
        self.orders = config.longest
        self.keys = torch.zeros(rows, entries, dtype=torch.int64, device=device)
        self.sums = torch.zeros(rows, entries + 1, dtype=torch.int32, device=device)
        self.sizes = torch.zeros(rows, dtype=torch.int32, device=device)
        self.shares = torch.zeros(rows, self.orders, len(STEPS) + 1, device=device)
        self.steps = torch.tensor(STEPS, dtype=torch.float32, device=device)
        #: session -> row and what is in it, least recently served first
        self.table: OrderedDict[int, tuple[int, NGrams]] = OrderedDict()
        self.free = list(range(rows - 1, -1, -1))
        #: what the last batch was, and the `places` of its rows; None: a row has changed since
        self.last: tuple[Any, Tensor] | None = None

    def row(self, key: int, ngrams: NGrams, index_of: Callable[[NGrams], Index], keep: Container[int]) -> int:
        """The session's row, with ``ngrams`` in it.

        Args:
            keep: sessions whose rows are not given to others.
        """
        row, there = self.table.get(key, (None, None))
        if row is None:
            if not self.free:
                self.drop(next(other for other in self.table if other not in keep))
            row = self.free.pop()
        if there is not ngrams:
            self.table.pop(key, None)
            try:
                self._write(row, ngrams, index_of(ngrams))
            except Exception:
                self.free.append(row)
                raise
            self.table[key] = row, ngrams
        self.table.move_to_end(key)
        return row

    def drop(self, key: int) -> None:
        """Nobody is served with it; nothing of what it was sent stays behind."""
        row, _ = self.table.pop(key, (None, None))
        if row is not None:
            self.keys[row].zero_()
            self.free.append(row)
            self.last = None

    def _write(self, row: int, ngrams: NGrams, index: Index) -> None:
        self.last = None
        count = len(index.keys)
        sums = np.zeros(count + 1, np.int32)
        np.cumsum(index.counts, out=sums[1:])
        shares = torch.tensor(ngrams.shares, dtype=torch.float32)
        for buffer, values in (
            (self.keys[row, :count], torch.from_numpy(index.keys.view(np.int64))),
            (self.sums[row, : count + 1], torch.from_numpy(sums)),
            (self.shares[row], shares),
        ):
            buffer.copy_(to_device(values, buffer.device), non_blocking=True)
        self.sizes[row].fill_(count)


def places(tables: Tables, rows: list[int], states: list[int]) -> Tensor:
    """[N, 2] int32, for `mix`: of each row of logits the row of its session in ``tables``, -1 where nothing is mixed in, and
    that of its request in the tokens."""
    return to_device(torch.tensor([rows, states], dtype=torch.int32).T.contiguous(), tables.keys.device)
