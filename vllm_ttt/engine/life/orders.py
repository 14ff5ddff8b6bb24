"""What the worker is told to do with files, and who waits to hear what has become of it. Orders leave with a step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from vllm_ttt.types import FileOrder, FileReport


class Orders:
    def __init__(self) -> None:
        self.leaving: list[FileOrder] = []
        #: by action, adapter and path: who is to be told, and who looks when the snapshot is taken
        self.awaited: dict[tuple[str, int, str], tuple[Future, Callable[[FileReport], None] | None]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.leaving or self.awaited)

    def drop(self, adapter: int) -> None:
        """The worker is to forget a session. It does not say when it has."""
        self.leaving.append(FileOrder("drop", adapter))

    def ask(self, order: FileOrder, taken: Callable[[FileReport], None] | None = None) -> Future:
        """Resolves to the last FileReport of the order, whatever it says. ``taken`` gets the one before, of a save."""
        future: Future = Future()
        self.awaited[order.action, order.session, order.path] = future, taken
        self.leaving.append(order)
        return future

    def take(self) -> list[FileOrder]:
        leaving, self.leaving = self.leaving, []
        return leaving

    def read(self, report: FileReport) -> None:
        key = report.action, report.session, report.path
        if report.outcome != "taken":
            self.awaited.pop(key)[0].set_result(report)
        elif (taken := self.awaited[key][1]) is not None:
            taken(report)
