"""vLLM's multi-LoRA slots as a cache of the masters: filled when vLLM activates an adapter, rewritten in place afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTER_PATH, NO_ADAPTERS
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.deltas.masters import Deltas, WorkerSession
from vllm_ttt.worker.serve.gpu_slots import RoundedB, fill, halves, in_8_bits
from vllm_ttt.worker.step.micro_step import Tail
from vllm_ttt.worker.step.tail import LayerModules, TailModules


class SessionLoRAManager(LRUCacheWorkerLoRAManager):
    """Takes the place of vLLM's manager (by ``__class__``): a session's adapter is made from memory, never from a path."""

    slots: Slots
    #: the adapters of the last batch, all of which have a slot
    applied: frozenset[int] = frozenset()

    def _apply_adapters(self, lora_requests: set[LoRARequest]) -> None:
        """As vLLM's, which looks each adapter up in copies of its tables: not again for a batch of the same adapters."""
        wanted = frozenset(request.lora_int_id for request in lora_requests if request)
        if wanted == self.applied and wanted.issubset(self._adapter_manager.lora_index_to_id):
            return
        # vLLM goes through them one by one; who has no slot takes that which was served longest ago, of nobody who came before.
        # By their numbers, then, the same on all ranks.
        in_order: Any = sorted(filter(None, lora_requests), key=lambda x: (not self.slots.holds(x.lora_int_id), x.lora_int_id))
        super()._apply_adapters(in_order)
        self.applied = wanted

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if not lora_request.lora_path.startswith(ADAPTER_PATH):
            raise RequestError(NO_ADAPTERS, param="model")
        return self.slots.adapter(lora_request.lora_int_id)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """As vLLM's, but a session's adapter that has lost its slot is made anew: what vLLM keeps of it is out of date."""
        key = lora_request.lora_int_id
        ours = lora_request.lora_path.startswith(ADAPTER_PATH)
        if ours and not self.slots.holds(key):
            self.remove_adapter(key)
        added = super().add_adapter(lora_request)
        if ours and added and (kept := self._adapter_manager.get_adapter(key)) is not None:
            kept.loras = {}  # it is in its slot, and is never loaded from here again
        return added


class SharedA:
    """A LoRA layer all of whose slots have the same A, which is there once; mixed into the class of a live layer by `share`."""

    lora_b_stacked: tuple[Tensor, ...]

    def reset_lora(self, index: int) -> None:
        for b in self.lora_b_stacked:
            b[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """vLLM's, for B alone; its own dummies at start have a smaller rank."""
        self.reset_lora(index)
        for b, given in zip(self.lora_b_stacked, lora_b if isinstance(lora_b, list) else [lora_b], strict=True):
            b[index, 0, :, : given.shape[1]].copy_(given, non_blocking=True)


class RoundedSharedA(RoundedB, SharedA):
    """The same, with B in 8 bits."""


def share(layer: Any, a_RI: Tensor, rounded: bool) -> None:
    """Let all slots of a live LoRA layer of vLLM have ``a_RI``, and with ``rounded`` B in 8 bits; gives back what vLLM made
    room for."""
    kind = RoundedSharedA if rounded else SharedA
    layer.__class__ = type(f"{kind.__name__}{type(layer).__name__}", (kind, type(layer)), {})
    layer.lora_a_stacked = tuple(a_RI.to(a)[None, None] for a in layer.lora_a_stacked)
    if rounded:
        layer.lora_b_stacked = in_8_bits(layer.lora_b_stacked)


def _parts(stacks: Sequence[Tensor], count: int) -> list[Tensor]:
    """vLLM's tensors [slots, 1, out, R] of a module, or their scales, as ``count`` of them: a module that has one has its parts
    beside each other."""
    return list(stacks) if len(stacks) == count else list(stacks[0].chunk(count, 2))


class Slots:
    def __init__(self, manager: Any, modules: TailModules, deltas: Deltas, dtype: torch.dtype):
        manager.__class__ = SessionLoRAManager
        manager.slots = self
        self.manager, self.modules, self.deltas, self.dtype = manager, modules, deltas, dtype
        wrapped = set(manager._adapter_manager.modules)
        assert wrapped == set(modules.names), f"LoRA slots on {wrapped}, expected {set(modules.names)}"
        tail = deltas.tail
        assert isinstance(tail, Tail)
        #: whether B is in 8 bits
        self.rounded = tail.head_VD.is_cuda
        places = [
            (letters, module, a)
            for layer in modules.layers
            for letters, module, a in (
                ("o", layer.o_proj, tail.ao_RQ),
                ("gu", layer.gate_up_proj, tail.ai_RD),
                ("d", layer.down_proj, tail.ad_RF),
            )
            if letters in modules.adapted
        ]
        for _, module, a in places:
            share(module, a, self.rounded)
        #: whether gate and up are one slice of a slot
        self.packed = any(letters == "gu" and module.n_slices == 1 for letters, module, _ in places)
        #: vLLM's tensors of all slots, one for each part of a delta; their scales, where B is in 8 bits
        self.stacks, self.scales = list[Tensor](), list[Tensor]()
        for letters, module, _ in places:
            stacks, scales = halves(module.lora_b_stacked) if self.rounded else (module.lora_b_stacked, ())
            self.stacks += _parts(stacks, len(letters))
            self.scales += _parts(scales, len(letters)) if scales else []
        if self.rounded:
            self._copy(0, tail.zeros(1))  # the first commit does not wait for the kernel to be compiled

    def start(self, request: str, key: int) -> None:
        """A request of the session begins: its adapter came with it."""

    def finish(self, request: str) -> None:
        """A request has ended."""

    def adapter(self, key: int) -> LoRAModel:
        """The session's adapter with the delta that is to be served: vLLM copies it into the slot that it chooses."""
        session = self.deltas.session(key)
        if session.serving is not None:
            self.deltas.clock.wait(session.serving_copied)
        served = session.serving or self.deltas.read(key).delta
        served = served if self.rounded else served.to(self.dtype)
        tail, rank = self.deltas.tail, self.deltas.tail.rank
        assert isinstance(tail, Tail)
        names = (self._names(layer) for layer in self.modules.layers)
        inputs = {"o": tail.ao_RQ, "g": tail.ai_RD, "u": tail.ai_RD, "gu": tail.ai_RD, "d": tail.ad_RF}
        places = [(name, inputs[letters], len(letters)) for layer in names for letters, name in layer.items()]
        parts = (b[0] for _, b in served.parts())
        weights = [
            LoRALayerWeights(name, rank, rank, a, torch.cat([next(parts) for _ in range(n)]) if n > 1 else next(parts))
            for name, a, n in places
        ]
        return LoRAModel(key, rank, {w.module_name: w for w in weights})

    def write(self, key: int, session: WorkerSession) -> None:
        """Bring what is served of the session, and its slot where it has one, to the master's version.

        A slot that cannot be written is given back, so that vLLM fills another from the master when the session is served next.
        """
        session.serving = None
        if self.holds(key):
            try:
                self._copy(self.manager._adapter_manager.lora_index_to_id.index(key), self.deltas.read(key).delta)
            except Exception:
                self.drop(key)
                raise

    def drop(self, key: int) -> None:
        self.manager.remove_adapter(key)

    def holds(self, key: int) -> bool:
        return key in self.manager._adapter_manager.lora_index_to_id

    def held(self) -> list[int]:
        """The adapters that have a slot now."""
        return [key for key in self.manager._adapter_manager.lora_index_to_id if key is not None]

    def _names(self, layer: LayerModules) -> dict[str, str]:
        """vLLM's names of a layer's adapted modules by letter, gate and up apart where it has them apart."""
        parent = layer.names["gu"].rpartition(".")[0]
        inner = {"gu": layer.names["gu"]} if self.packed else {"g": f"{parent}.gate_proj", "u": f"{parent}.up_proj"}
        names = {"o": layer.names["o"], **inner, "d": layer.names["d"]}
        return {letters: name for letters, name in names.items() if letters in self.modules.adapted}

    def _copy(self, slot: int, delta: Delta) -> None:
        if self.rounded:
            fill(self.stacks, self.scales, slot, delta)
            return
        served = delta.to(self.dtype)
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [stack[slot, 0] for stack in self.stacks], [b[0] for _, b in served.parts()]
        )
