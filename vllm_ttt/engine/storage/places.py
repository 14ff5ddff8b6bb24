"""Among how many engines the sessions of a state dir were placed, as each of its shelves says, and whether that holds."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from vllm_ttt import placement
from vllm_ttt.engine.storage import records
from vllm_ttt.errors import ConfigError


def place_among(db: sqlite3.Connection, engines: int) -> None:
    """From now on the shelf is one of so many engines."""
    if _among(db) != engines:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('engines', ?)", (str(engines),))


def moves_on(db: sqlite3.Connection) -> None:
    """What moves to another shelf has left copies in pages of this one, which are to be overwritten."""
    db.execute("INSERT OR REPLACE INTO meta VALUES ('unwiped', '')")


def wiped(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM meta WHERE key = 'unwiped'")


def unwiped(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM meta WHERE key = 'unwiped'").fetchone() is not None


def settled(db: sqlite3.Connection, engines: int) -> bool:
    """Whether nothing is left to do there for a server of so many engines, if it is the only shelf."""
    return _among(db) in (None, engines) and not unwiped(db)


def check(db: sqlite3.Connection, folder: Path, engine: int, engines: int) -> None:
    """Raise ConfigError where the shelf of an engine has been changed since the server began: nobody had its lock while the
    model was loaded."""
    among = _among(db)
    elsewhere = engines > 1 and any(placement.owner(key.wire(), engines) != engine for key in records.keys(db).values())
    if elsewhere or among not in (None, engines):
        raise ConfigError(
            f"the sessions in {folder} were changed while this server loaded its model, by another server or by vllm-ttt "
            "sessions: some are not where their engine looks; start this server again, which places them anew"
        )


def _among(db: sqlite3.Connection) -> int | None:
    """None: nothing was ever placed there."""
    found = db.execute("SELECT value FROM meta WHERE key = 'engines'").fetchone()
    if found is None:
        return 1 if db.execute("SELECT 1 FROM sessions LIMIT 1").fetchone() else None
    return int(found[0])
