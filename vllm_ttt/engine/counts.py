"""What the engine core counts for ``/metrics``, and the one answer that it gives to an API server that asks."""

from __future__ import annotations

import math
from typing import Any

from vllm_ttt.engine.ledger import ASKED_FOR
from vllm_ttt.engine.life.states import State
from vllm_ttt.metrics import Snapshot, Values
from vllm_ttt.types import ChunkReport, Reason, Trial

#: Nats per token: what differs by less is even.
EVEN = 0.005


class EngineCounts(Values):
    """Counted as it happens; what can be looked up is looked up when somebody asks."""

    def __init__(self) -> None:
        super().__init__(
            "session_requests_total", "learned_tokens_total", "skipped_tokens_total", "chunks_total", "commits_total",
            "chunk_loss_nats", "cache_loss_nats", "source_tokens_total", "measured_loss_nats", "measured_total", "rate",
            "delta_norm_ratio", "held_seconds",
            "guard_trials_total", "rollbacks_total",
            "refused_requests_total", "evictions_total", "loads_total", "saves_total", "save_seconds", "errors_total",
        )  # fmt: skip

    def chunk(self, chunk: ChunkReport) -> None:
        """A chunk had its turn."""
        self.add("chunks_total", 1, chunk.skipped or "learned")
        if chunk.skipped is None:
            self.add("learned_tokens_total", chunk.tokens)
            self.add("commits_total", 1)
            self.observe("rate", chunk.rate)
            if chunk.norm is not None:
                self.observe("delta_norm_ratio", chunk.norm)
        else:
            self.skipped(chunk.tokens, chunk.skipped)
        if math.isfinite(chunk.loss):
            self.observe("chunk_loss_nats", chunk.loss)
        if chunk.cache_loss is not None and chunk.cache_share is not None:
            self.observe("cache_loss_nats", chunk.cache_loss)
            self.add("source_tokens_total", chunk.tokens * (1 - chunk.cache_share), "model")
            self.add("source_tokens_total", chunk.tokens * chunk.cache_share, "cache")
        if chunk.base_loss is not None:
            self._measured(chunk.base_loss, chunk.loss)

    def tried(self, trial: Trial) -> None:
        """The guard has tried a delta; where it was bad, its session went back."""
        bad = trial.back_to is not None
        self.add("guard_trials_total", 1, "bad" if bad else "good")
        self.add("rollbacks_total", bad, "guard")

    def skipped(self, tokens: int, reason: Reason) -> None:
        """Tokens that were sent are not learned."""
        self.add("skipped_tokens_total", tokens, reason)

    def _measured(self, base: float, session: float) -> None:
        if not (math.isfinite(base) and math.isfinite(session)):
            return
        self.observe("measured_loss_nats", base, "frozen")
        self.observe("measured_loss_nats", session, "session")
        gain = base - session
        self.add("measured_total", 1, "better" if gain > EVEN else "worse" if gain < -EVEN else "even")


def snapshot(scheduler: Any, worker: Snapshot) -> Snapshot:
    """All metrics as they are now.

    Args:
        scheduler: the TTTScheduler.
        worker: what the worker's `ttt_metrics` says.
    """
    config, tiers, ledger = scheduler.ttt_config, scheduler.ttt_tiers, scheduler.ttt_ledger
    found: Snapshot = scheduler.ttt_counts.snapshot()
    for name, series in worker.items():
        found.setdefault(name, {}).update(series)
    store, sessions = ledger.store, list(ledger.sessions.values())
    here = [s for s in sessions if s.life.in_memory]
    slots = sum(adapter in ledger.by_adapter for adapter in found.pop("slots")[""])  # the guard's is no session's
    new, on_disk = sum(s.life.state is State.NEW for s in sessions), 0
    if store is not None:
        saved, others = store.totals()
        known = {s.uid for s in sessions}
        new += sum(uid not in known for uid in others)
        on_disk = saved - sum(s.saved is not None for s in here)
    found["sessions"] = {"slot": slots, "memory": max(0, len(here) - slots), "disk": max(0, on_disk), "new": new}
    found["errors_total"]["engine"] = scheduler.ttt_guard.errors.count
    asked_for = sum(s.frozen == ASKED_FOR for s in sessions)
    found["frozen_sessions"] = {"guard": sum(s.frozen is not None for s in sessions) - asked_for, "request": asked_for}
    gauges = {
        "guard_active": int(bool(scheduler.ttt_probe.text) and found["guard_active"][""]),
        "backlog_limit_tokens": config.schedule.backlog_tokens,
        "slowdown_limit_ratio": config.schedule.max_slowdown - 1.0,
        "held_requests": scheduler.ttt_holding.count,
        "unsaved_sessions": sum(s.unsaved for s in here) if tiers.saves is not None else 0,
        "state_dir_bytes": store.bytes if store is not None else 0,
        "state_dir_limit_bytes": store.limit if store is not None else 0,
    }
    return found | {name: {"": value} for name, value in gauges.items()}
