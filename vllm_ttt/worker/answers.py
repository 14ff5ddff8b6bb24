"""What the worker answers when the engine core, or a script, asks it between two steps (vLLM's collective_rpc).

All ranks are asked at once, in the same order as their steps; the first one's answer counts.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_ttt.metrics import Snapshot
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.learn.budget import Budget
from vllm_ttt.worker.learn.device_times import DeviceTimes
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.ranks import ALONE, Ranks


class Answers:
    """A base of `TTTWorkerMixin`."""

    trainer: Trainer
    backlog: Backlog
    budget: Budget
    times: DeviceTimes
    ranks: Ranks = ALONE

    def ttt_session(self, key: int) -> dict[str, Any]:
        """What the worker knows of a session."""
        deltas = self.trainer.deltas
        session = deltas.sessions.get(key) or deltas.fresh()
        size = self.trainer.ranks.size * deltas.bytes_per_session()
        return {
            "tier": "slot" if self.trainer.slots.holds(key) else "memory",
            "bytes": size + (0 if session.ngrams is None else session.ngrams.stream.nbytes),
            "cache_tokens": 0 if session.ngrams is None else session.ngrams.tokens,
            "tokens_pending": self.backlog.pending_of(key),
            "versions": self.trainer.versions.of(key),
            "norm": dict(zip(deltas.tail.modules, session.norms, strict=True)),
            "rate": session.rate,
        }

    def ttt_sessions(self, keys: list[int]) -> list[dict[str, Any]]:
        """`ttt_session` of several."""
        return [self.ttt_session(key) for key in keys]

    @torch.inference_mode()
    def ttt_copy(self, key: int, to: int) -> int:
        """`Trainer.copy`."""
        with self.ranks.alike("a session could not be copied here"):
            return self.trainer.copy(key, to)

    @torch.inference_mode()
    def ttt_roll_back(self, key: int, version: int) -> list[int] | None:
        """Return a session that has no request in the engine to ``version``; versions that are kept, where that is not one."""
        with self.ranks.alike("a session could not be rolled back here"):
            return None if self.trainer.roll_back(key, version) else self.trainer.versions.of(key)

    def ttt_status(self) -> dict[str, Any]:
        """Captured tokens that wait; whether any waits or is being learned, until its slot has it; whether the guard has deltas
        to try; updates committed to all sessions, tokens learned and errors since the start; ms that a tile of so many
        tokens takes."""
        self.trainer.collect()
        return {
            "pending": self.backlog.pending,
            "learning": bool(self.backlog.pending) or self.trainer.learning,
            "trying": self.trainer.guard.busy,
            "updates": sum(session.version for session in self.trainer.deltas.sessions.values()),
            "tokens_learned": self.trainer.tokens_learned,
            "errors": self.trainer.errors.count,
            "tile_ms": {tokens: 1e3 * seconds for tokens, seconds in self.budget.costs.items()},
        }

    def ttt_metrics(self) -> Snapshot:
        """What the worker knows of the metrics; "slots" is the adapters that have one."""
        trainer = self.trainer
        return self.times.snapshot() | {
            "pending_tokens": {"": self.backlog.pending},
            "evictions_total": {"device": trainer.deltas.evictions},
            "errors_total": {"worker": trainer.errors.count},
            "slots": {"": trainer.slots.held()},
            "guard_active": {"": int(trainer.guard.on)},
        }
