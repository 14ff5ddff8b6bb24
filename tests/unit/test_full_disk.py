"""A disk that is full to the last byte: sessions go on from memory, and whoever is told that there is no room can make some."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_tiers import files
from typer.testing import CliRunner
from world import IDENTITY, World

from vllm_ttt import plugin
from vllm_ttt.cli import app
from vllm_ttt.config import SessionsConfig, TTTConfig
from vllm_ttt.engine.storage import checks, database
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.state_dir import SECRET_VARIABLE, StateDir
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while filler.write(bytes(size)):
                    pass


def test_a_real_disk_that_is_full(small_disk: Path) -> None:
    """ENOSPC from the file system. What was on the disk stays, and the next save succeeds when there is room."""
    world = World(small_disk / "state", limit=4)
    world.use("a", 1.0)
    assert world.save("a").version == 1
    fill(small_disk)
    session = world.use("a", 2.0)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"No space left|disk is full|disk I/O"):
            world.save("a")
    assert world.value("a") == 3.0, "it is served from memory"
    assert session.saved is not None
    assert session.saved.version == 1
    assert session.error is not None
    (small_disk / "filler").unlink()
    assert world.save("a").version == 2
    assert session.error is None
    world.end()
    again = World(small_disk / "state")
    assert again.value("a") == 3.0
    again.end()
    assert Offline(small_disk / "state").fsck()["problems"] == []


def test_where_nothing_is_to_be_saved_a_round_lets_new_sessions_in_again(small_disk: Path) -> None:
    """Else nobody would find out that there is room again: a session that the guard has returned to what is on disk, or a
    freeze that could not be recorded, leaves nothing behind whose save is tried again."""
    world = World(small_disk / "state", limit=4)
    world.use("a", 1.0)
    world.save("a")
    fill(small_disk)
    session = world.use("a", 2.0)
    with pytest.raises(RequestError):
        world.save("a")
    with pytest.raises(RequestError, match="no room for another session"):
        world.use("b")
    world.saves.next_round = 0.0
    world.run()
    assert world.store.full, "what could not be saved still cannot"
    world.trainer.roll_back(session.adapter, 1)
    session.back_to(1)
    session.life.saved_at = session.life.generation
    (small_disk / "filler").unlink()
    world.saves.next_round = 0.0
    world.run()
    assert world.use("b", 1.0).version == 1
    assert world.save("b").version == 1
    world.end()


def test_a_session_can_be_removed_from_a_disk_that_is_full(small_disk: Path) -> None:
    """To the last byte, with what SQLite needs for it kept aside: whoever meets "no room" can make some."""
    world = World(small_disk / "state", limit=4)
    for name in "abc":
        world.use(name, 1.0)
        world.save(name)
    fill(small_disk)
    for name in "ab":
        session = world.ledger.find(SessionKey("-", name))
        assert session is not None
        world.wait(world.tiers.owner.remove(session) if name == "a" else world.tiers.owner.reset(session, dict))
    assert world.ledger.peek(SessionKey("-", "a")) is None
    assert world.value("b") == 0.0
    assert world.value("c") == 1.0
    world.crash()
    rows = {s["session_id"]: s["version"] for s in Offline(small_disk / "state").list()}
    assert rows == {"b": 0, "c": 1}
    assert len(files(world)) == 1


def sessions(*args: object) -> str:
    """What a command says."""
    result = CliRunner().invoke(app, ["sessions", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def begins(state: Path, secret: str | None) -> None:
    """A server does, and knows the session b."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "identity", lambda *_: IDENTITY)
        patch.setenv(SECRET_VARIABLE, secret or "")
        checks.check_dir(
            SimpleNamespace(additional_config={plugin.NAME: {}}), TTTConfig(sessions=SessionsConfig(state_dir=str(state)))
        )
    store = Store(StateDir(state), IDENTITY, 3, 2**40, secret)
    database.name_audit_log(store.reader, None)
    assert store.find(SessionKey("-", "b")) is not None
    store.close()


@pytest.mark.parametrize("secret", [None, "ab" * 32])
@pytest.mark.parametrize("stop", ["end", "crash", "a draft is left"])
def test_servers_begin_and_commands_make_room_on_a_full_disk(small_disk: Path, stop: str, secret: str | None) -> None:
    """SQLite needs room to open a database at all: who has begun once on such a disk can begin again."""
    state = small_disk / "state"
    world = World(state, limit=4)
    for name in "abc":
        world.use(name, 1.0)
        world.save(name)
    drawn = StateDir(state).secret()
    (world.end if stop == "end" else world.crash)()
    if stop == "a draft is left":
        saved = next((state / "sessions").glob("*/*.safetensors"))
        (saved.parent / f".{saved.name}.0badcafe").write_bytes(bytes(300_000))
    fill(small_disk)
    assert StateDir(state).secret() == drawn
    begins(state, secret)
    fill(small_disk)
    assert "b" in sessions("list", state)
    fill(small_disk)
    sessions("rm", state, "a")
    assert (state / "reserve").exists()
    begins(state, secret)
    fill(small_disk)
    begins(state, secret)


class Full(database._Database):
    """A database that finds no room while the reserve beside it takes some."""

    root: Path

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if sql.startswith(("PRAGMA journal_mode", "INSERT INTO", "DELETE FROM sessions")) and (self.root / "reserve").exists():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return super().execute(sql, *args)


def test_whoever_finds_no_room_takes_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody may mount a small disk: to open a database, and to remove a session with a command."""
    state = tmp_path / "state"
    world = World(state, limit=4)
    for name in "ab":
        world.use(name, 1.0)
        world.save(name)
    world.end()
    Full.root = state
    monkeypatch.setattr(database, "_Database", Full)
    begins(state, "ab" * 32)
    assert (state / "reserve").exists()
    offline = Offline(state)
    offline.close()
    assert (state / "reserve").exists()
    offline = Offline(state)
    (state / "reserve").touch()
    assert offline.remove("a")["deleted"]
    assert (state / "reserve").stat().st_size > 0
