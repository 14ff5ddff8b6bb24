"""The database of a state dir: its connection and tables, and what it says of the whole dir: whose it is, and its key."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_ttt.engine.storage import reserve
from vllm_ttt.engine.storage.failures import InDoubt
from vllm_ttt.errors import ConfigError
from vllm_ttt.state_dir import FORMAT, SECRET_VARIABLE, fingerprint
from vllm_ttt.vault import PLAIN, SealError, Vault

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    uid TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL,
    summary TEXT NOT NULL, detail TEXT NOT NULL, UNIQUE (tenant, name));
CREATE TABLE IF NOT EXISTS versions (
    uid TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE, version INTEGER NOT NULL, file TEXT NOT NULL UNIQUE,
    bytes INTEGER NOT NULL, checksum TEXT NOT NULL, saved REAL NOT NULL, summary TEXT NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (uid, version));
CREATE TABLE IF NOT EXISTS unwiped (uid BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sessions_last_used ON sessions (last_used, tenant, name);
CREATE INDEX IF NOT EXISTS sessions_of_tenant ON sessions (tenant, last_used, name);
CREATE INDEX IF NOT EXISTS versions_saved ON versions (saved);
"""
#: Milliseconds to wait for who writes to the database, or reads it.
PATIENCE = 10_000
#: The same of an engine's thread where other servers write, too: everybody whom it serves waits meanwhile. Seconds for which it
#: then takes the database for unreadable.
BRIEFLY, LOCKED = 100, 1.0


class _Database(sqlite3.Connection):
    vault: Vault = PLAIN


def connect(database: Path, readonly: bool = False, vault: Vault = PLAIN) -> sqlite3.Connection:
    """A connection; raises ConfigError where the file is not a database. ``vault``: what it is sealed with (`check_vault`)."""
    try:
        return reserve.using(database.parent, lambda: _open(database, readonly, vault))
    except sqlite3.Error as error:
        raise ConfigError(f"{database} cannot be opened: {error}") from None


def _open(database: Path, readonly: bool, vault: Vault) -> sqlite3.Connection:
    uri = f"{database.as_uri()}?mode={'ro' if readonly else 'rwc'}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=PATIENCE / 1000, factory=_Database
    )
    try:
        db.vault = vault
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        if not readonly:
            # The index of a write-ahead log is memory of one host. A dir that servers share may be on several.
            journal = "truncate" if (database.parent / "servers").is_dir() else "wal"
            found = db.execute(f"PRAGMA journal_mode = {journal}").fetchone()[0]
            if journal != "wal" and found != journal:
                raise sqlite3.OperationalError(f"its journal cannot be {journal}: somebody reads it")
            db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What cannot be read or written inside, of a state dir that is being opened, is a ConfigError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        message = f"the state dir {folder} cannot be read: {error}; vllm-ttt sessions fsck checks it"
        raise ConfigError(message) from None


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that is done inside, or, where it raises, nothing of it; InDoubt: that is not known."""
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        _commit(db)
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _commit(db: sqlite3.Connection) -> None:
    try:
        db.execute("COMMIT")
    except sqlite3.Error as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        code = getattr(error, "sqlite_errorcode", 0)
        # What could not be written out is not whole, and counts for nothing.
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL) or code == sqlite3.SQLITE_IOERR_WRITE or _settled(db):
            raise
        found = InDoubt(f"{error}; a restart may find it written all the same")
        found.sqlite_errorcode = code
        raise found from None


def _settled(db: sqlite3.Connection) -> bool:
    """After a transaction that failed: whether it is certain that it has not happened.

    All of it may be in the write-ahead log, unsynced (sqlite3WalFrames writes the frames, and syncs them then). SQLite goes on
    without it, and the next transaction is written over it; but until then whoever opens the database after a kill finds it
    there, whole. In a shared state dir, which has no such log, it may have happened at once.
    """
    try:
        if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            return False
        db.execute("INSERT OR REPLACE INTO meta VALUES ('settled', '')")
        return True
    except sqlite3.Error:
        return False


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


def check_secret(db: sqlite3.Connection, secret: str, folder: Path, record: bool) -> None:
    """Raise ConfigError where the sessions of API keys were made under another secret: no key would find its own.

    With ``record``, by a server that has the dir to itself, the first secret is remembered; and a new one, where no key has a
    session. Without, another one than what is remembered is wrong in any case.
    """
    ours = fingerprint(secret)
    found = db.execute("SELECT value FROM meta WHERE key = 'secret'").fetchone()
    if found is not None and found[0] != ours:
        (lost,) = db.execute("SELECT count(*) FROM sessions WHERE tenant != '-'").fetchone()
        if lost or not record:
            what = f"has {lost} sessions of API keys that were made" if lost else "is used"
            raise ConfigError(
                f"the state dir {folder} {what} under another secret: no key would find its own. Restore that secret "
                f"({SECRET_VARIABLE} of the environment, or else the file {folder / 'secret'}), or name another state dir"
            )
    if record and found != (ours,):
        db.execute("INSERT OR REPLACE INTO meta VALUES ('secret', ?)", (ours,))


def has_secret(db: sqlite3.Connection) -> bool:
    """Whether a server has remembered one."""
    return db.execute("SELECT 1 FROM meta WHERE key = 'secret'").fetchone() is not None


def vault_of(db: sqlite3.Connection) -> Vault:
    return db.vault if isinstance(db, _Database) else PLAIN


def check_vault(db: sqlite3.Connection, folder: Path, record: bool) -> None:
    """Raise ConfigError where the state dir is sealed with another key than that of ``db``. With ``record``, by a server that
    has the dir to itself, a new one takes that."""
    vault = vault_of(db)
    found = db.execute("SELECT value FROM meta WHERE key = 'vault'").fetchone()
    if found is None:
        if vault.on and db.execute("SELECT count(*) FROM sessions").fetchone()[0]:
            raise ConfigError(
                f"the state dir {folder} has sessions that are not encrypted, and sessions.key_file names a key; name a new "
                "state dir, or serve this one without a key"
            )
        if vault.on and record:
            db.execute("INSERT INTO meta VALUES ('vault', ?)", (vault.seal(b"vllm-ttt", "vault").hex(),))
        return
    if not vault.on:
        raise ConfigError(f"the state dir {folder} is encrypted: sessions.key_file must name its key (commands: --key-file)")
    try:
        vault.open(bytes.fromhex(found[0]), "vault")
    except (SealError, ValueError):
        message = (
            f"the state dir {folder} is encrypted with another key than that of sessions.key_file; without it nobody reads it"
        )
        raise ConfigError(message) from None


def sealed(db: sqlite3.Connection) -> bool:
    """Whether the state dir is encrypted."""
    return db.execute("SELECT 1 FROM meta WHERE key = 'vault'").fetchone() is not None


def name_audit_log(db: sqlite3.Connection, path: str | None) -> None:
    """Where commands on the state dir note what they do; relative to it, or absolute."""
    db.execute("DELETE FROM meta WHERE key = 'audit' AND value IS NOT ?", (path,))
    if path is not None:
        db.execute("INSERT OR IGNORE INTO meta VALUES ('audit', ?)", (path,))
