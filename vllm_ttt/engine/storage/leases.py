"""Which of the servers that share a state dir has a session (`sessions.shared`). Each function runs in a transaction.

A server has a session while a row says so. Its epoch is a number that no other row ever had, so whoever lost a session and got
it back has another one. What a server writes of a session is written in one transaction with a look at that row (`fence`): a
server that has lost it writes nothing, whatever it believes. A server that is dead loses all its rows at once (`bury`).
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_ttt.engine.storage.failures import Moved
from vllm_ttt.types import SessionKey
from vllm_ttt.vault import PLAIN, Vault

_TABLES = """
CREATE TABLE IF NOT EXISTS servers (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS leases (
    session TEXT PRIMARY KEY, server TEXT NOT NULL, epoch INTEGER NOT NULL, wanted INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS leases_of_server ON leases (server, wanted);
CREATE INDEX IF NOT EXISTS versions_bytes ON versions (bytes);
INSERT OR IGNORE INTO meta VALUES ('epoch', '0');
"""


def create(db: sqlite3.Connection, alone: bool) -> None:
    """Make the tables where there are none. ``alone``: no other server is there, so nobody has a session."""
    db.executescript(_TABLES)
    if alone:
        db.execute("DELETE FROM leases")
        db.execute("DELETE FROM servers")


def enter(db: sqlite3.Connection, server: str, before: str) -> tuple[int, dict[str, int]]:
    """A server takes part, under a new id; what it has under the one ``before``, it has now under the new one.

    Returns:
        the last epoch that was given, and what the server has: session -> epoch.
    """
    db.execute("INSERT INTO servers VALUES (?)", (server,))
    db.execute("UPDATE leases SET server = ? WHERE server = ?", (server, before))
    db.execute("DELETE FROM servers WHERE id = ?", (before,))
    still = dict(db.execute("SELECT session, epoch FROM leases WHERE server = ?", (server,)).fetchall())
    return _last_epoch(db), still


def stands(db: sqlite3.Connection, server: str) -> bool:
    """Whether nobody has found the server dead."""
    return db.execute("SELECT 1 FROM servers WHERE id = ?", (server,)).fetchone() is not None


def others(db: sqlite3.Connection, server: str) -> list[str]:
    return [id for (id,) in db.execute("SELECT id FROM servers WHERE id != ?", (server,))]


def bury(db: sqlite3.Connection, server: str) -> int:
    """The server is dead, or has left: it has nothing any more. Returns how many sessions it had."""
    gone = db.execute("DELETE FROM leases WHERE server = ?", (server,)).rowcount
    db.execute("DELETE FROM servers WHERE id = ?", (server,))
    return gone


def claim(db: sqlite3.Connection, server: str, session: str) -> int | None:
    """The epoch under which the server has the session now; None where another has it, which is asked to give it up.

    Raises Moved where somebody has found this server dead.
    """
    if not stands(db, server):
        raise Moved("this server was taken for dead, and begins again; ask again")
    found = db.execute("SELECT server, epoch, wanted FROM leases WHERE session = ?", (session,)).fetchone()
    if found is None:
        epoch = _last_epoch(db) + 1
        db.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (str(epoch),))
        db.execute("INSERT INTO leases VALUES (?, ?, ?, 0)", (session, server, epoch))
        return epoch
    if found[0] == server:
        return found[1]
    if not found[2]:  # who waits asks again and again: a transaction that changes nothing costs no disk
        db.execute("UPDATE leases SET wanted = 1 WHERE session = ?", (session,))
    return None


def wanted(db: sqlite3.Connection, server: str) -> list[str]:
    """Sessions of the server that another one has asked for."""
    return [session for (session,) in db.execute("SELECT session FROM leases WHERE server = ? AND wanted = 1", (server,))]


def release(db: sqlite3.Connection, epochs: Iterable[int]) -> None:
    db.executemany("DELETE FROM leases WHERE epoch = ?", [(epoch,) for epoch in epochs])


def fence(db: sqlite3.Connection, session: str, epoch: int) -> None:
    """Raise Moved where the session is not had under that epoch any more."""
    if db.execute("SELECT 1 FROM leases WHERE session = ? AND epoch = ?", (session, epoch)).fetchone() is None:
        raise Moved


def _last_epoch(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])


@dataclass(slots=True)
class Lease:
    session: str
    epoch: int
    #: when somebody last asked for the session here
    asked: float


@dataclass
class Leases:
    """What this server has, as its engine knows it. Only the engine's thread changes what it has."""

    vault: Vault = PLAIN
    #: whether this server may answer for its sessions (`Watch.leases`)
    alive: Callable[[], bool] = lambda: True
    held: dict[SessionKey, Lease] = field(default_factory=dict)
    #: epochs that are being released: a claim that the thread had under way may still bring one
    leaving: set[int] = field(default_factory=set)
    #: of `went_on`
    last: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    #: sessions, with their epochs, of which a write was refused; the thread that writes appends
    refused: deque[tuple[SessionKey, int]] = field(default_factory=deque)

    def session(self, key: SessionKey) -> str:
        """What the table calls a session. No name: it is to be wiped with the session's rows, and not before."""
        return hashlib.sha256(f"{key.tenant}/{self.vault.name(key.name)}".encode()).hexdigest()

    def holds(self, key: SessionKey) -> bool:
        return key in self.held and self.alive()

    def check(self, key: SessionKey) -> None:
        """Raise Moved where this server does not have the session."""
        if not self.holds(key):
            raise Moved

    def granted(self, key: SessionKey, epoch: int) -> bool:
        """`claim` has given that epoch. Whether it is still this server's: it may have stopped, and gone on, or released it,
        since."""
        lease = Lease(self.session(key), epoch, time.monotonic())
        if epoch in self.leaving or not self._is_kept(lease):
            return False
        self.held[key] = lease
        return True

    def went_on(self, last: int, kept: dict[str, int]) -> list[SessionKey]:
        """This server had stopped: of what it was given up to the epoch ``last`` it has ``kept``. Returns what it has lost."""
        self.last, self.kept = last, kept
        return [key for key, lease in self.held.items() if not self._is_kept(lease)]

    def _is_kept(self, lease: Lease) -> bool:
        return lease.epoch > self.last or self.kept.get(lease.session) == lease.epoch

    def fenced(self, key: SessionKey, write: Callable[[sqlite3.Connection], Any]) -> Callable[[sqlite3.Connection], Any]:
        """A write of that session, which is asked for now, and done only if the session is had as it is now."""
        lease = self.held.get(key)

        def fenced(db: sqlite3.Connection) -> Any:
            try:
                if lease is None:
                    raise Moved
                fence(db, lease.session, lease.epoch)
            except Moved:
                if lease is not None:
                    self.refused.append((key, lease.epoch))
                raise
            return write(db)

        return fenced
