"""That nothing is left of a session in the state dir: its files, and the bytes of its rows in the database."""

from __future__ import annotations

import mmap
import os
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

from vllm_ttt.engine.storage import database, records
from vllm_ttt.log import logger_of
from vllm_ttt.state_dir import StateDir

logger = logger_of(__name__)

#: Milliseconds to wait for who reads the database: saves wait behind.
_PATIENCE = 2000
#: A shorter name occurs by chance, and says nothing.
_NAME = 8
#: Bytes that are searched before other threads have their turn, and for how many seconds: the engine's is one of them.
_PIECE, _PAUSE = 2**19, 1e-4
#: A name is in a session's row, and in three indexes.
_COPIES = 4


def listed(db: sqlite3.Connection, uid: str) -> list[dict[str, Any]]:
    """The files of a session, oldest first, as its receipt has them."""
    found = records.versions(db, uid)
    return [{"version": v.version, "bytes": v.bytes, "sha256": v.checksum, "digest": v.state.get("digest")} for v in found]


def owe(db: sqlite3.Connection, uid: str) -> None:
    """Part of the transaction that removes a session: it is to be wiped, by whoever comes after a kill if need be."""
    db.execute("INSERT OR IGNORE INTO unwiped VALUES (?)", (bytes.fromhex(uid),))  # not as the text that is searched for


def owed(db: sqlite3.Connection) -> list[str]:
    """The uids of removed sessions that are still to be wiped."""
    query = "SELECT lower(hex(uid)) AS uid FROM unwiped WHERE lower(hex(uid)) NOT IN (SELECT uid FROM sessions)"
    return [uid for (uid,) in db.execute(query)]


def wipe(db: sqlite3.Connection, folder: StateDir, uid: str = "", name: str = "") -> bool:
    """Remove what the removed rows of a session have left in the database's files, and files of it that no row named; and of
    all others that are owed.

    SQLite overwrites what it frees (secure_delete), but may leave a copy where it has moved a row to another page: so the file
    is searched, and where there is one, written anew. So it is for others: their names, to be searched for, are no more.

    Returns:
        whether that is done; False where a reader of the database, or a full disk, is in the way.
    """
    try:
        db.execute(f"PRAGMA busy_timeout = {_PATIENCE}")
        uids = {*owed(db), *filter(None, [uid])}
        for file in [file for one in uids for file in folder.files_of(one)]:  # what a killed server had not recorded yet, too
            file.unlink(missing_ok=True)
        if not _checkpoint(db):
            return False
        if (uids - {uid} or (uid and _left(db, folder, uid, name))) and not renew(db):
            return False
        db.executemany("DELETE FROM unwiped WHERE uid = ?", [(bytes.fromhex(one),) for one in uids])
        return True
    except (sqlite3.Error, OSError) as error:
        logger.error("vllm-ttt: what the database has of a removed session could not be overwritten: %s", error)
        return False
    finally:
        db.execute(f"PRAGMA busy_timeout = {database.PATIENCE}")


def renew(db: sqlite3.Connection) -> bool:
    """Write the database anew, without what removed rows have left in its pages. False where somebody reads the old one."""
    db.execute("VACUUM")
    return _checkpoint(db)


def _checkpoint(db: sqlite3.Connection) -> bool:
    """Bring the write-ahead log into the database, and empty it."""
    return db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


def _left(db: sqlite3.Connection, folder: StateDir, uid: str, name: str) -> bool:
    data = _Pages(folder.opened())
    if next(places(data, uid.encode()), None) is not None:
        return True
    if len(name) < _NAME:
        return False
    found = sum(1 for _ in places(data, name.encode()))
    # Of another key's session of that name, or in a longer name.
    (others,) = db.execute(
        "SELECT coalesce(sum((length(name) - length(replace(name, ?1, ''))) / length(?1)), 0) FROM sessions", (name,)
    ).fetchone()
    return found > _COPIES * others


class _Pages:
    """An open file, as far as `places` needs bytes. Not mapped: Python's map would close a handle of its own."""

    def __init__(self, handle: int):
        self.handle = handle

    def __len__(self) -> int:
        return os.fstat(self.handle).st_size

    def find(self, text: bytes, start: int, end: int) -> int:
        at = os.pread(self.handle, end - start, start).find(text)
        return at if at < 0 else start + at


def places(data: mmap.mmap | _Pages, text: bytes) -> Iterator[int]:
    """Where ``text`` begins. Searched in pieces: Python lets no other thread run while it searches one."""
    for piece in range(0, len(data), _PIECE):
        at, end = piece, min(piece + _PIECE + len(text) - 1, len(data))
        while (at := data.find(text, at, end)) >= 0:
            yield at
            at += 1
        time.sleep(_PAUSE)
