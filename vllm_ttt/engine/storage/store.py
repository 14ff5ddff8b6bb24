"""The state dir as the engine core uses it: reads at once, writes on a thread that it never waits for, in order.

What a session that leaves memory is being recorded as is already what `find` answers. Removals take long, since nothing may be
left of what is removed: other writes pass them. Writes are answered on the engine's thread, in `poll`. Every method raises
StoreError and nothing else: what befalls the state dir is an answer to somebody, never the end.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vllm_ttt import plugin
from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.storage import database, erase, places, records, recovery, reserve
from vllm_ttt.engine.storage.contention import Contention
from vllm_ttt.engine.storage.failures import Moved, StoreError, store_error
from vllm_ttt.engine.storage.identity import compare, identity
from vllm_ttt.engine.storage.records import Row, Version
from vllm_ttt.engine.storage.turns import Turns
from vllm_ttt.engine.storage.watch import Watch
from vllm_ttt.errors import ConfigError
from vllm_ttt.log import logger_of
from vllm_ttt.state_dir import SECRET_VARIABLE, StateDir
from vllm_ttt.types import SessionKey
from vllm_ttt.vault import PLAIN, Vault

logger = logger_of(__name__)


@dataclass
class Change:
    """What a write did: files that exist now, with their bytes, and files that do not exist any more."""

    result: Any = None
    added: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    #: uid and name of a session of which no byte is to be left, "" of those of earlier removals; the result says whether
    erased: tuple[str, str] | None = None


#: What is done in one transaction.
Write = Callable[[sqlite3.Connection], Change]


def open_store(vllm_config: Any, config: TTTConfig) -> Store | None:
    """The state dir that the config names, or None. Raises ConfigError as `Store`."""
    sessions = config.sessions
    if sessions.state_dir is None:
        return None
    limit, secret = int(sessions.disk_gib * 2**30), os.environ.get(SECRET_VARIABLE)
    folder, vault = StateDir(sessions.state_dir), Vault.of(sessions.key_file)
    store = Store(folder, identity(vllm_config, config), sessions.keep_versions, limit, secret, vault, sessions.shared)
    db, engine = store._writer, vllm_config.parallel_config.data_parallel_index  # which nothing is asked of yet, and waits
    try:
        with database.readable(folder.root):
            places.check(db, folder.root, engine, plugin.engines_of(vllm_config))
            reserve.using(folder.root, lambda: database.name_audit_log(db, sessions.audit_log))
    except BaseException:
        store.close()
        raise
    reserve.keep(folder.root)
    return store


class Store:
    """Raises ConfigError where the dir is in use, is not ours, or belongs to another model, settings or secret."""

    def __init__(
        self,
        folder: StateDir,
        identity: dict[str, Any],
        keep: int,
        limit: int,
        secret: str | None = None,
        vault: Vault = PLAIN,
        shared: bool = False,
    ):
        """
        Args:
            keep: versions kept of each session.
            limit: bytes that all files may take.
            secret: what API keys are made tenants with; None: there are none.
            vault: what it is sealed with.
            shared: other servers may use it at the same time; each has its own sessions.
        """
        self.folder, self.identity, self.keep, self.limit, self.vault = folder, identity, keep, limit, vault
        folder.create()
        alone = folder.lock(shared)
        try:
            with database.readable(folder.root):
                if alone:
                    folder.shared(shared)
                self._open(secret, alone)
                #: of a state dir that is shared: who has which session
                self.watch = reserve.using(folder.root, lambda: Watch(folder, vault, alone)) if shared else None
                if shared:
                    self.reader.execute(f"PRAGMA busy_timeout = {database.BRIEFLY}")
                if shared and alone:
                    folder.share()
                reserve.keep(folder.root)
                owed = erase.owed(self.reader)
                self.bytes = records.total_bytes(self.reader)
                #: of each file, where no other server writes and removes some
                self.sizes = {} if shared else {f: size for f, (_, _, size) in records.files(self.reader).items()}
                self._writer = database.connect(folder.database, vault=vault)
        except BaseException:
            folder.unlock()
            raise
        self.leases = self.watch.leases if self.watch is not None else None
        #: why the last write found no room; "" once one did, or something was removed
        self.full = ""
        self._totals: tuple[int, list[str]] = (0, [])
        #: with other servers that write
        self.contention = Contention(shared)
        #: the last error that was logged, until something could be written
        self._said = ""
        #: rows that `find` answers with while they are being written
        self._pending: dict[SessionKey, tuple[int, Row]] = {}
        self._number = 0
        #: sessions whose damaged rows are being mended
        self._mending: set[str] = set()
        self._turns = Turns()
        #: of writes, and of those that let others pass, in order: what the thread says, what the engine is told, whether it
        #: makes room
        self._asked: tuple[deque[tuple[Future, Future, bool]], ...] = deque(), deque()
        self._thread = threading.Thread(target=self._run, name="ttt-store", daemon=True)
        self._thread.start()
        if owed:
            self.write(lambda _: Change({}, erased=("", "")), frees=True, yields=True)

    # Reads, on the engine's thread: of one session, or counts.

    def find(self, key: SessionKey) -> Row | None:
        """The session as it is, or is about to be, recorded. What of it is damaged is logged and mended."""
        if key in self._pending:
            return self._pending[key][1]
        with self.contention.reading():
            row = records.find(self.reader, key)
        if row is not None and row.problem and (self.leases is None or self.leases.holds(key)):
            self._mend(row)
        return row

    def noted(self, tenant: str | None) -> list[Row]:
        """Sessions of a tenant, or of all, that have left memory and are about to be recorded."""
        return [row for _, row in self._pending.values() if tenant in (None, row.key.tenant)]

    def versions(self, uid: str) -> list[int]:
        """The recorded versions of a session, oldest first."""
        with self.contention.reading():
            return [v.version for v in records.versions(self.reader, uid) if not v.problem]

    def version(self, uid: str, version: int) -> Version | None:
        """That version of a session; None where it is not recorded, or not any more."""
        with self.contention.reading():
            return next((v for v in records.versions(self.reader, uid) if v.version == version and not v.problem), None)

    def count(self, tenant: str | None = None) -> int:
        """Sessions of a tenant; without one, of all."""
        with self.contention.reading():
            return records.count(self.reader, tenant)

    def totals(self) -> tuple[int, list[str]]:
        """Sessions that have a version; the uids of the others. Where that cannot be read: as it was when it last could."""
        with contextlib.suppress(StoreError), self.contention.reading():
            self._totals = records.count_saved(self.reader), records.unsaved(self.reader)
        return self._totals

    # Writes.

    def put(self, row: Row) -> Future:
        """Record a session, and its version ``row.newest``; and ``row.good``, where that is new."""
        added = {v.file: v.bytes for v in (row.newest, row.good) if v is not None}

        def write(db: sqlite3.Connection) -> Change:
            if self.leases is not None and not all(self.folder.path(file).exists() for file in added):
                raise StoreError("its file was taken for a leftover, and removed", 507)
            gone = records.put(db, row, self.keep)
            gone += self._make_room(db, added, gone)
            return Change(None, added, gone)

        return self.write(write, whose=row.key)

    def note(self, row: Row) -> None:
        """Record what is known of a session that leaves memory, whose newest version, ``row.newest``, is recorded already."""
        self._number += 1
        number = self._number
        self._pending[row.key] = (number, row)

        def done(_: Future) -> None:
            if self._pending.get(row.key, (None,))[0] == number:
                del self._pending[row.key]

        self.record(row).add_done_callback(done)

    def record(self, row: Row) -> Future:
        """Record what is known of a session, but for its versions."""
        return self.write(lambda db: Change(gone=records.put(db, replace(row, newest=None), self.keep)), whose=row.key)

    def replace(self, key: SessionKey, uid: str, row: Row | None = None) -> Future:
        """Forget the session ``uid``; with a row, record another one in its place.

        Resolves to ``{"files": [...], "files_left": files that could not be removed yet, "database_wiped": bool}``.
        """

        def write(db: sqlite3.Connection) -> Change:
            name, files = records.name_of(db, uid), erase.listed(db, uid)
            gone = records.remove(db, uid)
            erase.owe(db, uid)
            if row is not None:
                records.put(db, row, self.keep)
            return Change({"files": files}, gone=gone, erased=(uid, name))

        return self.write(write, whose=key, frees=True, yields=True)

    def back_to(self, row: Row, version: int, standing: dict[str, Any]) -> Future:
        """Make a recorded version of a session the newest again. Resolves to it, or to None where it is not recorded.

        Args:
            standing: what of its state holds whatever the version.
        """

        def write(db: sqlite3.Connection) -> Change:
            found, gone = records.back_to(db, row.uid, version)
            if found is not None:
                records.put(db, replace(row, state={**found.state, **standing}, newest=None), self.keep)
            return Change(found, gone=gone)

        return self.write(write, whose=row.key, frees=True)

    def write(
        self, write: Write, whose: SessionKey | None = None, frees: bool = False, yields: bool = False, waits: bool = True
    ) -> Future:
        """Run ``write`` after everything that was asked for before. Resolves in `poll`, to its result or a StoreError.

        Args:
            whose: of that session; where the dir is shared it is written if this server has the session, else it is Moved.
            frees: it makes room, and may use what is kept for that where the disk is full.
            yields: it takes long: what is asked for later, of other sessions, may be done before.
            waits: for another server that writes; one that keeps the database to itself makes others `Locked` soon.
        """
        if self.leases is not None and whose is not None:
            write = self.leases.fenced(whose, write)
        written: Future = Future()
        answer: Future = Future()
        self._asked[yields].append((written, answer, frees))
        self._turns.put((write, frees, written, waits), yields)
        return answer

    @property
    def busy(self) -> bool:
        return any(self._asked)

    @property
    def unwritten(self) -> list[Future]:
        """What is still to be written, or to be answered."""
        return [written for asked in self._asked for written, _, _ in asked]

    def poll(self) -> None:
        """Take in what has been written."""
        while asked := next((asked for asked in self._asked if asked and asked[0][0].done()), None):
            written, answer, frees = asked.popleft()
            if (error := written.exception()) is not None:
                assert isinstance(error, StoreError)
                if not isinstance(error, Moved):
                    self.failed(error)
                answer.set_exception(error)
                continue
            change: Change = written.result()
            self._said = ""
            if frees or change.added:
                self.full = ""
            answer.set_result(change.result)

    def failed(self, error: StoreError) -> None:
        """Something could not be written: say so, once for each reason in a row."""
        if error.message != self._said:
            logger.error("vllm-ttt: the state dir could not be written, sessions stay in memory as they are: %s", error)
            self._said = error.message
        if error.everywhere:
            self.full = error.message

    def discard(self, file: str) -> None:
        """Remove a file that is not recorded, or not any more. One that is left is removed at the next start."""
        with contextlib.suppress(OSError, ValueError):
            self.folder.path(file).unlink()

    def close(self) -> None:
        """Write what is queued, and let others in."""
        self._turns.put(None)
        self._thread.join(timeout=30)
        self.poll()
        if self.watch is not None:
            self.watch.leave()
        self.reader.close()
        reserve.keep(self.folder.root)
        self.folder.unlock()

    def _open(self, secret: str | None, alone: bool) -> None:
        """Open the database, and see whether it is ours, and what a stop of any kind has left."""
        folder = self.folder
        if not folder.exists() and (orphans := len(folder.files())):
            raise ConfigError(
                f"the state dir {folder.root} has {orphans} files of sessions and no sessions.db, which says whose they "
                "are; restore it from a backup, or remove the folder sessions"
            )
        self.reader = db = database.connect(folder.database, vault=self.vault)

        def take_up() -> None:
            compare(database.create(db, self.identity), self.identity, folder.root)
            database.check_vault(db, folder.root, record=alone)
            if secret:
                database.check_secret(db, secret, folder.root, record=alone)
            (recovery.recover if alone else recovery.sweep)(db, folder)

        reserve.using(folder.root, take_up)

    def _mend(self, row: Row) -> None:
        if row.uid in self._mending:
            return
        self._mending.add(row.uid)
        logger.error(
            "vllm-ttt: what is recorded of session %s is damaged (%s); it goes on from %s", row.key.wire(), row.problem,
            f"version {row.newest.version}" if row.newest else "nothing",
        )  # fmt: skip

        def write(db: sqlite3.Connection) -> Change:
            gone = records.mend(db, row)
            for file in gone:
                self.folder.set_aside(file)
            return Change(gone=gone)

        self.write(write, whose=row.key).add_done_callback(lambda _: self._mending.discard(row.uid))

    def _make_room(self, db: sqlite3.Connection, added: dict[str, int], gone: list[str]) -> list[str]:
        """Older versions that have to go for files of such sizes. Raises StoreError where that is not enough."""

        def excess(gone: list[str]) -> int:
            if self.leases is not None:  # others write too; the file is recorded, and what is gone is not
                return records.total_bytes(db) - self.limit
            return self.bytes + sum(added.values()) - sum(self.sizes.get(f, 0) for f in gone) - self.limit

        if (too_much := excess(gone)) <= 0:
            return []
        old = records.shrink(db, too_much)
        if excess([*gone, *old]) > 0:
            error = StoreError(
                f"the state dir has {self.bytes} of {self.limit} bytes (sessions.disk_gib); delete sessions, or allow more", 507
            )
            error.everywhere = True
            raise error
        return old

    def _run(self) -> None:
        db = self._writer
        while (first := self._turns.get()) is not None:
            write, frees, future, waits = first
            try:
                execute = partial(self._execute, db, write, waits)
                result = reserve.using(self.folder.root, execute) if frees else execute()
                if frees:
                    reserve.keep(self.folder.root)
                future.set_result(result)
            except Exception as error:
                future.set_exception(store_error(error))
        db.close()

    def _execute(self, db: sqlite3.Connection, write: Write, waits: bool) -> Change:
        def written() -> tuple[Change, int | None]:
            return write(db), None if self.leases is None else records.total_bytes(db)

        change, total = self.contention.transact(db, written, waits)
        # It is written: nothing that follows may fail.
        if total is None:
            self.sizes |= change.added
            self.bytes += sum(change.added.values()) - sum(self.sizes.pop(file, 0) for file in change.gone)
        else:
            self.bytes = total
        for file in change.gone:
            self.discard(file)
        if change.erased is not None:
            left = [file for file in change.gone if os.path.lexists(self.folder.root / file)]
            change.result |= {"files_left": left, "database_wiped": erase.wipe(db, self.folder, *change.erased)}
        return change
