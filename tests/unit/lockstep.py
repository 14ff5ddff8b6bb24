"""A world whose threads do a piece of work when the test says so, on a disk that fails when the test says so.

The threads, the files and the database are the real ones. Each write waits at a gate until it is let through, so that what one
thread has done when another goes on is chosen, and not a matter of luck. A kill is a copy of the folder, taken at a moment that
is chosen too: between two writes, within a transaction, or before the files are removed that it made obsolete.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from world import World

from vllm_ttt.engine.storage.store import Change, Write
from vllm_ttt.types import FileOrder, FileReport

#: Of a kill. At all but the first, a write of the database is begun, and cut off there.
MOMENTS = ("now", "in a transaction", "after a commit")
#: What each thread does, of the worker's orders.
WORK = {"store": (), "writer": ("save",), "reader": ("load", "digest"), "exporter": ("export",)}


class Disk:
    """What is wrong with it: no row can be written, no file, or none can be read."""

    def __init__(self) -> None:
        self.full = self.files_full = self.unreadable = False

    def check_rows(self) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")

    def check_files(self, order: FileOrder) -> None:
        if order.action == "load" and self.unreadable:
            raise OSError(5, "Input/output error")
        if order.action in ("save", "export") and self.files_full:
            raise OSError(28, "No space left on device")


class Lockstep(World):
    def __init__(self, folder: Path, **options: Any):
        self.gates = {thread: threading.Semaphore(0) for thread in WORK}
        self.disk, self.moment, self.killed = Disk(), "", False
        #: the store's thread has taken its next piece of work: which one that is does not depend on what is asked for later
        self.taken = threading.Event()
        #: the gates are open: nothing waits at them any more
        self.open = False
        self.image = folder.with_name(f"{folder.name}k")
        super().__init__(folder, **options)
        write, discard, run = self.store.write, self.store.discard, self.files._run

        def ask(job: Write, **how: Any) -> Future:
            answer = write(self._row(job), **how)
            assert self.open or self.taken.wait(20)
            return answer

        self.store.write = ask  # type: ignore[method-assign]

        def late(file: str) -> None:
            self._at("after a commit")
            discard(file)

        def submit(pool: ThreadPoolExecutor, order: FileOrder, job: Callable[..., Any], *args: Any) -> None:
            run(pool, order, self._file(order, job), *args)

        self.store.discard, self.files._run = late, submit  # type: ignore[method-assign]

    def let(self, thread: str) -> bool:
        """Let a thread do one piece of work, and wait until that is done; False where there is none."""
        if thread == "store":
            futures = self.store.unwritten
        else:
            futures = [future for order, future in self.files.running if order.action in WORK[thread]]
        if not (waiting := [future for future in futures if not future.done()]):
            return False
        if thread == "store":
            self.taken.clear()
        self.gates[thread].release()
        wait(waiting, timeout=20, return_when=FIRST_COMPLETED)
        if thread == "store" and any(not future.done() for future in self.store.unwritten):
            assert self.open or self.taken.wait(20)
        return True

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Let all threads do what they can, until ``until()``, or until there is nothing to be done."""
        for _ in range(2000):
            if until() if until else not self.tiers.busy:
                return
            self.step()
            for thread in WORK:
                while self.let(thread):
                    pass
        raise AssertionError("it does not come to rest")

    def kill(self, moment: str) -> Path:
        """SIGKILL at one of `MOMENTS`. Returns the folder as it was then."""
        self.moment = moment
        if moment != "now":
            self.let("store")
        self._copy()
        self._let_go()
        self.crash()
        return self.image

    def end(self) -> None:
        """As SIGTERM does."""
        self.tiers.close()
        self.run()
        self._let_go()
        super().end()

    def _let_go(self) -> None:
        self.open = True
        for gate in self.gates.values():
            gate.release()  # of one thread each
        self.files.exporter.shutdown(wait=False)

    def _row(self, job: Write) -> Write:
        passed: list[bool] = []

        def write(db: sqlite3.Connection) -> Change:
            if not passed:  # else it is tried again, with the room that was kept aside
                self.taken.set()
                passed.append(self._wait("store"))
            self._at("")
            change = job(db)
            self._at("in a transaction")
            self.disk.check_rows()
            return change

        return write

    def _file(self, order: FileOrder, job: Callable[..., tuple[FileReport, Any]]) -> Callable[..., tuple[FileReport, Any]]:
        thread = next(thread for thread, actions in WORK.items() if order.action in actions)

        def work(*args: Any) -> tuple[FileReport, Any]:
            self._wait(thread)
            self._at("")
            self.disk.check_files(order)
            return job(*args)

        return work

    def _wait(self, thread: str) -> bool:
        """In a thread: wait to be let through."""
        return self.open or self.gates[thread].acquire()

    def _at(self, moment: str) -> None:
        """In a thread: this may be the moment of the kill, or it may be past."""
        if moment and moment == self.moment:
            self._copy()
        if self.killed:
            raise OSError(5, "killed")

    def _copy(self) -> None:
        if not self.killed:
            self.killed = True
            shutil.copytree(self.store.folder.root, self.image)
