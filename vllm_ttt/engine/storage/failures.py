"""What befalls the state dir, as an answer to somebody."""

from __future__ import annotations

import errno
import sqlite3

from vllm_ttt.errors import AGAIN, RequestError

#: Errors of the state dir as a whole: who tries something else there will meet them too.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE}
_NO_ROOM_SQLITE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}


class InDoubt(sqlite3.OperationalError):
    """A transaction failed so late that a kill, before another one is written, may bring it about after all."""


class StoreError(RequestError):
    """Something could not be read (503) or written (507). ``everywhere``: nor could anything else be. ``in_doubt``: it may
    have been written (`InDoubt`), so the files that it names stay, and those that it does not name any more."""

    everywhere = in_doubt = False


class Moved(StoreError):
    """Another server has the session, or may have it: what this one would write of it does not count (409)."""

    def __init__(self, message: str = "another server has this session; ask again", *_: object):
        super().__init__(message, 409, None, AGAIN)


class Locked(StoreError):
    """Another server keeps the database to itself: who can, asks again (503)."""

    def __init__(self, message: str = "another server is writing to the state dir; ask again, or look at its disk", *_: object):
        super().__init__(message, 503, None, AGAIN)


def is_busy(error: Exception) -> bool:
    """Whether somebody else has had the database for as long as was waited."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF == sqlite3.SQLITE_BUSY


def unreadable(error: sqlite3.Error | OSError) -> StoreError:
    """What went wrong in a read, as an answer."""
    why = getattr(error, "strerror", None) or error  # without a path
    return StoreError(f"the state dir cannot be read: {why}; try again, or look at its disk", 503)


def store_error(error: Exception) -> StoreError:
    """What went wrong in a write, as an answer."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, OSError):
        found = StoreError(error.strerror or str(error), 507)
        found.everywhere = error.errno in _NO_ROOM
        return found
    found = StoreError(str(error), 507)
    found.in_doubt = isinstance(error, InDoubt)
    if isinstance(error, sqlite3.Error):
        found.everywhere = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _NO_ROOM_SQLITE
    return found


def answer_of(error: StoreError, message: str) -> RequestError:
    """What is said to who asked for what could not be written: ``message``, or that another server has the session."""
    return error if isinstance(error, Moved) else RequestError(message, 507)
