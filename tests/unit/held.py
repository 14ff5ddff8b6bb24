"""vLLM's scheduler with a look at what waits where, and with a worker that has files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_deep_scheduler import Engine
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_ttt.types import FileOrder, FileReport


class Held(Engine):
    """With a look at what waits where, and with a worker that has files."""

    def __init__(self, **options: Any) -> None:
        super().__init__("last", **options)
        self.holding = self.scheduler.ttt_holding
        #: orders to load that have not been carried out
        self.loads: list[FileOrder] = []

    def step(self) -> SchedulerOutput:
        output = super().step()
        for order in output.ttt.files:  # type: ignore[attr-defined]
            if order.action == "load":
                self.loads.append(order)
            elif order.action == "save":
                session = self.scheduler.ttt_ledger.by_adapter[order.session]
                Path(order.path).write_bytes(b"0123456789")
                taken = FileReport("save", order.session, order.path, "taken", session.version)
                done = FileReport("save", order.session, order.path, "done", session.version, bytes=10, checksum="00")
                self.report.files += [taken, done]
        return output

    def run(self, until: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline, "it does not come to that"
            self.step()
            time.sleep(0.0005)  # what is written is written by a thread

    def load(self) -> None:
        """The oldest order to load is carried out; the engine hears of it with the next step."""
        order = self.loads.pop(0)
        session = self.scheduler.ttt_ledger.by_adapter[order.session]
        self.report.files.append(FileReport("load", order.session, order.path, "done", session.version))

    def settle(self, request: str, session: str) -> None:
        """The request has been learned, which the engine hears now."""
        self.learned(request, session, 1)
        self.step()

    def new(self) -> set[str]:
        """The requests that the next step begins."""
        output = self.step()
        return {r.req_id for r in output.scheduled_new_reqs}

    def begun(self, count: int) -> list[str]:
        """The next so many requests that begin, in order."""
        found, deadline = list[str](), time.monotonic() + 20
        while len(found) < count:
            assert time.monotonic() < deadline, f"only {found} begin"
            found += sorted(self.new())
            time.sleep(0.0005)
        return found


def other(n: int) -> list[int]:
    return [*range(5000 + 100 * n, 5100 + 100 * n)]
