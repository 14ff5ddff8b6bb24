"""Wakes an engine core that rests, so that what sessions have learned is saved in time."""

from __future__ import annotations

import threading
import time
from typing import Any

from vllm.v1.engine import EngineCoreRequestType

from vllm_ttt.engine.life.tiers import Tiers

#: Seconds after the time of a round, so that it is due then.
_LATE = 0.01


class Alarm:
    """A thread that wakes the engine whenever a round of saves is due. It looks at nothing that the engine's thread changes:
    whether something is to be done, an engine that wakes asks itself."""

    def __init__(self, engine: Any, seconds: float, tiers: Tiers):
        """
        Args:
            engine: vLLM's EngineCoreProc, whose input queue is how its idle loop is woken.
            seconds: between two rings, at most: those between two rounds of saves.
        """
        self.engine, self.seconds, self.tiers = engine, seconds, tiers
        if tiers.sharing is not None:
            tiers.sharing.watch.wake = self.ring
        threading.Thread(target=self._run, name="ttt-alarm", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self.pause())
            self.ring()

    def ring(self) -> None:
        """From any thread."""
        self.engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def pause(self) -> float:
        """Seconds to the next ring: until the next round, so that what changes meanwhile does not wait for a second one.

        Where that is past, nothing has changed since: whoever changes now begins a round in the same step.
        """
        left = 0.0 if self.tiers.saves is None else self.tiers.saves.next_round - time.monotonic()
        return min(self.seconds, left + _LATE) if left > 0 else self.seconds
