"""The state dir as the engine core uses it: reads at once, writes in order on a thread that it never waits for.

What is queued to be written is already what `find` answers. Callbacks run on the engine's thread, in `poll`.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from vllm_ttt.config import TTTConfig
from vllm_ttt.engine import records
from vllm_ttt.engine.identity import compare, identity
from vllm_ttt.engine.records import Row
from vllm_ttt.errors import TTTError
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import SessionKey

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own


@dataclass
class Change:
    """What a write did: files that exist now, with their bytes, and files that do not exist any more."""

    result: Any = None
    added: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


#: What is done in one transaction.
Write = Callable[[sqlite3.Connection], Change]
#: Gets the result of a write, or the error.
Then = Callable[[Any, Exception | None], None]


class StoreError(TTTError):
    """Something could not be written."""


def open_store(vllm_config: Any, config: TTTConfig) -> Store | None:
    """The state dir that the config names, or None. Raises ConfigError as `Store`."""
    sessions = config.sessions
    if sessions.state_dir is None:
        return None
    limit = int(sessions.disk_gib * 2**30)
    return Store(StateDir(sessions.state_dir), identity(vllm_config, config), sessions.keep_versions, limit)


def check_dir(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where `open_store` would: before anything is loaded. Changes nothing in a dir that is in use."""
    if config.sessions.state_dir is None:
        return
    folder = StateDir(config.sessions.state_dir)
    folder.create()
    folder.lock()
    folder.unlock()
    if folder.exists():
        with contextlib.closing(records.connect(folder.database)) as db:
            compare(records.read_identity(db), identity(vllm_config, config), folder.root)


class Store:
    """Raises ConfigError where the dir is in use, is not ours, or belongs to another model or other settings."""

    def __init__(self, folder: StateDir, identity: dict[str, Any], keep: int, limit: int):
        """``keep``: versions kept of each session. ``limit``: bytes that all files may take."""
        self.folder, self.keep, self.limit = folder, keep, limit
        folder.create()
        folder.lock()
        try:
            self.reader = records.connect(folder.database)
            compare(records.create(self.reader, identity), identity, folder.root)
            self._recover()
        except BaseException:
            folder.unlock()
            raise
        self.sizes = {file: size for file, (_, _, size) in records.files(self.reader).items()}
        self.bytes = sum(self.sizes.values())
        #: why the last save found no room; "" once one did, or something was removed
        self.full = ""
        #: rows that `find` answers with while they are being written; None: removed
        self._pending: dict[SessionKey, tuple[int, Row | None]] = {}
        self._number = 0
        self._queue: queue.SimpleQueue[tuple[Write, Future] | None] = queue.SimpleQueue()
        self._done: deque[tuple[Future, Then]] = deque()
        self._thread = threading.Thread(target=self._run, name="ttt-store", daemon=True)
        self._thread.start()

    def find(self, key: SessionKey) -> Row | None:
        """The session as it is, or is about to be, recorded."""
        if key in self._pending:
            return self._pending[key][1]
        return records.find(self.reader, key)

    def count(self, tenant: str) -> int:
        return records.count(self.reader, tenant)

    def put(self, row: Row, then: Then | None = None) -> None:
        """Record a session; with ``row.newest``, also that version. `find` answers with a new version once it is recorded."""
        if row.newest is None:
            known = self.find(row.key)
            newest = known.newest if known else None
            self._overlay(row.key, Row(row.uid, row.key, row.created, row.last_used, row.state, newest))

        def write(db: sqlite3.Connection) -> Change:
            gone = records.put(db, row, self.keep)
            if row.newest is None:
                return Change()
            gone += self._make_room(db, row.newest.file, row.newest.bytes, gone)
            return Change(None, {row.newest.file: row.newest.bytes}, gone)

        self.write(write, then, row.key)

    def back_to(self, row: Row, then: Then) -> None:
        """Make the recorded version ``row.newest`` the newest again."""
        assert row.newest is not None
        version = row.newest.version
        self._overlay(row.key, row)

        def write(db: sqlite3.Connection) -> Change:
            gone = records.back_to(db, row.uid, version)
            records.put(db, Row(row.uid, row.key, row.created, row.last_used, row.state), self.keep)
            return Change(gone=gone)

        self.write(write, then, row.key)

    def remove(self, key: SessionKey, uid: str, then: Then | None = None) -> None:
        self._overlay(key, None)
        self.write(lambda db: Change(gone=records.remove(db, uid)), then, key)

    def write(self, write: Write, then: Then | None = None, key: SessionKey | None = None) -> None:
        """Run ``write`` after everything that was asked for before; then, in `poll`, ``then(result, error)``."""
        future: Future = Future()
        number = self._pending[key][0] if key is not None and key in self._pending else None

        def finish(result: Any, error: Exception | None) -> None:
            if key is not None and number is not None and self._pending.get(key, (None,))[0] == number:
                del self._pending[key]
            if then is not None:
                then(result, error)

        self._done.append((future, finish))
        self._queue.put((write, future))

    @property
    def busy(self) -> bool:
        return bool(self._done)

    def poll(self) -> None:
        """Take in what has been written."""
        while self._done and self._done[0][0].done():
            future, finish = self._done.popleft()
            error = future.exception()
            assert error is None or isinstance(error, Exception)
            if error is not None and not isinstance(error, StoreError):
                logger.error("vllm-ttt: the state dir could not be written: %s", error)
            finish(None if error else future.result(), error)

    def discard(self, file: str) -> None:
        """Remove a file that was never recorded."""
        with contextlib.suppress(OSError):
            self.folder.path(file).unlink()

    def close(self) -> None:
        """Write what is queued, and let others in."""
        self._queue.put(None)
        self._thread.join(timeout=30)
        self.poll()
        self.reader.close()
        self.folder.unlock()

    def _overlay(self, key: SessionKey, row: Row | None) -> None:
        self._number += 1
        self._pending[key] = (self._number, row)

    def _make_room(self, db: sqlite3.Connection, file: str, size: int, gone: list[str]) -> list[str]:
        """Older versions that have to go for a file of ``size`` bytes. Raises StoreError where that is not enough."""
        freed = sum(self.sizes.get(f, 0) for f in gone)
        excess = self.bytes + size - freed - self.limit
        if excess <= 0:
            return []
        old = [f for f in records.shrink(db, excess) if f != file]
        if excess > sum(self.sizes.get(f, 0) for f in old):
            raise StoreError(
                f"the state dir has {self.bytes} of {self.limit} bytes (sessions.disk_gib); delete sessions, or allow more"
            )
        return old

    def _run(self) -> None:
        db = records.connect(self.folder.database)
        while (first := self._queue.get()) is not None:
            self._execute(db, *first)
        db.close()

    def _execute(self, db: sqlite3.Connection, write: Write, future: Future) -> None:
        try:
            db.execute("BEGIN IMMEDIATE")
            change = write(db)
            db.execute("COMMIT")
        except Exception as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            future.set_exception(error if isinstance(error, StoreError) else StoreError(str(error)))
            return
        self.sizes |= change.added
        self.bytes += sum(change.added.values()) - sum(self.sizes.pop(file, 0) for file in change.gone)
        for file in change.gone:
            self.discard(file)
        future.set_result(change.result)

    def _recover(self) -> None:
        """After a stop of any kind: remove what was never recorded, and fall back where a file is gone or cut short."""
        recorded, present = records.files(self.reader), self.folder.files()
        leftovers = [file for file in present if file not in recorded]
        for file in leftovers:
            (self.folder.root / file).unlink(missing_ok=True)
        for left in self.folder.exports.iterdir():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        lost = [file for file, (_, _, size) in recorded.items() if present.get(file) != size]
        for file in lost:
            with self.reader:
                self.reader.execute("BEGIN IMMEDIATE")
                records.without(self.reader, recorded[file][0], file, {})
            self.folder.set_aside(file)
            logger.error("vllm-ttt: %s is gone or was cut short; its session falls back to the version before", file)
        sessions = self.reader.execute("SELECT count(*) FROM sessions").fetchone()[0]
        logger.info(
            "vllm-ttt: state dir %s: %d sessions, %d files; %d leftovers of cut-off saves removed, %d damaged set aside",
            self.folder.root, sessions, len(recorded) - len(lost), len(leftovers), len(lost),
        )  # fmt: skip
