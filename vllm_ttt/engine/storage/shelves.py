"""Brings each session to the shelf of its engine, where a server starts with another number of engines than the one before.

No engine runs meanwhile. A session is linked and recorded where it goes before it is removed where it was: a kill in between
leaves it on both shelves, and the next start goes on. An engine that opens its shelf sees whether it was changed since
(places.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from vllm_ttt import placement
from vllm_ttt.engine.storage import database, erase, places, records
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import ConfigError
from vllm_ttt.log import logger_of
from vllm_ttt.state_dir import StateDir, is_session_file

logger = logger_of(__name__)

#: Sessions that are moved in one transaction.
_AT_ONCE = 1024


def settle(root: StateDir, engines: int, opened: Callable[[StateDir], Store]) -> int:
    """Move every session of a state dir to its shelf. Returns how many were moved.

    Args:
        root: the whole dir, which is also the first engine's shelf.
        opened: opens a shelf, as its engine would: leftovers are removed, and nobody else is in.
    Raises:
        ConfigError: a shelf cannot be used, or two shelves have a session of one name. Nothing is lost then.
    """
    moved = 0
    with contextlib.ExitStack() as closing:
        stores: dict[int, Store] = {}

        def shelf(engine: int) -> Store:
            if engine not in stores:
                stores[engine] = opened(root.shelf(engine))
                closing.callback(stores[engine].close)
            return stores[engine]

        try:
            for engine in root.shelves():  # all locks, before anything is changed
                if root.shelf(engine).exists():  # else nothing was ever kept there
                    shelf(engine)
            _note(stores, engines)
            for engine, source in sorted(stores.items()):
                wrong: dict[int, list[str]] = defaultdict(list)
                for uid, key in records.keys(source.reader).items():
                    if (right := placement.owner(key.wire(), engines)) != engine:
                        wrong[right].append(uid)
                for right, uids in wrong.items():
                    _link_all(source, shelf(right), uids)
                    for at in range(0, len(uids), _AT_ONCE):
                        _move(source, shelf(right), uids[at : at + _AT_ONCE])
                    moved += len(uids)
            _note(stores, engines)  # shelves that are new, too
            for store in stores.values():
                if places.unwiped(store.reader):
                    _wipe(store.reader)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"the sessions of {root.root} cannot be placed among {engines} engines: {error}") from None
    for engine in root.shelves():
        if engine >= engines:
            _vacate(root.shelf(engine))
    if moved:
        logger.info("vllm-ttt: state dir %s: %d sessions moved, each to its engine of %d", root.root, moved, engines)
    return moved


def _note(stores: dict[int, Store], engines: int) -> None:
    for store in stores.values():
        places.place_among(store.reader, engines)


def _link_all(source: Store, target: Store, uids: list[str]) -> None:
    """Their files are on both shelves then, whatever happens to the machine."""
    wanted, folders = set(uids), set[Path]()
    for file, (uid, _, _) in records.files(source.reader).items():
        if uid in wanted and is_session_file(file):
            folders.add(_link(source.folder.path(file), target.folder.path(file)))
    for folder in (*folders, target.folder.sessions):
        _sync(folder)


def _move(source: Store, target: Store, uids: list[str]) -> None:
    """Record sessions whose files are there already on another shelf, and remove them from their own."""
    with database.transaction(target.reader):
        for uid in uids:
            try:
                records.carry(source.reader, target.reader, uid)
            except ValueError as error:
                raise ConfigError(
                    f"{source.folder.root} and {target.folder.root} both have a session {error}, and one engine would have "
                    "both; nothing of either was lost. Keep one: vllm-ttt sessions rm FOLDER NAME, with the other's folder"
                ) from None
    moved = set(uids)
    for aside in source.folder.damaged.iterdir():  # they go when their session is removed, which is there from now on
        if aside.name.partition("-")[0] in moved:
            aside.rename(target.folder.damaged / aside.name)
    with database.transaction(source.reader):
        places.moves_on(source.reader)
        gone = [file for uid in uids for file in records.remove(source.reader, uid)]
    for file in gone:
        source.discard(file)


def _link(source: Path, target: Path) -> Path:
    """One file under two names, or a copy of it where the file system has no links. Returns the folder of ``target``."""
    target.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # a move that was cut off; a file that was gone before
        try:
            os.link(source, target)
        except PermissionError:
            shutil.copyfile(source, target)
            _sync(target)
    return target.parent


def _wipe(db: sqlite3.Connection) -> None:
    """What has moved on leaves nothing behind: when it is removed there, nothing is left here. Else the next start tries.

    It is not owed by its uid, as what is removed is (`erase.owe`): under that it may come back to this shelf.
    """
    try:
        if not erase.renew(db):
            raise sqlite3.OperationalError("somebody reads it")
        places.wiped(db)
    except sqlite3.Error as error:
        logger.error("vllm-ttt: what a database has of sessions that have moved could not be overwritten: %s", error)


def _vacate(folder: StateDir) -> None:
    """The shelf is no engine's any more: its database goes, if nothing is in it, and nobody reads it. Its audit log stays."""
    folder.lock()
    try:
        with contextlib.closing(database.connect(folder.database)) as db:
            vacant = not records.count(db, None) and not folder.files()
        if vacant and not Path(f"{folder.database}-wal").exists():
            folder.database.unlink()
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"{folder.root} is no engine's any more, and cannot be cleared: {error}") from None
    finally:
        folder.unlock()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
