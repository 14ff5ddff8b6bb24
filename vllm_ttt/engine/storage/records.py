"""SQLite over sessions: every statement on the tables (database.py). Each function runs in a transaction.

A session has a row; each of its saved versions has one more, which names its file. The file is there before the row, and the
row goes before the file. Both rows keep the ledger's state in two parts, of which lists read the small one alone.

What a row holds is checked when it is read. A version whose row is damaged does not exist; a session whose row is damaged
falls back to what its newest version says.

Where the state dir has a key (vault.py), states and names are sealed. Tenants, times, sizes, numbers, names of files are not.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vllm_ttt.engine.limits.limits import Allowance
from vllm_ttt.engine.prefix.history import History
from vllm_ttt.engine.storage.database import vault_of
from vllm_ttt.state_dir import is_session_file
from vllm_ttt.types import SessionKey
from vllm_ttt.vault import SealError

#: What of a state is large, and no list shows.
_DETAIL = ("losses", "history")
#: What of it holds whichever version the session has.
STANDING = ("frozen", "allowance")
_KINDS: dict[str, tuple[type, ...]] = {
    "version": (int,), "tokens_seen": (int,), "tokens_learned": (int,), "tokens_skipped": (dict,), "losses": (list,),
    "requests": (int,), "digest": (str,), "good": (list,),
    "frozen": (str, type(None)), "model": (str, type(None)), "probe_regression": (int, float, type(None)),
}  # fmt: skip
_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Version:
    """A saved version. ``state`` is the ledger's as of that version. ``good`` in it: number, file and checksum of the last
    version before it that the guard found good, which is kept while this is the newest."""

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
    #: to be recorded with it: the last version before it that the guard found good, where that is not recorded yet
    good: Version | None = None


def find(db: sqlite3.Connection, key: SessionKey) -> Row | None:
    """The session, with its newest version that can be read."""
    found = db.execute(f"SELECT {_SESSION} FROM sessions s WHERE s.tenant = ? AND s.name = ?", _stored(db, key)).fetchone()
    return None if found is None else _row(db, found)


def named(db: sqlite3.Connection, name: str) -> list[Row]:
    """The sessions of that name, of all tenants."""
    query, stored = f"SELECT {_SESSION} FROM sessions s WHERE s.name = ?", vault_of(db).name(name)
    return [_row(db, found) for found in db.execute(query, (stored,)).fetchall()]


def listing(
    db: sqlite3.Connection, tenant: str | None, limit: int = -1, after: tuple[float, str, str] | None = None
) -> list[Row]:
    """The sessions of a tenant, or of all; most recently used first. Of each state the small part alone.

    Args:
        after: last_used, tenant and name, as it is stored, of the last one of the list before.
    """
    where, values = ["1"], []
    if tenant is not None:
        where, values = ["s.tenant = ?"], [tenant]
    if after is not None:
        where, values = [*where, "(s.last_used, s.tenant, s.name) < (?, ?, ?)"], [*values, *after]
    newest = "v.uid = s.uid AND v.version = (SELECT max(version) FROM versions WHERE uid = s.uid)"
    query = f"SELECT {_SUMMARY}, {_VERSION_SUMMARY} FROM sessions s LEFT JOIN versions v ON {newest} "
    query += f"WHERE {' AND '.join(where)} ORDER BY s.last_used DESC, s.tenant DESC, s.name DESC LIMIT ?"
    return [_listed(db, found) for found in db.execute(query, (*values, limit))]


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
    return [_version(db, uid, row) for row in db.execute(query, (uid,))]


def files(db: sqlite3.Connection) -> dict[str, tuple[str, int, int]]:
    """file -> (uid, version, bytes), of everything that exists."""
    query = "SELECT uid, version, file, CAST(bytes AS INTEGER) FROM versions"
    return {file: (uid, n, size) for uid, n, file, size in db.execute(query)}


def total_bytes(db: sqlite3.Connection) -> int:
    return db.execute("SELECT coalesce(sum(bytes), 0) FROM versions").fetchone()[0]


def put(db: sqlite3.Connection, row: Row, keep: int) -> list[str]:
    """Record a session as it is now, and its newest version where that is not recorded yet.

    Returns:
        files that do not exist any more: those of versions beyond the ``keep`` newest, but for the last good one.
    """
    db.execute(
        "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uid) DO UPDATE SET last_used = excluded.last_used, "
        "summary = excluded.summary, detail = excluded.detail",
        (row.uid, *_stored(db, row.key), row.created, row.last_used, *_write(db, row.uid, row.state)),
    )
    if row.newest is None:
        return []
    v = row.newest
    gone = _delete(db, "uid = ? AND version >= ?", (row.uid, v.version))
    if row.good is not None:
        gone += _delete(db, "uid = ? AND version = ?", (row.uid, row.good.version))
        _insert(db, row.uid, row.good)
    _insert(db, row.uid, v)
    old = "SELECT version FROM versions WHERE uid = ? ORDER BY version DESC LIMIT -1 OFFSET ?"
    where = f"uid = ? AND file IS NOT ? AND version IN ({old})"
    return [*gone, *_delete(db, where, (row.uid, _good_file(v), row.uid, keep))]


def _insert(db: sqlite3.Connection, uid: str, v: Version) -> None:
    values = (uid, v.version, v.file, v.bytes, v.checksum, v.saved, *_write(db, f"{uid}/{v.version}", v.state))
    db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)


def _good_file(v: Version) -> str | None:
    return v.state["good"][1] if "good" in v.state else None


def name_of(db: sqlite3.Connection, uid: str) -> str:
    """Its name; "" where it has no row."""
    found = db.execute("SELECT name FROM sessions WHERE uid = ?", (uid,)).fetchone()
    return found[0] if found else ""


def remove(db: sqlite3.Connection, uid: str) -> list[str]:
    """Forget a session. Returns its files."""
    gone = _delete(db, "uid = ?", (uid,))
    db.execute("DELETE FROM sessions WHERE uid = ?", (uid,))
    return gone


def move(db: sqlite3.Connection, tenant: str, to: str) -> list[Row]:
    """Make all sessions of a tenant another's. Raises ValueError, with their names, where both have some of one name."""
    rows = listing(db, tenant)
    if taken := [row.key.name for row in rows if find(db, SessionKey(to, row.key.name)) is not None]:
        raise ValueError(", ".join(sorted(taken)))
    db.execute("UPDATE sessions SET tenant = ? WHERE tenant = ?", (to, tenant))
    return rows


def keys(db: sqlite3.Connection) -> dict[str, SessionKey]:
    """uid -> key, of all sessions."""
    return {
        uid: SessionKey(tenant, _plain(db, name)) for uid, tenant, name in db.execute("SELECT uid, tenant, name FROM sessions")
    }


def carry(source: sqlite3.Connection, target: sqlite3.Connection, uid: str) -> bool:
    """Record a session of one database in another of the same key, as it is; the files of its versions are there already.

    Returns:
        whether it is recorded there now: one of that uid that was used later stays what it is.
    Raises:
        ValueError: another session of its name is recorded there.
    """
    (row,) = source.execute("SELECT * FROM sessions WHERE uid = ?", (uid,)).fetchall()
    _, tenant, name, _, last_used, *_ = row
    taken = target.execute("SELECT uid, last_used FROM sessions WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    if taken is not None:
        if taken[0] != uid:
            raise ValueError(_plain(target, name))
        if taken[1] >= last_used:
            return False
        target.execute("DELETE FROM sessions WHERE uid = ?", (uid,))
    target.execute(f"INSERT INTO sessions VALUES ({', '.join('?' * len(row))})", row)
    for version in source.execute("SELECT * FROM versions WHERE uid = ?", (uid,)):
        target.execute(f"INSERT INTO versions VALUES ({', '.join('?' * len(version))})", version)
    return True


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
    db.execute("UPDATE sessions SET summary = ?, detail = ? WHERE uid = ?", (*_write(db, uid, row.state), uid))
    return row


def mend(db: sqlite3.Connection, row: Row) -> list[str]:
    """Make the rows of a session what `find` made of them. Returns the files of versions that are no more."""
    for file in row.damaged:
        db.execute("DELETE FROM versions WHERE file = ?", (file,))
    db.execute("DELETE FROM sessions WHERE tenant = ? AND name = ? AND uid IS NOT ?", (*_stored(db, row.key), row.uid))
    put(db, replace(row, newest=None), keep=0)
    db.execute("UPDATE sessions SET created = ? WHERE uid = ?", (row.created, row.uid))
    return list(row.damaged)


def shrink(db: sqlite3.Connection, excess: int) -> list[str]:
    """Forget the oldest versions that are not their session's newest, until ``excess`` bytes are gone or none is left. The last
    that the guard found good go after all others."""
    newest = "version = (SELECT max(version) FROM versions WHERE uid = v.uid)"
    old = db.execute(f"SELECT uid, file, bytes FROM versions v WHERE NOT {newest} ORDER BY saved").fetchall()
    good: dict[str, str | None] = {}
    last: list[tuple[str, str, int]] = []
    gone: list[str] = []
    for uid, file, size in itertools.chain(old, last):
        if excess <= 0:
            break
        if uid not in good:
            good[uid] = _good_file(next(_newest_first(db, uid)))
        if file == good[uid]:
            last.append((uid, file, size))
            good[uid] = None  # the next time it goes
            continue
        excess -= size
        gone += _delete(db, "file = ?", (file,))
    return gone


def follow_clock(db: sqlite3.Connection, ahead: float, now: float) -> None:
    """The clock was set: sessions were last used ``ahead`` seconds later than is recorded, and not after ``now``."""
    db.execute("UPDATE sessions SET last_used = min(last_used + ?, ?)", (ahead, now))


def unused_since(db: sqlite3.Connection, time: float, limit: int) -> list[SessionKey]:
    query = "SELECT tenant, name FROM sessions WHERE last_used < ? ORDER BY last_used LIMIT ?"
    return [SessionKey(tenant, _plain(db, name)) for tenant, name in db.execute(query, (time, limit))]


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
        state = _read(db, uid, *texts)
        if not (isinstance(created, float) and isinstance(last_used, float) and _UID.fullmatch(uid)):
            raise ValueError("its id or its times")
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(f"the session: {error}")
        state = newest.state if newest else {}
        created, last_used = ((x if isinstance(x, float) else time.time()) for x in (created, last_used))
        if not (isinstance(uid, str) and _UID.fullmatch(uid)):
            uid = secrets.token_hex(16)
    key = SessionKey(tenant, _plain(db, name))
    return Row(uid, key, created, last_used, state, newest, "; ".join(problems), tuple(damaged))


def _newest_first(db: sqlite3.Connection, uid: Any) -> Iterator[Version]:
    for row in db.execute(f"SELECT {_VERSION} FROM versions v WHERE uid = ? ORDER BY version DESC", (uid,)):
        yield _version(db, uid, row)


def _version(db: sqlite3.Connection, uid: Any, row: Any) -> Version:
    version, file, size, checksum, saved, *texts = row
    try:
        state = _read(db, f"{uid}/{version}", *texts)
        kinds = (version, int), (size, int), (checksum, str), (saved, float)
        if not all(isinstance(value, kind) for value, kind in kinds) or state.get("version") != version:
            raise ValueError("its numbers")
        _, good, _ = state.get("good", (0, file, ""))
        if not all(is_session_file(x) and x.split("/")[2].startswith(uid) for x in (file, good)):
            raise ValueError("the name of its file")
        return Version(version, file, size, checksum, saved, state)
    except (ValueError, TypeError, RecursionError) as error:
        return Version(version, file, 0, "", 0.0, {}, f"its row is damaged: {error}")


def _listed(db: sqlite3.Connection, found: Any) -> Row:
    uid, tenant, name, created, last_used, text, *version = found
    newest, problem = None, ""
    if version[0] is not None:
        newest = _version(db, uid, (*version, None))
        problem = newest.problem
    try:
        state = _read(db, uid, text, None)
    except (ValueError, TypeError, RecursionError) as error:
        state, problem = {}, f"its row is damaged: {error}"
    return Row(uid, SessionKey(tenant, _plain(db, name)), created, last_used, state, newest, problem)


def _stored(db: sqlite3.Connection, key: SessionKey) -> tuple[str, str]:
    return key.tenant, vault_of(db).name(key.name)


def _plain(db: sqlite3.Connection, stored: str) -> str:
    """The name that is stored; one that does not open is what it is."""
    try:
        return vault_of(db).plain_name(stored)
    except SealError:
        return stored


def _write(db: sqlite3.Connection, whose: str, state: dict[str, Any]) -> tuple[str | bytes, str | bytes]:
    """A state as its two texts, or sealed."""
    summary = json.dumps({key: value for key, value in state.items() if key not in _DETAIL})
    detail = json.dumps({key: state[key] for key in _DETAIL if key in state})
    if not (vault := vault_of(db)).on:
        return summary, detail
    return vault.seal(summary.encode(), f"{whose} summary"), vault.seal(detail.encode(), f"{whose} detail")


def _read(db: sqlite3.Connection, whose: str, summary: Any, detail: Any) -> dict[str, Any]:
    """The state of what `_write` has returned; ``detail`` None: without it. Raises ValueError or TypeError where
    `Session.from_state` could not take it."""
    vault, state = vault_of(db), {}
    for name, data in (("summary", summary), ("detail", detail)):
        if data is not None:
            try:
                state = {**state, **json.loads(vault.open(data, f"{whose} {name}"))}  # nothing but an object
            except SealError as error:
                raise ValueError(str(error)) from None
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
