"""A signal that reaches every process of the server at once must not end the worker before its sessions are saved.

Ctrl-C in a terminal and `systemctl stop` signal the whole group. The engine core then drains, saves, and lets its workers end
by closing a pipe; vLLM's worker processes would leave on the signal itself. Not before there is a session: where an engine's
start fails, those signals are what ends its workers.
"""

from __future__ import annotations

import signal


def leave_with_the_engine() -> None:
    """Ignore SIGINT and SIGTERM, if this is a worker process of its own; elsewhere the handlers are not the worker's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if getattr(handler, "__qualname__", "").startswith("WorkerProc."):
            signal.signal(number, signal.SIG_IGN)
