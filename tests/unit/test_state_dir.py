"""Which folders become a state dir, and that nothing of anybody else's is ever removed or shown."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
import sqlite3
from pathlib import Path

import pytest
from world import IDENTITY, World

from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import ConfigError, TTTError
from vllm_ttt.sessions.offline import Offline, tenant_of
from vllm_ttt.state_dir import FORMAT, MARKER, SECRET_VARIABLE, StateDir

pytestmark = pytest.mark.unit


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def store(folder: Path) -> Store:
    return Store(StateDir(folder), IDENTITY, 3, 2**40)


@pytest.mark.parametrize("how", ["server", "secret"])
def test_a_folder_with_something_in_it_is_refused_and_not_touched(tmp_path: Path, how: str) -> None:
    for file in ("exports/2026-report/ledger.csv", "exports/thesis.docx", "sessions/sess_abc", "sessions/ab/notes.txt", "x"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("somebody's")
    before, mode = content(tmp_path), tmp_path.stat().st_mode
    with pytest.raises(ConfigError) as refused:
        store(tmp_path) if how == "server" else StateDir(tmp_path).secret()
    for says in (str(tmp_path), "not empty", "exports, sessions, x", "--ttt-state-dir", "empty or missing"):
        assert says in str(refused.value)
    assert content(tmp_path) == before
    assert tmp_path.stat().st_mode == mode


def test_a_folder_that_is_missing_or_empty_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    (tmp_path / "empty" / "lost+found").mkdir()  # of a file system that was made just now
    for name in ("missing", "empty"):
        world = World(tmp_path / name)
        world.use("a", 1.0)
        world.end()
        again = World(tmp_path / name)
        assert again.value("a") == 1.0
        again.end()
        assert (tmp_path / name / MARKER).is_file()


def test_without_its_marker_a_state_dir_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    world.use("a", 1.0)
    world.end()
    (tmp_path / "state" / MARKER).unlink()
    with pytest.raises(ConfigError, match=f"touch {tmp_path}/state/{MARKER}"):
        store(tmp_path / "state")
    with pytest.raises(TTTError, match=MARKER):
        Offline(tmp_path / "state")
    (tmp_path / "state" / MARKER).touch()
    again = World(tmp_path / "state")
    assert again.value("a") == 1.0
    again.end()


@pytest.mark.parametrize("marker", [False, True])
@pytest.mark.parametrize(("version", "says"), [(2, "start a new state dir: vllm serve"), (FORMAT + 1, "serve it with that")])
def test_a_state_dir_of_another_release_is_known_by_its_database(tmp_path: Path, version: int, says: str, marker: bool) -> None:
    """Also one that a server has just been killed on: what it says is in SQLite's log alone."""
    killed, folder = tmp_path / "killed", tmp_path / "state"
    (killed / "sessions" / "ab").mkdir(parents=True)
    (killed / "sessions" / "ab" / f"{32 * 'a'}-0123abcd.safetensors").write_bytes(b"x")
    with contextlib.closing(sqlite3.connect(killed / "sessions.db")) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        db.execute("INSERT INTO meta VALUES ('format', ?)", (str(version),))
        db.commit()
        shutil.copytree(killed, folder)
    if marker:
        (folder / MARKER).write_text(f"format {version}\n")
    for refuse in (lambda: store(folder), lambda: Offline(folder), lambda: StateDir(folder).secret()):
        with pytest.raises(ConfigError) as refused:
            refuse()
        for text in (str(folder), f"format {version}", f"format {FORMAT}", says):
            assert text in str(refused.value)
    assert (folder / "sessions" / "ab" / f"{32 * 'a'}-0123abcd.safetensors").exists()
    assert not (folder / "lock").exists()


def test_files_without_a_database_are_not_removed(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    world.use("a", 1.0)
    world.end()
    for file in (tmp_path / "state").glob("sessions.db*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"1 files of sessions and no sessions\.db"):
        store(tmp_path / "state")
    assert len(list((tmp_path / "state" / "sessions").rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("how", ["a mount point", "the folder"])
def test_a_start_without_the_files_forgets_nothing(tmp_path: Path, how: str) -> None:
    """They are on a disk that was not mounted: when it is, everything is there again."""
    state, away = tmp_path / "state", tmp_path / "away"
    world = World(state)
    for name in "ab":
        world.use(name, 1.0)
        world.save(name)
    world.end()
    (state / "sessions").rename(away)
    if how == "a mount point":
        (state / "sessions").mkdir()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"names 2 files of sessions, and none of them is there.* fsck .* --repair"):
            store(state)
    (state / "sessions").rmdir()
    away.rename(state / "sessions")
    world = World(state)
    assert world.value("a") == world.value("b") == 1.0
    world.end()
    shutil.rmtree(state / "sessions")
    assert {p["problem"] for p in Offline(state).fsck(repair=True)["problems"]} == {"it is gone"}
    world = World(state)
    assert world.value("a") == 0.0, "they are lost, and somebody has said so"
    world.end()


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    """Nor where somebody has opened it since; the database, its log, and everything below."""
    tmp_path.joinpath("state").mkdir(mode=0o755)
    world = World(tmp_path / "state")
    world.use("a", 1.0)
    world.save("a")
    readable = [path.name for path in (tmp_path / "state").rglob("*") if path.stat().st_mode & 0o077]
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert readable == []
    world.end()
    (tmp_path / "state").chmod(0o755)
    (tmp_path / "state" / "sessions.db").chmod(0o644)
    World(tmp_path / "state").end()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "sessions.db").stat().st_mode & 0o777 == 0o600


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ConfigError, match="cannot be locked: No locks available"):
        store(tmp_path / "state")


def test_to_ask_for_the_secret_takes_no_lock_from_the_database(tmp_path: Path) -> None:
    """POSIX drops all of a process's locks on a file when any handle to it is closed: SQLite would lose its own."""
    world = World(tmp_path / "state")
    world.use("a", 1.0)
    world.save("a")
    db = world.store.reader
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE sessions SET last_used = 0")
    StateDir(tmp_path / "state").secret()
    held = Path("/proc/locks").read_text()
    inodes = {str((tmp_path / "state" / name).stat().st_ino) for name in ("sessions.db", "sessions.db-shm")}
    locked = {line.split()[5].rpartition(":")[2] for line in held.splitlines() if " POSIX " in line}
    assert inodes <= locked
    db.execute("ROLLBACK")
    world.end()


def test_a_secret_that_is_lost_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key would find its sessions, which would count all the same. Without a session of a key, a new secret does no harm."""
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    folder = StateDir(tmp_path / "state")
    secret = folder.secret()
    world = World(tmp_path / "state")
    world.use("a", 1.0)
    world.end()

    def open_with(secret: str) -> None:
        Store(StateDir(tmp_path / "state"), IDENTITY, 3, 2**40, secret).close()

    open_with("s" * 64)
    open_with(secret)
    world = World(tmp_path / "state")
    world.use("a", 1.0, tenant=tenant_of(folder, "key"))
    world.end()
    open_with(secret)
    with pytest.raises(ConfigError, match="1 sessions of API keys that were made under another secret"):
        open_with("s" * 64)
    assert len(Offline(tmp_path / "state", tenant_of(folder, "key")).list()) == 1
    (tmp_path / "state" / "secret").unlink()
    with pytest.raises(ConfigError, match=f"{SECRET_VARIABLE} of the environment, or else the file {tmp_path}/state/secret"):
        tenant_of(folder, "key")
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    assert len(Offline(tmp_path / "state", tenant_of(folder, "key")).list()) == 1
