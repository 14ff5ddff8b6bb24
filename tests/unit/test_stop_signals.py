"""The engine core is told twice to end, the second time while it notes the first: it must not wait for itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

PROGRAM = """
import signal, threading
from vllm.v1.engine.utils import SignalCallback
from vllm_ttt.patches.engine import _once_at_a_time

class Interrupted(threading.Event):
    def set(self):
        with self._cond:  # as the original has it, when the second signal comes
            signal.raise_signal(signal.SIGTERM)
            self._flag = True
            self._cond.notify_all()

SignalCallback.trigger = _once_at_a_time(SignalCallback.trigger)
called = threading.Event()
callback = SignalCallback(called.set)
callback._event.__class__ = Interrupted
signal.signal(signal.SIGTERM, lambda *_: callback.trigger())
signal.raise_signal(signal.SIGTERM)
assert called.wait(30)
print("told")
"""


def test_a_second_signal_inside_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("told\n")
