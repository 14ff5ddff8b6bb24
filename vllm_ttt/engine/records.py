"""What a state dir records of its sessions: the tables, and every statement on them. Each function runs in a transaction.

A session has a row; each of its saved versions has one more, which names its file. The file is there before the row, and the
row goes before the file.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ttt.errors import ConfigError
from vllm_ttt.types import SessionKey

FORMAT = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    uid TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL,
    state TEXT NOT NULL, UNIQUE (tenant, name));
CREATE TABLE IF NOT EXISTS versions (
    uid TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE, version INTEGER NOT NULL, file TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL, checksum TEXT NOT NULL, saved REAL NOT NULL, state TEXT NOT NULL, PRIMARY KEY (uid, version));
CREATE INDEX IF NOT EXISTS sessions_last_used ON sessions (last_used);
CREATE INDEX IF NOT EXISTS versions_saved ON versions (saved);
"""


@dataclass(frozen=True, slots=True)
class Version:
    """A saved version. ``state`` is the ledger's as of that version."""

    version: int
    file: str
    bytes: int
    checksum: str
    saved: float
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A session as it is recorded; ``newest`` is None while nothing of it was saved."""

    uid: str
    key: SessionKey
    created: float
    last_used: float
    state: dict[str, Any]
    newest: Version | None = None


def connect(database: Path, readonly: bool = False) -> sqlite3.Connection:
    """A connection; raises ConfigError where the file is not a database."""
    try:
        uri = f"{database.as_uri()}?mode={'ro' if readonly else 'rwc'}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
        db.execute("PRAGMA foreign_keys = ON")
        if not readonly:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        return db
    except sqlite3.Error as error:
        raise ConfigError(f"{database} cannot be opened: {error}") from None


def create(db: sqlite3.Connection, identity: dict[str, Any]) -> dict[str, Any]:
    """Make the tables where there are none. Returns the identity that is recorded: the given one in a new database."""
    db.executescript(_TABLES)
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?), ('identity', ?)", (str(FORMAT), json.dumps(identity)))
    return read_identity(db)


def read_identity(db: sqlite3.Connection) -> dict[str, Any]:
    """Raises ConfigError where the database is not one of ours, or of a later release."""
    try:
        meta: dict[str, str] = dict(db.execute("SELECT key, value FROM meta"))
        if int(meta["format"]) != FORMAT:
            raise ConfigError(f"the state dir has format {meta['format']}; this release of vllm-ttt reads format {FORMAT}")
        return json.loads(meta["identity"])
    except (sqlite3.Error, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"sessions.db is not the database of a state dir: {error!r}") from None


def find(db: sqlite3.Connection, key: SessionKey) -> Row | None:
    """The session, with its newest version."""
    return next(_rows(db, "WHERE s.tenant = ? AND s.name = ?", key), None)


def listing(db: sqlite3.Connection, tenant: str | None, limit: int = -1) -> list[Row]:
    """The sessions of a tenant, or of all; most recently used first."""
    where, values = ("", ()) if tenant is None else ("WHERE s.tenant = ?", (tenant,))
    return list(_rows(db, f"{where} ORDER BY s.last_used DESC LIMIT ?", (*values, limit)))


def count(db: sqlite3.Connection, tenant: str) -> int:
    return db.execute("SELECT count(*) FROM sessions WHERE tenant = ?", (tenant,)).fetchone()[0]


def versions(db: sqlite3.Connection, uid: str) -> list[Version]:
    """Oldest first."""
    return [_version(row) for row in db.execute(f"SELECT {_VERSION} FROM versions v WHERE uid = ? ORDER BY version", (uid,))]


def files(db: sqlite3.Connection) -> dict[str, tuple[str, int, int]]:
    """file -> (uid, version, bytes), of everything that exists."""
    return {file: (uid, n, size) for uid, n, file, size in db.execute("SELECT uid, version, file, bytes FROM versions")}


def total_bytes(db: sqlite3.Connection) -> int:
    return db.execute("SELECT coalesce(sum(bytes), 0) FROM versions").fetchone()[0]


def put(db: sqlite3.Connection, row: Row, keep: int) -> list[str]:
    """Record a session as it is now, and its newest version where that is not recorded yet.

    Returns:
        files that do not exist any more: those of versions beyond the ``keep`` newest.
    """
    db.execute(
        "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (uid) DO UPDATE SET last_used = excluded.last_used, "
        "state = excluded.state",
        (row.uid, *row.key, row.created, row.last_used, json.dumps(row.state)),
    )
    if row.newest is None:
        return []
    v = row.newest
    gone = [f for (f,) in db.execute("SELECT file FROM versions WHERE uid = ? AND version >= ?", (row.uid, v.version))]
    db.execute("DELETE FROM versions WHERE uid = ? AND version >= ?", (row.uid, v.version))
    values = (row.uid, v.version, v.file, v.bytes, v.checksum, v.saved, json.dumps(v.state))
    db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    old = "SELECT version FROM versions WHERE uid = ? ORDER BY version DESC LIMIT -1 OFFSET ?"
    return [*gone, *_delete(db, f"uid = ? AND version IN ({old})", (row.uid, row.uid, keep))]


def remove(db: sqlite3.Connection, uid: str) -> list[str]:
    """Forget a session. Returns its files."""
    gone = _delete(db, "uid = ?", (uid,))
    db.execute("DELETE FROM sessions WHERE uid = ?", (uid,))
    return gone


def back_to(db: sqlite3.Connection, uid: str, version: int) -> list[str]:
    """Make ``version``, which is recorded, the newest again. Returns the files of those after it."""
    return _delete(db, "uid = ? AND version > ?", (uid, version))


def without(db: sqlite3.Connection, uid: str, file: str, fresh: dict[str, Any]) -> Row | None:
    """Forget a version whose file is damaged; the session falls back to the one before, or to the state ``fresh``."""
    db.execute("DELETE FROM versions WHERE uid = ? AND file = ?", (uid, file))
    newest = db.execute("SELECT state FROM versions WHERE uid = ? ORDER BY version DESC LIMIT 1", (uid,)).fetchone()
    state = newest[0] if newest else json.dumps(fresh)
    db.execute("UPDATE sessions SET state = ? WHERE uid = ?", (state, uid))
    return next(_rows(db, "WHERE s.uid = ?", (uid,)), None)


def shrink(db: sqlite3.Connection, excess: int) -> list[str]:
    """Forget the oldest versions that are not their session's newest, until ``excess`` bytes are gone or none is left."""
    old = db.execute(
        "SELECT file, bytes FROM versions v "
        "WHERE version < (SELECT max(version) FROM versions WHERE uid = v.uid) ORDER BY saved"
    )
    gone: list[str] = []
    for file, size in old.fetchall():
        if excess <= 0:
            break
        excess -= size
        gone += _delete(db, "file = ?", (file,))
    return gone


def unused_since(db: sqlite3.Connection, time: float, limit: int = 1000) -> list[Row]:
    return list(_rows(db, "WHERE s.last_used < ? ORDER BY s.last_used LIMIT ?", (time, limit)))


_VERSION = "v.version, v.file, v.bytes, v.checksum, v.saved, v.state"


def _rows(db: sqlite3.Connection, rest: str, values: Any) -> Iterator[Row]:
    newest = "v.uid = s.uid AND v.version = (SELECT max(version) FROM versions WHERE uid = s.uid)"
    query = f"SELECT s.uid, s.tenant, s.name, s.created, s.last_used, s.state, {_VERSION} FROM sessions s"
    query += f" LEFT JOIN versions v ON {newest} {rest}"
    for uid, tenant, name, created, last_used, state, *version in db.execute(query, values):
        saved = None if version[0] is None else _version(version)
        yield Row(uid, SessionKey(tenant, name), created, last_used, json.loads(state), saved)


def _version(row: Any) -> Version:
    return Version(*row[:5], state=json.loads(row[5]))


def _delete(db: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[str]:
    gone = [file for (file,) in db.execute(f"SELECT file FROM versions WHERE {where}", values)]
    db.execute(f"DELETE FROM versions WHERE {where}", values)
    return gone
