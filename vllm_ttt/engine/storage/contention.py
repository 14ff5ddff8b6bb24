"""Other servers that write to the database of a state dir: how long is waited for them, and who is told so at once."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vllm_ttt.engine.storage import database
from vllm_ttt.engine.storage.failures import Locked, is_busy, unreadable

T = TypeVar("T")


class Contention:
    """What one server has seen of it: its engine's thread reads, and another one writes."""

    def __init__(self, shared: bool):
        self.shared = shared
        #: until when nothing is read, and until when nothing is written that need not wait
        self.unreadable_until = self.unwritable_until = 0.0

    @property
    def locked(self) -> bool:
        """Whether another server has kept the database to itself for a while, and may still."""
        return time.monotonic() < max(self.unreadable_until, self.unwritable_until)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Raises StoreError (503) and nothing else."""
        if time.monotonic() < self.unreadable_until:
            raise Locked
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if is_busy(error):
                self.unreadable_until = time.monotonic() + database.LOCKED
                raise Locked from None
            raise unreadable(error) from None

    def transact(self, db: sqlite3.Connection, write: Callable[[], T], waits: bool) -> T:
        """Do that in a transaction, again and again until the database can be had.

        Args:
            waits: as long as `database.PATIENCE`. In pieces, of which the engine knows; else it is `Locked` after one.
        """
        if self.shared:
            db.execute(f"PRAGMA busy_timeout = {min(1000 * database.LOCKED, database.PATIENCE):.0f}")
        deadline = time.monotonic() + database.PATIENCE / 1000
        while waits or not self.locked:
            try:
                with database.transaction(db):
                    done = write()
                self.unreadable_until = self.unwritable_until = 0.0
                return done
            except sqlite3.Error as error:
                if not (self.shared and is_busy(error)):
                    raise
                self.unwritable_until = time.monotonic() + 2 * database.LOCKED  # over the next piece, too
                if waits and time.monotonic() >= deadline:
                    raise
        raise Locked
