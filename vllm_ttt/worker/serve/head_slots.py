"""The preset `head`: B of each session that is being served, in a table of our own, and y' = y + B A y with it.

vLLM's LoRA has no part in it: the model, its kernels and its graphs are what they are without ttt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence

import torch
from torch import Tensor

from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.deltas.masters import Deltas, WorkerSession
from vllm_ttt.worker.step.head import Head


class HeadSlots:
    """As `Slots` for the trainer. ``b_KDR``: B by slot, in the dtype of the step's products."""

    def __init__(self, head: Head, deltas: Deltas, slots: int):
        self.deltas, self.head = deltas, head
        self.b_KDR = head.zeros(slots, head.head_VD.dtype).thin[:, 0]
        #: session -> slot, least recently served first
        self.table: OrderedDict[int, int] = OrderedDict()
        self.free = list(range(slots - 1, -1, -1))
        #: running requests of sessions
        self.requests: dict[str, int] = {}

    def start(self, request: str, key: int) -> None:
        """A request of the session begins."""
        self.requests[request] = key

    def finish(self, request: str) -> None:
        self.requests.pop(request, None)

    def serves(self, requests: Iterable[str]) -> bool:
        """Whether one of the requests is a session's."""
        return bool(self.requests) and any(request in self.requests for request in requests)

    def write(self, key: int, session: WorkerSession) -> None:
        """Bring what is served of the session, and its slot where it has one, to the master's version. A slot that cannot be
        written is given back: another is filled from the master when the session is served next."""
        session.serving = None
        if key in self.table:
            try:
                self._copy(self.table[key], key)
            except Exception:
                self.drop(key)
                raise

    def drop(self, key: int) -> None:
        if (slot := self.table.pop(key, None)) is not None:
            self.free.append(slot)

    def holds(self, key: int) -> bool:
        return key in self.table

    def held(self) -> list[int]:
        """The sessions that have a slot now."""
        return list(self.table)

    def adapt(self, y_ND: Tensor, rows: Sequence[str | None]) -> Tensor:
        """The states with the deltas of their sessions: y', where ``rows`` says whose each row is; y itself where none is a
        session's."""
        keys = [self.requests.get(name) if name is not None else None for name in rows]
        served = {key for key in keys if key is not None}
        if not served:
            return y_ND
        slots = {key: self._slot(key, served) for key in served}
        return self._moved(y_ND, [-1 if key is None else slots[key] for key in keys])

    def _moved(self, y_ND: Tensor, slots: list[int]) -> Tensor:
        """A copy; rows of slot -1 keep their bits."""
        moved = y_ND.clone()
        for slot in sorted(set(slots) - {-1}):
            rows = to_device(torch.tensor([i for i, own in enumerate(slots) if own == slot]), y_ND.device)
            y = y_ND.index_select(0, rows)
            delta = (y.to(self.b_KDR.dtype) @ self.head.ay_RD.T) @ self.b_KDR[slot].T
            moved.index_copy_(0, rows, (y.float() + delta).to(y.dtype))
        return moved

    def _slot(self, key: int, keep: Container[int]) -> int:
        """The session's slot, filled where it had none."""
        if key not in self.table:
            if not self.free:
                self.drop(next(other for other in self.table if other not in keep))
            slot = self.free.pop()
            try:
                self._copy(slot, key)
            except Exception:
                self.free.append(slot)
                raise
            self.table[key] = slot  # not before: what is in it is another session's
        self.table.move_to_end(key)
        return self.table[key]

    def _copy(self, slot: int, key: int) -> None:
        session = self.deltas.session(key)
        if session.serving is not None:
            self.deltas.clock.wait(session.serving_copied)
        b_1DR = (session.serving or self.deltas.read(key).delta).layer(0).y
        assert b_1DR is not None
        self.b_KDR[slot].copy_(b_1DR[0], non_blocking=True)
