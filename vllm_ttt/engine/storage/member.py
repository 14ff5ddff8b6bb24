"""A server's heartbeat in a state dir that several share, and its look at the others'.

`servers/ID` holds a number that the server raises every second. Two clocks are compared nowhere: each server counts by its own.
A server may answer for its sessions for STOP seconds after it began to write its last beat. Another one finds it dead when it
has seen the same beat for DEAD seconds. The beat was begun before it could be seen: so the one has stopped DEAD - STOP seconds
before the other begins, whatever the clocks say, if they run equally fast within 40 %.

A server that has stopped goes on under a new id, with those of its sessions that nobody has taken (`rejoin`): whoever has seen
the old one's last beat may find it dead at any time, and takes nothing of the new one's.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vllm_ttt.engine.storage import database, leases
from vllm_ttt.log import logger_of

logger = logger_of(__name__)

#: Seconds from beat to beat; after which a server that cannot write one stops; after which another one takes over.
BEAT, STOP, DEAD = 1.0, 6.0, 10.0
Clock = Callable[[], float]


def now() -> float:
    """Goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Member:
    def __init__(self, folder: Path, clock: Clock | None = None):
        """``folder``: `servers/`. It takes part from `rejoin` on."""
        self.folder, self.clock = folder, clock or now
        self.id = ""
        self._beats = 0
        #: when the last beat that was written was begun
        self._last = 0.0
        self._stopped = True
        self._lock = threading.Lock()
        #: of each other server, its beat, and since when that has been seen
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    def alive(self) -> bool:
        """Whether this server may answer for its sessions. Once it may not, not before `rejoin`."""
        with self._lock:
            self._stopped = self._stopped or self.clock() - self._last >= STOP
            return not self._stopped

    def beat(self) -> None:
        """Say that this server is there. Raises OSError; does nothing where it has stopped.

        Where its file is gone somebody has found it dead, whatever its own clock says: it stops.
        """
        if not self.alive():
            return
        began, id = self.clock(), self.id
        self._beats += 1
        try:
            handle = os.open(self.folder / id, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            with self._lock:
                self._stopped = self._stopped or self.id == id
            return
        try:  # in place: a full disk has room for that, and the file is closed, so that other hosts see it
            os.pwrite(handle, b"%020d\n" % self._beats, 0)
        finally:
            os.close(handle)
        with self._lock:
            if self.id == id:
                self._last = began

    def rejoin(self, db: sqlite3.Connection, told: Callable[[int, dict[str, int]], None] = lambda last, still: None) -> None:
        """Take part, under a new id. Raises OSError, sqlite3.Error: then it does not, and nothing is left of that.

        Args:
            told: gets what `leases.enter` returns, before this server is alive.
        """
        began, before, id = self.clock(), self.id, secrets.token_hex(8)
        handle = os.open(self.folder / id, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.write(handle, b"%020d\n" % 0)
            finally:
                os.close(handle)
            with database.transaction(db):
                found = leases.enter(db, id, before)
        except BaseException:
            with suppress(OSError):
                (self.folder / id).unlink()
            raise
        told(*found)
        with self._lock:
            self.id, self._last, self._stopped = id, began, False
        if before:
            (self.folder / before).unlink(missing_ok=True)

    def look(self, db: sqlite3.Connection) -> list[str]:
        """See who is there, and bury the dead. Returns their ids. Raises OSError, sqlite3.Error."""
        found = leases.others(db, self.id)
        self._seen = {id: seen for id, seen in self._seen.items() if id in found}
        return [id for id in found if self._is_dead(id) and self._bury(db, id)]

    def _is_dead(self, id: str) -> bool:
        before, beat = self.clock(), self._read(id)
        seen, since = self._seen.get(id, (b"", 0.0))
        if id in self._seen and seen == beat:
            return before - since >= DEAD
        self._seen[id] = beat, self.clock()  # after it was read: this process may have been stopped in between
        return False

    def _bury(self, db: sqlite3.Connection, id: str) -> bool:
        seen, _ = self._seen[id]
        with database.transaction(db):
            if self._read(id) != seen:
                return False
            had = leases.bury(db, id)
        (self.folder / id).unlink(missing_ok=True)
        logger.warning("vllm-ttt: server %s has shown no sign of life for %d s: its %d sessions are free", id, DEAD, had)
        return True

    def leave(self, db: sqlite3.Connection) -> None:
        """This server has written all that it will: others may have its sessions at once."""
        with self._lock:
            self._stopped = True
        with database.transaction(db):
            leases.bury(db, self.id)
        with suppress(OSError):
            (self.folder / self.id).unlink()

    def _read(self, id: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return (self.folder / id).read_bytes()
        return None
