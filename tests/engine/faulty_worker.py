"""The worker of the tests: TTTCPUWorker, whose steps can be watched and broken through collective_rpc."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_ttt.worker.cpu_worker import TTTCPUWorker
from vllm_ttt.worker.learn import compute
from vllm_ttt.worker.serve.cpu_lora import GroupedPunicaCPU
from vllm_ttt.worker.serve.head_slots import HeadSlots


class FaultyWorker(TTTCPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        #: for each step with tokens: {request id: tokens scheduled}
        self.test_batches: list[dict[str, int]] = []
        #: for each of them: updates committed in all sessions before it ran
        self.test_updates: list[int] = []
        self.test_asked = -1
        #: session: what each of its chunks was learned from, while `test_watch` is on
        self.test_rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.test_watching = False
        self.test_step = self.trainer.compute.step
        self.trainer.compute.step = self._watched_step  # pyright: ignore[reportAttributeAccessIssue]

    def execute_model(self, scheduler_output: Any) -> Any:
        output = super().execute_model(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            self.test_batches.append(dict(scheduler_output.num_scheduled_tokens))
            self.test_updates.append(self._updates())
        return output

    def ttt_session(self, key: int) -> dict[str, Any]:
        """Asked by GET /v1/ttt/sessions/{id}: the way from a session's name to its adapter id."""
        self.test_asked = key
        return super().ttt_session(key)

    def test_delta(self) -> dict[str, str]:
        """The master of the session that GET asked for last: float32 in base64, by module; "o" is of the lowest adapted layer,
        "1o" of the one above it."""
        delta = self.trainer.deltas.read(self.test_asked).delta
        count = len(delta.modules)
        return {f"{i // count or ''}{name}": _encode(b[0]) for i, (name, b) in enumerate(delta.parts())}

    def test_slot_is_master(self) -> dict[str, bool]:
        """Whether the slot of the session that GET asked for last holds its master, bit for bit in the model's dtype."""
        slots, key = self.trainer.slots, self.test_asked
        if not slots.holds(key):
            return {"held": False, "equal": False}
        if isinstance(slots, HeadSlots):
            slot, (b,) = slots.b_KDR[slots.table[key]], self.trainer.deltas.read(key).delta.thin[0]
            return {"held": True, "equal": torch.equal(slot, b.to(slot.dtype))}
        slot = slots.manager._adapter_manager.lora_index_to_id.index(key)
        parts = self.trainer.deltas.read(key).delta.to(slots.dtype).parts()
        equal = [bool((stack[slot, 0] == b[0]).all()) for (_, b), stack in zip(parts, slots.stacks, strict=True)]
        return {"held": True, "equal": all(equal)}

    def test_watch(self, on: int) -> None:
        """Whether to keep the rows that are learned from now on; those kept before are forgotten."""
        self.test_watching, self.test_rows = bool(on), {}

    def test_learned_rows(self) -> dict[str, str]:
        """Of the session that GET asked for last: residual stream and attention output of each learned row, float32."""
        chunks = self.test_rows[self.test_asked]
        return {name: _encode(torch.cat([chunk[i] for chunk in chunks])) for i, name in enumerate("ha")}

    def test_state(self) -> dict[str, int]:
        """How much is under way, and what is held."""
        backlog, deltas = self.backlog, self.trainer.deltas
        return {
            "readings": len(backlog.readings),
            "queued": sum(map(len, backlog.queues.values())),
            "closing": len(backlog.closing),
            "dirty": len(self.trainer.dirty),
            "pages_free": backlog.room,
            "pages": backlog.t_PC.shape[0],
            "rows_known": len(deltas.rows) + len(deltas.free),
            "rows": deltas.spare,
            "evictions": deltas.evictions,
            "errors": self.trainer.errors.count,
        }

    def test_recorded(self) -> dict[str, list]:
        """The batches since the last call, and the updates that had been committed before each."""
        recorded = {"batches": self.test_batches, "updates": self.test_updates}
        self.test_batches, self.test_updates = [], []
        return recorded

    def test_cpu_lora(self, which: str) -> None:
        """``stock``: vLLM's own LoRA on the CPU, as it is without our cure; ``grouped``: ours."""
        cls = {"stock": PunicaWrapperCPU, "grouped": GroupedPunicaCPU}[which]
        manager = self.model_runner.lora_manager._adapter_manager
        for module in manager.modules.values():
            module.punica_wrapper.__class__ = cls
            slots = len(module.lora_b_stacked[0]) if which == "stock" else 1  # vLLM's looks for an A in each slot
            module.lora_a_stacked = tuple(a[:1].expand(slots, -1, -1, -1) for a in module.lora_a_stacked)
        manager._last_mapping = None

    def test_plant(self, what: str) -> None:
        """One fault: the next call of what is named fails, those after it work."""
        if what == "step":
            _once(self.trainer.compute, "step", _raise)
        elif what == "commit":
            _once(compute, "update", _raise)
        elif what in GRADIENTS:
            _once(compute, "accumulate", GRADIENTS[what], lambda *args: args[6] is not None)
        elif what == "slot":
            _once(self.trainer.slots, "_copy", _raise)
        elif what == "sync":
            _once(self.trainer, "sync", _raise)
        elif what == "take":
            _once(self.backlog, "take", _raise)
        elif what == "after_take":
            _once(self.backlog, "take", _after)
        else:
            raise ValueError(what)

    def _watched_step(self, flat: Tensor, weight: Tensor, rows: Tensor, *args: Any) -> Tensor:
        if self.test_watching:
            sessions = {row: session for session, row in self.trainer.deltas.rows.items()}
            pages = self.backlog.h_PCD.flatten(0, 1), self.backlog.a_PCQ.flatten(0, 1)
            for row, numbers, weights in zip(rows.tolist(), flat, weight, strict=True):
                h, a = (x[numbers[weights > 0]].clone() for x in pages)
                self.test_rows.setdefault(sessions[row], []).append((h, a))
        return self.test_step(flat, weight, rows, *args)

    def _updates(self) -> int:
        return sum(session.version for session in self.trainer.deltas.sessions.values())


def _encode(x: Tensor) -> str:
    return base64.b64encode(x.float().contiguous().numpy().tobytes()).decode()


def _once(owner: Any, name: str, fault: Callable, wanted: Callable[..., bool] = lambda *_: True) -> None:
    """The next call whose arguments are ``wanted`` is one of ``fault``, which is given the function itself first."""
    original = getattr(owner, name)

    def broken(*args: Any) -> Any:
        if not wanted(*args):
            return original(*args)
        setattr(owner, name, original)
        return fault(original, *args)

    setattr(owner, name, broken)


def _raise(*_: Any) -> Any:
    raise RuntimeError("planted by a test")


def _after(original: Callable, *args: Any) -> Any:
    original(*args)
    _raise()


def _nan_gradient(accumulate: Callable, *args: Any) -> Any:
    loss_S = accumulate(*args)
    args[6].thin[:, 0, 0, 0] = float("nan")
    return loss_S


def _nan_loss(accumulate: Callable, *args: Any) -> Any:
    return accumulate(*args) * float("nan")


def _nan_row(accumulate: Callable, tail: Any, delta: Any, h_SCD: Tensor, *args: Any) -> Any:
    """Of the first session of the batch."""
    h_SCD = h_SCD.clone()
    h_SCD[0, 0] = float("nan")
    return accumulate(tail, delta, h_SCD, *args)


#: What goes wrong in the step's forward and backward.
GRADIENTS = {"nan": _nan_gradient, "nan_loss": _nan_loss, "nan_row": _nan_row}
