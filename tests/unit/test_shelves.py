"""A server that starts with another number of engines: each session is on its engine's shelf, and is what it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from test_sessions_command import adapter, run
from world import IDENTITY, World

from vllm_ttt.engine.storage import records, shelves
from vllm_ttt.engine.storage.shelves import settle
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import ConfigError
from vllm_ttt.placement import owner
from vllm_ttt.sessions.offline import SessionsError
from vllm_ttt.sessions.shelves import opened
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import SessionKey
from vllm_ttt.vault import Vault

pytestmark = pytest.mark.unit

KEYS = [SessionKey(tenant, f"the-session-{i}") for tenant in ("-", "t2") for i in range(12)]


@pytest.fixture(params=[False, True], ids=["plain", "sealed"])
def key_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    if not request.param:
        return None
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_bytes(os.urandom(32))
    return file


def made(folder: Path, key_file: Path | None) -> StateDir:
    """What a server with one engine has written: two versions of each session, and what is known of it."""
    world = World(folder, limit=100, rows=100, key_file=str(key_file) if key_file else None)
    for i, key in enumerate(KEYS):
        world.use(key.name, float(i), tenant=key.tenant)
    world.tiers.saves.next_round = 0.0  # type: ignore[union-attr]
    world.run()
    for key in KEYS:
        world.use(key.name, 1.0, tenant=key.tenant)
    world.end()
    return StateDir(folder)


def place(root: StateDir, engines: int, key_file: Path | None = None) -> int:
    return settle(root, engines, lambda shelf: Store(shelf, IDENTITY, 3, 0, vault=Vault.of(key_file)))


def die(*_: Any) -> None:
    raise KeyboardInterrupt


def content(root: StateDir, engines: int, key_file: Path | None = None) -> dict[SessionKey, Any]:
    """Everything that is recorded of each session, and the bytes of its files; each is on its shelf, and on no other."""
    found: dict[SessionKey, Any] = {}
    for engine in root.shelves():
        store = Store(root.shelf(engine), IDENTITY, 3, 0, vault=Vault.of(key_file))
        for uid, key in records.keys(store.reader).items():
            assert owner(key.wire(), engines) == engine
            assert key not in found
            row = records.find(store.reader, key)
            assert row is not None
            assert not row.problem
            versions = records.versions(store.reader, uid)
            files = [store.folder.path(v.file).read_bytes() for v in versions]
            found[key] = (row.uid, row.created, row.last_used, row.state, versions, files)
        assert set(store.folder.files()) == set(records.files(store.reader)), "a file that is nobody's"
        store.close()
    return found


def test_any_number_of_engines_reads_what_any_other_has_written(tmp_path: Path, key_file: Path | None) -> None:
    root = made(tmp_path / "state", key_file)
    before = content(root, 1, key_file)
    assert before.keys() == set(KEYS)
    assert {len(files) for *_, files in before.values()} == {2}
    for engines in (2, 3, 1, 4, 2, 1):
        assert place(root, engines, key_file) > 0
        assert content(root, engines, key_file) == before
        assert place(root, engines, key_file) == 0, "it is done"
    world = World(root.root, limit=100, rows=100, key_file=str(key_file) if key_file else None)
    for i, key in enumerate(KEYS):
        assert world.value(key.name, tenant=key.tenant) == i + 1.0
    world.end()


@pytest.mark.parametrize("at", ["_link", "_sync", "carry", "remove", "discard", "_wipe"])
@pytest.mark.parametrize(("nth", "then"), [(1, 1), (1, 3), (3, 2)])
def test_a_kill_at_any_moment_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, nth: int, then: int
) -> None:
    """And whatever number of engines comes next."""
    root = made(tmp_path / "state", None)
    before = content(root, 1)
    place(root, 3)
    monkeypatch.setattr(shelves, "_AT_ONCE", 4)
    owned = next(x for x in (shelves, records, Store) if hasattr(x, at))
    calls, original = 0, getattr(owned, at)

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt
        return original(*args)

    def starts() -> None:
        for engines in (2, 1, 2, 3):
            place(root, engines)

    with monkeypatch.context() as patch:
        patch.setattr(owned, at, killed)
        with pytest.raises(KeyboardInterrupt):
            starts()
    place(root, then)
    assert content(root, then) == before


@pytest.mark.parametrize("killed", [None, "remove", "discard", "_wipe"])
def test_what_has_moved_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str | None) -> None:
    """Also where the start that moved it was killed, and the next one finds it moved."""
    root = made(tmp_path / "state", None)
    whose = {key: uid for key, (uid, *_) in content(root, 1).items()}
    for uid in whose.values():
        (root.damaged / f"{uid}-00000000.safetensors").write_bytes(b"damaged")
    remove = records.remove

    def leaves_copies(db: Any, uid: str) -> list[str]:
        """As SQLite may, where it has moved a row to another page."""
        db.execute("PRAGMA secure_delete = OFF")
        return remove(db, uid)

    monkeypatch.setattr(records, "remove", leaves_copies)
    if killed is not None:
        with monkeypatch.context() as patch:
            patch.setattr(next(x for x in (shelves, records, Store) if hasattr(x, killed)), killed, die)
            with pytest.raises(KeyboardInterrupt):
                place(root, 2)
    place(root, 2)
    for key, uid in whose.items():
        right = owner(key.wire(), 2)
        for engine in (0, 1):
            shelf = root.shelf(engine)
            files = [shelf.database, *(p for p in shelf.root.glob("sessions.db-*")), *shelf.sessions.rglob("*")]
            files += shelf.damaged.iterdir()
            if engine == 0:
                files = [f for f in files if "engine-1" not in f.parts]
            there = any(uid.encode() in f.read_bytes() or f.name.startswith(uid) for f in files if f.is_file())
            assert there is (engine == right), key


def test_a_shelf_that_is_no_engines_any_more_is_none(tmp_path: Path) -> None:
    root = made(tmp_path / "state", None)
    place(root, 3)
    log = root.shelf(1).root / "audit.jsonl"
    log.write_text("of the second engine\n")
    place(root, 2)
    assert root.shelves() == [0, 1]
    place(root, 1)
    assert root.shelves() == [0]
    assert log.exists()
    place(root, 3)
    assert content(root, 3).keys() == set(KEYS)


def test_two_sessions_of_one_name_are_for_a_person(tmp_path: Path) -> None:
    """As where a release that knows no shelves has served the dir meanwhile."""
    root = made(tmp_path / "state", None)
    place(root, 2)
    moved = next(key for key in KEYS if owner(key.wire(), 2) == 1 and key.tenant == "-")
    world = World(root.root)
    world.use(moved.name, 7.0)
    world.end()
    for engines in (1, 2):
        with pytest.raises(ConfigError, match=f"both have a session {moved.name}, .*vllm-ttt sessions rm FOLDER NAME"):
            place(root, engines)
    run("rm", root.root / "engine-1", moved.name, "--tenant", "-")
    place(root, 2)
    assert content(root, 2).keys() == set(KEYS)


def test_a_dir_that_a_server_uses_is_left_alone(tmp_path: Path) -> None:
    root = made(tmp_path / "state", None)
    place(root, 2)
    for engine in (0, 1):
        holder = root.shelf(engine)
        holder.lock()
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            place(root, 1)
        holder.unlock()
    assert content(root, 2).keys() == set(KEYS)


def test_commands_see_the_whole_dir(tmp_path: Path) -> None:
    root = made(tmp_path / "state", None)
    place(root, 2)
    state = root.root
    assert sorted((s["tenant"], s["session_id"]) for s in run("list", state)) == sorted(KEYS)
    used = [s["last_used"] for s in run("list", state)]
    assert used == sorted(used, reverse=True)
    mine = [key for key in KEYS if key.tenant == "-"]
    here, there = (next(key for key in mine if owner(key.wire(), 2) == engine) for engine in (0, 1))
    for key in (here, there):
        assert "2 tenants" in str(run("show", state, key.name, fails=True))
        assert run("show", state, key.name, "--tenant", "-")["version"] == 2
        assert run("export", state, key.name, tmp_path / "out", "--tenant", "-")["version"] == 2
        error = run("import", state, key.name, adapter(tmp_path / "a"), "--tenant", "-", fails=True)
        assert f"there is a session {key.name!r} already" in str(error)
    assert run("rm", state, there.name, "--tenant", "-")["deleted"]
    assert "there is no session" in str(run("show", state, there.name, "--tenant", "-", fails=True))
    assert run("import", state, there.name, adapter(tmp_path / "a"))["version"] == 1
    assert place(root, 2) == 1, "a server that starts takes it to its engine"
    assert content(root, 2)[there][3]["version"] == 1
    found = run("fsck", state)
    assert (found["sessions"], found["problems"], found["leftovers"]) == (len(KEYS), [], [])
    file = next(iter(root.shelf(1).files()))
    root.shelf(1).path(file).write_bytes(b"not what was saved")
    found = json.loads(json.dumps(opened(state).fsck()))
    assert [problem["file"] for problem in found["problems"]] == [f"engine-1/{file}"]


def test_a_key_that_is_replaced_keeps_its_sessions_on_every_shelf(tmp_path: Path) -> None:
    root = made(tmp_path / "state", None)
    place(root, 2)
    every = opened(root.root)
    with pytest.raises(SessionsError, match="both keys have sessions of the same name, nothing was moved: the-session-0, "):
        every.move("-", "t2")
    assert every.move("t2", "t3") == {"from": "t2", "to": "t3", "moved": 12}
    place(root, 2)
    assert content(root, 2).keys() == {SessionKey("t3" if key.tenant == "t2" else "-", key.name) for key in KEYS}
