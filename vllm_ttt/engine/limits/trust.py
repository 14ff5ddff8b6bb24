"""How far a session is trusted: what of a prompt may be learned, and what becomes of a delta that does harm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.limits.filter import Filter
from vllm_ttt.engine.limits.limits import Allowance, repetitive
from vllm_ttt.engine.requests import Attached
from vllm_ttt.types import ChunkReport, Reason, Trial

#: Why a chunk, or a part of one, was not learned, where nothing was spent on it.
_NO_STEP = ("short", "repetition", "rollback", "frozen", "full", "unread", "error", "filter")


class Trust:
    def __init__(self, config: TTTConfig, model_config: Any = None):
        """``model_config``: vLLM's, for `learn.filter`."""
        self.config, self.filter = config, Filter(config.learn.filter, model_config)
        #: sessions that the guard has stopped, of which the worker does not know yet that this is known here
        self.stopped: list[int] = []
        #: what each key may have learned in this hour, over all its sessions, also those that are no more
        self.keys: dict[str, Allowance] = {}

    def refuses(self, session: Session, pairs: int) -> Reason | None:
        """Why a prompt of so many pairs is not learned, now that its turn has come. None: they are taken off what may be
        learned in this hour."""
        if session.frozen:
            return "frozen"
        guard, key = self.config.guard, self.keys.setdefault(session.key.tenant, Allowance())
        if not key.take(pairs, guard.hourly_tokens_per_key):
            return "limit"
        if session.allowance.take(pairs, guard.hourly_tokens):
            return None
        key.spend(-pairs)
        return "limit"

    def spend(self, session: Session, tokens: int) -> None:
        """Take off what could not be known before: generated tokens."""
        session.allowance.spend(tokens)
        self.keys.setdefault(session.key.tenant, Allowance()).spend(tokens)

    def counted(self, session: Session, chunk: ChunkReport, attached: Attached | None) -> None:
        """What has not been learned, and cost no step, is given back: also where the guard has stopped its session.

        Args:
            attached: its request, while that is in the engine: what it generates is not taken off yet.
        """
        if chunk.skipped in _NO_STEP:
            first, end = chunk.end - chunk.tokens, chunk.end if attached is None else min(chunk.end, attached.prompt - 1)
            self.spend(session, -max(0, end - first))

    def repetitive(self, ids: Sequence[int], start: int) -> list[tuple[int, int]]:
        """Ranges (first, end) of a prompt's pairs, from ``start`` on, that repeat themselves."""
        learn = self.config.learn
        return repetitive(ids, start, learn.chunk, learn.min_chunk, self.config.guard.min_ratio)

    def tried(self, session: Session, trial: Trial) -> str | None:
        """The guard has tried the session's delta. Where it was bad: why the session learns no more."""
        if trial.back_to is not None:
            self.stopped.append(trial.session)
        session.probe_regression = trial.regression
        if trial.back_to is None:
            return None
        # Else its owner has had it go back further meanwhile. A chunk that was given up after the worker went back may have
        # said that version already: what it learned since is forgotten here all the same.
        if trial.back_to <= session.version:
            session.back_to(trial.back_to)
        else:
            session.life.learned()  # that it is frozen is saved with it, as where it goes back
        session.frozen = (
            f"at version {trial.version} its delta made the guard's text worse by {trial.regression:.3f} nats per token "
            f"(guard.max_regression {self.config.guard.max_regression:g}); it is back at version {session.version}"
        )
        return session.frozen

    def take_stopped(self) -> list[int]:
        """Those since the last call, for `StepPlan.stopped`."""
        stopped, self.stopped = self.stopped, []
        return stopped
