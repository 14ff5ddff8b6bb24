"""Every metric under ``/metrics``: what it is called, what it means, which labels it may have. Imports no torch and no vLLM.

The engine core and the worker count (`Values`), and the API server shows what they have counted when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vllm_ttt.types import ChunkReason, PromptReason

PREFIX = "vllm:ttt_"

#: Why tokens were not learned: those of a chunk, or of a prompt.
REASONS = (*get_args(ChunkReason), *get_args(PromptReason))

_LOSS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RATIO = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Counters end in ``_total``; units are seconds, bytes, tokens, nats per token, or a ratio."""

    #: without `PREFIX`
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    #: its label, if it has one besides the model's name and the engine's number, and all values of it
    label: str = ""
    values: tuple[str, ...] = ()
    #: upper bounds of a histogram's buckets, the last (infinity) apart
    buckets: tuple[float, ...] = ()


METRICS: tuple[Metric, ...] = (
    # What is learned.
    Metric("session_requests_total", "counter", "Requests of sessions, by whether they were to learn.", "learn", ("yes", "no")),
    Metric("learned_tokens_total", "counter", "Tokens of chunks that were learned."),
    Metric("skipped_tokens_total", "counter", "Tokens that were sent and not learned.", "reason", REASONS),
    Metric("chunks_total", "counter", "Chunks that had their turn.", "outcome", ("learned", *get_args(ChunkReason))),
    Metric("commits_total", "counter", "Updates committed to a session; its version counts them."),
    Metric("chunk_loss_nats", "histogram", "Loss of a chunk before it was learned, nats per token.", buckets=_LOSS),
    Metric(
        "measured_loss_nats", "histogram", "Loss of every fourth chunk under the frozen model, and before it was learned.",
        "model", ("frozen", "session"), _LOSS,
    ),
    Metric(
        "cache_loss_nats", "histogram", "Loss of a chunk before it was learned, with its session's cache, nats per token.",
        buckets=_LOSS,
    ),
    Metric(
        "source_tokens_total", "counter", "Tokens that were learned beside a cache, by what explains them.",
        "source", ("model", "cache"),
    ),
    Metric(
        "measured_total", "counter", "Those measurements by result: whether the session's loss differs by over 0.005 nats.",
        "result", ("better", "even", "worse"),
    ),
    Metric(
        "rate", "histogram", "Rate of a session after a commit: length of a step relative to the weight's norm.",
        buckets=(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.025, 0.05, 0.1),
    ),
    Metric("guard_active", "gauge", "Whether the guard tries deltas; 0: it is off, has no text, or failed three times."),
    Metric("guard_trials_total", "counter", "Deltas that were tried on the guard's text.", "result", ("good", "bad")),
    Metric(
        "rollbacks_total", "counter", "Returns to an earlier version: as the guard had it, or as somebody asked.",
        "cause", ("guard", "request"),
    ),
    Metric("delta_norm_ratio", "histogram", "Largest norm of a delta relative to its weight's, at a commit.", buckets=_RATIO),
    # What waits.
    Metric("pending_tokens", "gauge", "Captured tokens that wait for their step."),
    Metric("backlog_limit_tokens", "gauge", "Tokens that may wait (schedule.backlog_tokens)."),
    Metric("held_requests", "gauge", "Requests that wait for their session: to learn, to be read from disk, or for a slot."),
    Metric("held_seconds", "histogram", "How long such a request had waited when it was first scheduled.", buckets=_LONG),
    Metric(
        "refused_requests_total", "counter", "Requests of sessions that the engine refused, by HTTP status.",
        "status", ("400", "429", "503", "507", "other"),
    ),
    # What it costs.
    Metric("step_seconds", "histogram", "Device time of the learning before one iteration.", buckets=_SHORT),
    Metric(
        "learning_seconds_total", "counter", "Device time of learning, while requests were served and while none was.",
        "load", ("serving", "idle"),
    ),
    Metric("serving_seconds_total", "counter", "Device time of iterations that served requests, learning apart."),
    Metric("slowdown_limit_ratio", "gauge", "Share of the serving time that learning may take (schedule.max_slowdown - 1)."),
    # Where sessions are.
    Metric("sessions", "gauge", "Sessions by where their delta is.", "tier", ("slot", "memory", "disk", "new")),
    Metric(
        "frozen_sessions", "gauge", "Sessions in memory that learn nothing until they are unfrozen, by who froze them.",
        "cause", ("guard", "request"),
    ),
    Metric("unsaved_sessions", "gauge", "Sessions whose delta is not, or not like this, in the state dir."),
    Metric(
        "evictions_total", "counter", "Deltas that made room: from the device to the host, from memory to the state dir.",
        "source", ("device", "memory"),
    ),
    Metric(
        "loads_total", "counter", "Sessions that were read from the state dir.", "outcome", ("done", "failed", "damaged")
    ),
    Metric("saves_total", "counter", "Sessions that were written to the state dir.", "outcome", ("done", "failed")),
    Metric("save_seconds", "histogram", "From the order to write a session until its version was recorded.", buckets=_LONG),
    Metric("state_dir_bytes", "gauge", "Files of sessions in the state dir."),
    Metric("state_dir_limit_bytes", "gauge", "What they may take (sessions.disk_gib); 0: there is no state dir."),
    Metric("errors_total", "counter", "Errors that serving survived; the log has them.", "process", ("engine", "worker")),
    Metric("snapshot_age_seconds", "gauge", "How old these figures are: an engine that is busy answers between two steps."),
)  # fmt: skip
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}

#: What `Values.snapshot` gives: name -> label's value ("" without one) -> a number, or [sum, count of each bucket ...]
Snapshot = dict[str, dict[str, Any]]


class Values:
    """Some of the metrics as one process has counted them. Not thread-safe."""

    def __init__(self, *names: str):
        """All label values are there from the start, so that no series begins with a jump."""
        self.metrics = {name: BY_NAME[name] for name in names}
        self.values: Snapshot = {name: {v: _zero(m) for v in m.values or ("",)} for name, m in self.metrics.items()}

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Count ``amount`` more; a label that the metric does not have counts as its last."""
        series = self.values[name]
        series[label if label in series else self.metrics[name].values[-1]] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        """What a gauge is now."""
        self.values[name][label] = value

    def observe(self, name: str, value: float, label: str = "") -> None:
        """One observation of a histogram."""
        series = self.values[name][label]
        series[0] += value
        series[1 + bisect_left(self.metrics[name].buckets, value)] += 1

    def snapshot(self) -> Snapshot:
        """A copy, plain enough for msgpack."""
        copy = lambda value: list(value) if isinstance(value, list) else value  # noqa: E731
        return {name: {label: copy(value) for label, value in series.items()} for name, series in self.values.items()}


def _zero(metric: Metric) -> Any:
    """Of a histogram: its sum, and the count of each bucket, the last one without an upper bound."""
    return [0.0] + [0] * (len(metric.buckets) + 1) if metric.kind == "histogram" else 0
