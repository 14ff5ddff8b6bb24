"""SQLite over sessions: the tables, and every statement on them. Each function runs in a transaction.

A session has a row; each of its saved versions has one more, which names its file. The file is there before the row, and the
row goes before the file. Both rows keep the ledger's state in two parts, of which lists read the small one alone.

What a row holds is checked when it is read. A version whose row is damaged does not exist; a session whose row is damaged
falls back to what its newest version says.
"""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_ttt.engine.limits.limits import Allowance
from vllm_ttt.engine.prefix.history import History
from vllm_ttt.errors import ConfigError
from vllm_ttt.state_dir import FORMAT, SECRET_VARIABLE, fingerprint, is_session_file
from vllm_ttt.types import SessionKey

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    uid TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL,
    summary TEXT NOT NULL, detail TEXT NOT NULL, UNIQUE (tenant, name));
CREATE TABLE IF NOT EXISTS versions (
    uid TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE, version INTEGER NOT NULL, file TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL, checksum TEXT NOT NULL, saved REAL NOT NULL, summary TEXT NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (uid, version));
CREATE INDEX IF NOT EXISTS sessions_last_used ON sessions (last_used, tenant, name);
CREATE INDEX IF NOT EXISTS sessions_of_tenant ON sessions (tenant, last_used, name);
CREATE INDEX IF NOT EXISTS versions_saved ON versions (saved);
"""
#: What of a state is large, and no list shows.
_DETAIL = ("losses", "history")
#: What of it holds whichever version the session has.
STANDING = ("frozen", "allowance")
_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,), "tokens_seen": (int,), "tokens_learned": (int,), "tokens_skipped": (dict,), "losses": (list,),
    "frozen": (str, type(None)), "probe_regression": (int, float, type(None)),
}  # fmt: skip
_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Version:
    """A saved version. ``state`` is the ledger's as of that version."""

    version: int
    file: str
    bytes: int
    checksum: str
    saved: float
    state: dict[str, Any]
    #: how its row is damaged; ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A session as it is recorded; ``newest`` is None while nothing of it was saved."""

    uid: str
    key: SessionKey
    created: float
    last_used: float
    state: dict[str, Any]
    newest: Version | None = None
    #: how what is recorded of it is damaged; ""
    problem: str = ""
    #: files of versions, later than ``newest``, whose rows are damaged
    damaged: tuple[str, ...] = ()


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
    """Raises ConfigError where the database is not one of ours, or of another release."""
    try:
        meta: dict[str, str] = dict(db.execute("SELECT key, value FROM meta"))
        if int(meta["format"]) != FORMAT:
            raise ConfigError(f"the state dir has format {meta['format']}; this release of vllm-ttt reads format {FORMAT}")
        return json.loads(meta["identity"])
    except (sqlite3.Error, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"sessions.db is not the database of a state dir: {error!r}") from None


def check_secret(db: sqlite3.Connection, secret: str, folder: Path) -> None:
    """Raise ConfigError where the sessions of API keys were made under another secret: no key would find its own.

    The first secret is remembered; and a new one, where no key has a session.
    """
    ours = fingerprint(secret)
    found = db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchone()
    if found is not None and found[0] != ours:
        (lost,) = db.execute("SELECT count(*) FROM sessions WHERE tenant != '-'").fetchone()
        if lost:
            raise ConfigError(
                f"the state dir {folder} has {lost} sessions of API keys that were made under another secret: no key would "
                f"find its own. Restore that secret ({SECRET_VARIABLE} of the environment, or else the file "
                f"{folder / 'secret'}), or name another state dir"
            )
    db.execute("INSERT OR REPLACE INTO meta VALUES ('secret', ?)", (ours,))


def find(db: sqlite3.Connection, key: SessionKey) -> Row | None:
    """The session, with its newest version that can be read."""
    found = db.execute(f"SELECT {_SESSION} FROM sessions s WHERE s.tenant = ? AND s.name = ?", key).fetchone()
    return None if found is None else _row(db, found)


def named(db: sqlite3.Connection, name: str) -> list[Row]:
    """The sessions of that name, of all tenants."""
    return [_row(db, found) for found in db.execute(f"SELECT {_SESSION} FROM sessions s WHERE s.name = ?", (name,)).fetchall()]


def listing(
    db: sqlite3.Connection, tenant: str | None, limit: int = -1, after: tuple[float, str, str] | None = None
) -> list[Row]:
    """The sessions of a tenant, or of all; most recently used first. Of each state the small part alone.

    Args:
        after: last_used, tenant and name of the last one of the list before.
    """
    where, values = ["1"], []
    if tenant is not None:
        where, values = ["s.tenant = ?"], [tenant]
    if after is not None:
        where, values = [*where, "(s.last_used, s.tenant, s.name) < (?, ?, ?)"], [*values, *after]
    newest = "v.uid = s.uid AND v.version = (SELECT max(version) FROM versions WHERE uid = s.uid)"
    query = f"SELECT {_SUMMARY}, {_VERSION_SUMMARY} FROM sessions s LEFT JOIN versions v ON {newest} "
    query += f"WHERE {' AND '.join(where)} ORDER BY s.last_used DESC, s.tenant DESC, s.name DESC LIMIT ?"
    return [_listed(found) for found in db.execute(query, (*values, limit))]


def count(db: sqlite3.Connection, tenant: str | None) -> int:
    """Sessions of a tenant; None: of all."""
    return db.execute("SELECT count(*) FROM sessions WHERE ?1 IS NULL OR tenant = ?1", (tenant,)).fetchone()[0]


def count_saved(db: sqlite3.Connection) -> int:
    """Sessions of all tenants that have a version."""
    return db.execute("SELECT count(DISTINCT uid) FROM versions").fetchone()[0]


def unsaved(db: sqlite3.Connection) -> list[str]:
    """The uid of each session that has no version."""
    return [uid for (uid,) in db.execute("SELECT uid FROM sessions WHERE uid NOT IN (SELECT uid FROM versions)")]


def versions(db: sqlite3.Connection, uid: str) -> list[Version]:
    """Oldest first; also those whose row is damaged."""
    query = f"SELECT {_VERSION} FROM versions v WHERE uid = ? ORDER BY version"
    return [_version(uid, row) for row in db.execute(query, (uid,))]


def files(db: sqlite3.Connection) -> dict[str, tuple[str, int, int]]:
    """file -> (uid, version, bytes), of everything that exists."""
    query = "SELECT uid, version, file, CAST(bytes AS INTEGER) FROM versions"
    return {file: (uid, n, size) for uid, n, file, size in db.execute(query)}


def total_bytes(db: sqlite3.Connection) -> int:
    return db.execute("SELECT coalesce(sum(bytes), 0) FROM versions").fetchone()[0]


def put(db: sqlite3.Connection, row: Row, keep: int) -> list[str]:
    """Record a session as it is now, and its newest version where that is not recorded yet.

    Returns:
        files that do not exist any more: those of versions beyond the ``keep`` newest.
    """
    db.execute(
        "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uid) DO UPDATE SET last_used = excluded.last_used, "
        "summary = excluded.summary, detail = excluded.detail",
        (row.uid, *row.key, row.created, row.last_used, *_write(row.state)),
    )
    if row.newest is None:
        return []
    v = row.newest
    gone = [f for (f,) in db.execute("SELECT file FROM versions WHERE uid = ? AND version >= ?", (row.uid, v.version))]
    db.execute("DELETE FROM versions WHERE uid = ? AND version >= ?", (row.uid, v.version))
    values = (row.uid, v.version, v.file, v.bytes, v.checksum, v.saved, *_write(v.state))
    db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    old = "SELECT version FROM versions WHERE uid = ? ORDER BY version DESC LIMIT -1 OFFSET ?"
    return [*gone, *_delete(db, f"uid = ? AND version IN ({old})", (row.uid, row.uid, keep))]


def remove(db: sqlite3.Connection, uid: str) -> list[str]:
    """Forget a session. Returns its files."""
    gone = _delete(db, "uid = ?", (uid,))
    db.execute("DELETE FROM sessions WHERE uid = ?", (uid,))
    return gone


def back_to(db: sqlite3.Connection, uid: str, version: int) -> tuple[Version | None, list[str]]:
    """Make a recorded version the newest again.

    Returns:
        the version, and the files of those after it, which are no more; (None, []) where it is not recorded, or not any more.
    """
    found = next((v for v in versions(db, uid) if v.version == version and not v.problem), None)
    return (None, []) if found is None else (found, _delete(db, "uid = ? AND version > ?", (uid, version)))


def without(db: sqlite3.Connection, uid: str, file: str) -> Row | None:
    """Forget a version whose file is damaged; the session falls back to the one before, or to nothing."""
    db.execute("DELETE FROM versions WHERE uid = ? AND file = ?", (uid, file))
    found = db.execute(f"SELECT {_SESSION} FROM sessions s WHERE uid = ?", (uid,)).fetchone()
    if found is None:
        return None
    row = _row(db, found)
    standing = {key: row.state[key] for key in STANDING if key in row.state}
    row = replace(row, state={**(row.newest.state if row.newest else {}), **standing})
    db.execute("UPDATE sessions SET summary = ?, detail = ? WHERE uid = ?", (*_write(row.state), uid))
    return row


def mend(db: sqlite3.Connection, row: Row) -> list[str]:
    """Make the rows of a session what `find` made of them. Returns the files of versions that are no more."""
    for file in row.damaged:
        db.execute("DELETE FROM versions WHERE file = ?", (file,))
    db.execute("DELETE FROM sessions WHERE tenant = ? AND name = ? AND uid IS NOT ?", (*row.key, row.uid))
    put(db, replace(row, newest=None), keep=0)
    db.execute("UPDATE sessions SET created = ? WHERE uid = ?", (row.created, row.uid))
    return list(row.damaged)


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


def follow_clock(db: sqlite3.Connection, ahead: float, now: float) -> None:
    """The clock was set: sessions were last used ``ahead`` seconds later than is recorded, and not after ``now``."""
    db.execute("UPDATE sessions SET last_used = min(last_used + ?, ?)", (ahead, now))


def unused_since(db: sqlite3.Connection, time: float, limit: int) -> list[SessionKey]:
    query = "SELECT tenant, name FROM sessions WHERE last_used < ? ORDER BY last_used LIMIT ?"
    return [SessionKey(*key) for key in db.execute(query, (time, limit))]


# As bytes: a text that is not UTF-8 would be an error of the whole query.
_SUMMARY = "s.uid, s.tenant, s.name, s.created, s.last_used, CAST(s.summary AS BLOB)"
_SESSION = f"{_SUMMARY}, CAST(s.detail AS BLOB)"
_VERSION_SUMMARY = "v.version, v.file, v.bytes, v.checksum, v.saved, CAST(v.summary AS BLOB)"
_VERSION = f"{_VERSION_SUMMARY}, CAST(v.detail AS BLOB)"


def _row(db: sqlite3.Connection, found: Any) -> Row:
    uid, tenant, name, created, last_used, *texts = found
    newest, damaged, problems = None, [], []
    for version in _newest_first(db, uid):
        if not version.problem:
            newest = version
            break
        damaged.append(version.file)
        problems.append(f"version {version.version}: {version.problem}")
    try:
        state = _read(*texts)
        if not (isinstance(created, float) and isinstance(last_used, float) and _UID.fullmatch(uid)):
            raise ValueError("its id or its times")
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(f"the session: {error}")
        state = newest.state if newest else {}
        created, last_used = ((x if isinstance(x, float) else time.time()) for x in (created, last_used))
        if not (isinstance(uid, str) and _UID.fullmatch(uid)):
            uid = secrets.token_hex(16)
    return Row(uid, SessionKey(tenant, name), created, last_used, state, newest, "; ".join(problems), tuple(damaged))


def _newest_first(db: sqlite3.Connection, uid: Any) -> Iterator[Version]:
    for row in db.execute(f"SELECT {_VERSION} FROM versions v WHERE uid = ? ORDER BY version DESC", (uid,)):
        yield _version(uid, row)


def _version(uid: Any, row: Any) -> Version:
    version, file, size, checksum, saved, *texts = row
    try:
        state = _read(*texts)
        kinds = (version, int), (size, int), (checksum, str), (saved, float)
        if not all(isinstance(value, kind) for value, kind in kinds) or state.get("version") != version:
            raise ValueError("its numbers")
        if not is_session_file(file) or not file.split("/")[2].startswith(uid):
            raise ValueError("the name of its file")
        return Version(version, file, size, checksum, saved, state)
    except (ValueError, TypeError, RecursionError) as error:
        return Version(version, file, 0, "", 0.0, {}, f"its row is damaged: {error}")


def _listed(found: Any) -> Row:
    uid, tenant, name, created, last_used, text, *version = found
    newest, problem = None, ""
    if version[0] is not None:
        newest = _version(uid, (*version, b"{}"))
        problem = newest.problem
    try:
        state = _read(text, b"{}")
    except (ValueError, TypeError, RecursionError) as error:
        state, problem = {}, f"its row is damaged: {error}"
    return Row(uid, SessionKey(tenant, name), created, last_used, state, newest, problem)


def _write(state: dict[str, Any]) -> tuple[str, str]:
    """A state as its two texts."""
    summary = {key: value for key, value in state.items() if key not in _DETAIL}
    return json.dumps(summary), json.dumps({key: state[key] for key in _DETAIL if key in state})


def _read(summary: Any, detail: Any) -> dict[str, Any]:
    """The state of two texts. Raises ValueError or TypeError where `Session.from_state` could not take it."""
    state = {**json.loads(summary), **json.loads(detail)}
    for key, kinds in _KINDS.items():
        if key in state and not isinstance(state[key], kinds):
            raise ValueError(f"{key} is {type(state[key]).__name__}")
    numbers = list(state.get("tokens_skipped", {}).values())
    numbers += [number for _, *numbers in state.get("history", ()) for number in numbers]
    if "allowance" in state:
        numbers += state["allowance"]
        Allowance.from_state(state["allowance"])
    if not all(isinstance(number, int | float | None) for number in numbers):
        raise ValueError("a number is none")
    History.from_state(state.get("history", ()))
    return state


def _delete(db: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[str]:
    gone = [file for (file,) in db.execute(f"SELECT file FROM versions WHERE {where}", values)]
    db.execute(f"DELETE FROM versions WHERE {where}", values)
    return gone
