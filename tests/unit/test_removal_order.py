"""What is under way beside a removal, and what was left by others: it holds, and nothing of the session comes back."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from world import IDENTITY, World

from vllm_ttt.engine.storage import database, leases, records
from vllm_ttt.engine.storage.records import Row, Version
from vllm_ttt.engine.storage.store import Change, Store
from vllm_ttt.engine.storage.turns import Turns
from vllm_ttt.errors import ConfigError
from vllm_ttt.sessions.offline import Offline, SessionsError, tenant_of
from vllm_ttt.state_dir import SECRET_VARIABLE, StateDir
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

LAST = SessionKey("-", "patient-0029")


class Opened:
    def __init__(self, folder: Path, **options: Any):
        self.store = Store(StateDir(folder), IDENTITY, 3, 2**30, **options)

    def wait(self, future: Any) -> Any:
        while not future.done():
            self.store.poll()
            time.sleep(0.001)
        return future.result()

    def saved(self, key: SessionKey, uid: str) -> Row:
        file = self.store.folder.new_file(uid)
        self.store.folder.path(file).write_bytes(b"x" * 10)
        state = {"version": 1}
        row = Row(uid, key, 1.0, 1.0, state, Version(1, file, 10, "c" * 64, 1.0, state))
        self.wait(self.store.put(row))
        return row


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    found = Opened(tmp_path / "state")
    yield found
    found.store.close()


def test_what_yields_comes_after_all_that_was_put_before_it() -> None:
    turns = Turns()
    for i in range(40):
        turns.put(("before", i))
    turns.put(("slow", 0), yields=True)
    for i in range(40):
        turns.put(("after", i))
    turns.put(None)
    taken = list(iter(turns.get, None))
    assert taken[:40] == [("before", i) for i in range(40)]
    assert 40 < taken.index(("slow", 0)) <= 40 + 20, "of what comes later some pass it, and not all"


def test_a_removal_overtakes_no_note_of_its_session(opened: Opened) -> None:
    """Thirty sessions that are saved are noted in one round, and the owner of the last one removes it."""
    rows = [opened.saved(SessionKey("-", f"patient-{i:04d}"), f"{i + 1:032x}") for i in range(30)]
    for row in rows:
        opened.store.note(row)
    receipt = opened.wait(opened.store.replace(LAST, rows[-1].uid))
    assert receipt["database_wiped"]
    while opened.store.busy:
        opened.store.poll()
    assert opened.store.find(LAST) is None
    assert opened.store.count() == 29


def test_what_is_written_is_answered_so_whatever_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server has the database to itself just then."""
    opened, uid, total = Opened(tmp_path / "state", shared=True), "ab" * 16, records.total_bytes
    shares = opened.store.leases
    assert shares is not None
    assert opened.store.watch is not None
    member = opened.store.watch.member
    epoch = opened.wait(opened.store.write(lambda db: Change(leases.claim(db, member.id, shares.session(LAST)))))
    assert shares.granted(LAST, epoch)
    row = opened.saved(LAST, uid)
    cut_off = opened.store.folder.new_file(uid)  # by a server that was killed before it recorded it
    for file in (opened.store.folder.path(cut_off), opened.store.folder.sessions / uid[:2] / f".{Path(cut_off).name}.0a1b2c3d"):
        file.write_bytes(b"what LAST has learned")

    def locked(db: sqlite3.Connection) -> int:
        if not db.in_transaction:
            raise sqlite3.OperationalError("database is locked")
        return total(db)

    monkeypatch.setattr(records, "total_bytes", locked)
    receipt = opened.wait(opened.store.replace(LAST, uid))
    assert [file["version"] for file in receipt["files"]] == [1]
    assert (receipt["files_left"], receipt["database_wiped"]) == ([], True)
    assert row.newest is not None
    assert not opened.store.folder.files(), "the one that was recorded, or those that were not"
    opened.store.close()


def test_who_only_looks_writes_no_key_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has no session yet is running, under the secret of its environment and without a key."""
    state, key = tmp_path / "state", tmp_path / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    opened = Opened(state, secret="a" * 64)
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(SessionsError, match="is not encrypted; leave the key out"):
        Offline(state, key_file=key).list()
    with pytest.raises(ConfigError, match=f"Restore that secret \\({SECRET_VARIABLE}"):
        tenant_of(StateDir(state), "an API key")
    assert not (state / "secret").exists()
    monkeypatch.setenv(SECRET_VARIABLE, "b" * 64)
    with pytest.raises(ConfigError, match="another secret"):
        tenant_of(StateDir(state), "an API key")
    assert not database.sealed(opened.store.reader)
    opened.store.close()
    Opened(state, secret="a" * 64).store.close()


def test_a_sealed_name_is_what_a_removal_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm-ttt sessions rm`, as the server's own."""
    key, state, asked = tmp_path / "key", tmp_path / "state", list[str]()
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(32))
    world = World(state, key_file=str(key))
    world.use(LAST.name, 1.0)
    world.save(LAST.name)
    stored = world.store.reader.execute("SELECT name FROM sessions").fetchone()[0]
    world.end()
    assert stored != LAST.name
    monkeypatch.setattr("vllm_ttt.engine.storage.erase.wipe", lambda db, folder, uid, name: bool(asked.append(name) or True))
    Offline(state, key_file=key).remove(LAST.name)
    assert asked == [stored]
