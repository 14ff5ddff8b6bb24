"""Encryption at rest: nothing that a session has learned can be read in the state dir without its key, or with another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_admin import Engine
from test_erase import NAME, found
from typer.testing import CliRunner
from world import World

from vllm_ttt import vault
from vllm_ttt.cli import app
from vllm_ttt.errors import ConfigError, TTTError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey
from vllm_ttt.vault import SealError, Vault

pytestmark = pytest.mark.unit

SEALED = Vault(bytes(range(32)))


@pytest.fixture
def key(tmp_path: Path) -> str:
    return make_key(tmp_path / "key")


def make_key(path: Path) -> str:
    path.touch(mode=0o600)
    path.write_bytes(os.urandom(32))
    return str(path)


@given(st.binary(max_size=300), st.integers(0, 10**6), st.integers(1, 7))
def test_what_is_sealed_opens_and_what_was_touched_does_not(data: bytes, at: int, bit: int) -> None:
    sealed = SEALED.seal(data, "a")
    assert SEALED.open(sealed, "a") == data
    assert SEALED.seal(data, "a") != sealed, "each has a salt of its own"
    changed = bytearray(sealed)
    changed[at % len(sealed)] ^= 1 << bit
    for wrong, name, by in (
        (bytes(changed), "a", SEALED), (sealed[:-1], "a", SEALED), (sealed, "b", SEALED), (sealed, "a", Vault(bytes(32))),
        (data, "a", SEALED),
    ):  # fmt: skip
        with pytest.raises(SealError):
            by.open(wrong, name)


def test_no_piece_of_a_large_file_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "_PIECE", 64)
    for size in (0, 1, 63, 64, 65, 128, 200):
        data = os.urandom(size)
        sealed = SEALED.seal(data, "a")
        assert SEALED.open(sealed, "a") == data
        head, pieces = sealed[:20], [sealed[at : at + 80] for at in range(20, len(sealed), 80)]
        for wrong in (pieces[:-1], pieces[1:], pieces[::-1], [*pieces, pieces[-1]]):
            if wrong != pieces:
                with pytest.raises(SealError):
                    SEALED.open(head + b"".join(wrong), "a")


def test_names_can_be_looked_for_and_not_read() -> None:
    stored = SEALED.name("alice")
    assert stored == SEALED.name("alice")
    assert "alice" not in stored
    assert (SEALED.plain_name(stored), Vault(bytes(32)).name("alice") == stored) == ("alice", False)
    with pytest.raises(SealError):
        Vault(bytes(32)).plain_name(stored)


def test_a_state_dir_shows_nothing_of_its_sessions(tmp_path: Path, key: str) -> None:
    state = tmp_path / "state"
    for sealed in (False, True):
        folder = state / str(sealed)
        folder.parent.mkdir(exist_ok=True)
        world = World(folder, limit=2, key_file=key if sealed else None)
        session = world.use(NAME, 1.0, 2.0)
        session.history.add_prompt(list(range(600)), 0, 600)
        world.save(NAME)
        for other in ("second-session", "third-session"):  # the first goes to disk
            world.use(other, 4.0)
            world.save(other)
        assert SessionKey("-", NAME) not in world.ledger.sessions
        assert world.value(NAME) == 3.0, "it comes back"
        assert Engine(world).ask("list")["sessions"][0]["session_id"] == NAME
        world.end()
        shown = found(folder, NAME, '"losses"', "tokens_learned", "model.layers.1.mlp", "__metadata__")
        assert bool(shown) is not sealed
    world = World(state / "True", key_file=key)
    assert (world.value(NAME), world.value("third-session")) == (3.0, 4.0)
    world.end()
    assert Offline(state / "True", key_file=key).fsck()["problems"] == []


def test_without_its_key_nothing_starts(tmp_path: Path, key: str) -> None:
    World(tmp_path / "state", key_file=key).end()
    with pytest.raises(ConfigError, match=r"is encrypted: sessions\.key_file"):
        World(tmp_path / "state")
    with pytest.raises(ConfigError, match="another key"):
        World(tmp_path / "state", key_file=make_key(tmp_path / "other"))
    with pytest.raises(ConfigError, match="encrypted"):
        Offline(tmp_path / "state")
    World(tmp_path / "state", key_file=key).end()
    plain = World(tmp_path / "plain")
    plain.use("a", 1.0)
    plain.end()
    with pytest.raises(ConfigError, match="not encrypted"):
        World(tmp_path / "plain", key_file=key)
    World(tmp_path / "plain").end()


def test_key_files_that_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Vault.of(tmp_path / "nowhere")
    Path(key).chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        Vault.of(key)
    for size in (0, 31, 33):
        path = tmp_path / f"key{size}"
        path.touch(mode=0o600)
        path.write_bytes(bytes(size))
        with pytest.raises(ConfigError, match="head -c 32 /dev/urandom"):
            Vault.of(path)


def test_a_file_in_anothers_place_is_not_read(tmp_path: Path, key: str) -> None:
    """Somebody who may write to the disk, and to the database, but has no key."""
    world = World(tmp_path / "state", key_file=key)
    for name, value in (("alice", 1.0), ("bob", 2.0)):
        world.use(name, value)
        world.save(name)
    world.end()
    offline = Offline(tmp_path / "state", key_file=key)
    alice, bob = (offline.find(name).newest for name in ("alice", "bob"))
    assert alice is not None
    assert bob is not None
    offline.folder.path(alice.file).write_bytes(offline.folder.path(bob.file).read_bytes())
    offline.db.execute("UPDATE versions SET checksum = ? WHERE file = ?", (bob.checksum, alice.file))
    assert [p["file"] for p in offline.fsck()["problems"]] == [alice.file]
    details = "SELECT detail FROM sessions WHERE uid = ?"
    (other,) = offline.db.execute(details, (offline.find("bob").uid,)).fetchone()
    offline.db.execute("UPDATE sessions SET detail = ? WHERE uid = ?", (other, offline.find("alice").uid))
    assert "does not open" in offline.find("alice").problem
    world = World(tmp_path / "state", key_file=key)
    assert (world.value("alice"), world.value("bob")) == (0.0, 2.0), "alice falls back, and is never bob"
    world.end()


def test_an_export_is_sealed_on_its_way(tmp_path: Path, key: str) -> None:
    world = World(tmp_path / "state", key_file=key)
    world.use("a", 1.0)
    engine = Engine(world)
    one, two, *_ = [engine.ask("export", "a") for _ in range(6)]
    assert not world.tiers.exports.counts, "nobody waits for one any more"
    assert one["key"] != two["key"], "a key of its own, which is nowhere on the disk"
    data = Path(one["path"]).read_bytes()
    assert b"lora_A" not in data
    opened = Vault(bytes.fromhex(one["key"])).open(data, Path(one["path"]).name)
    assert b"lora_A" in opened
    assert len(data) == one["bytes"]
    world.end()


def test_a_name_that_does_not_open_harms_no_list(tmp_path: Path, key: str) -> None:
    world = World(tmp_path / "state", key_file=key)
    for name in ("alice", "bob"):
        world.use(name, 1.0)
        world.save(name)
    world.end()
    offline = Offline(tmp_path / "state", key_file=key)
    offline.db.execute("UPDATE sessions SET name = 'damaged' WHERE uid = ?", (offline.find("alice").uid,))
    assert {s["session_id"] for s in offline.list()} == {"damaged", "bob"}
    world = World(tmp_path / "state", key_file=key)
    assert {s["session_id"] for s in Engine(world).ask("list")["sessions"]} == {"damaged", "bob"}
    world.end()


def test_commands_take_the_key(tmp_path: Path, key: str) -> None:
    state, out = str(tmp_path / "state"), str(tmp_path / "out")
    world = World(tmp_path / "state", key_file=key)
    world.use(NAME, 1.0)
    world.end()

    def run(*args: str, env: dict[str, str] | None = None) -> object:
        result = CliRunner().invoke(app, ["sessions", *args, "--json"], env=env)
        return json.loads(result.stdout) if result.exit_code == 0 else result.exception

    assert isinstance(run("list", state), TTTError)
    listed = run("list", state, "--key-file", key)
    assert isinstance(listed, list)
    assert [s["session_id"] for s in listed] == [NAME]
    environment = {"TTT_KEY_FILE": key}
    for args in (("show", state, NAME), ("export", state, NAME, out), ("import", state, "b", out), ("fsck", state)):
        assert isinstance(run(*args, env=environment), dict), args
    receipt = run("rm", state, NAME, env=environment)
    assert isinstance(receipt, dict)
    assert receipt["database_wiped"]
    world = World(tmp_path / "state", key_file=key)
    assert world.value("b", imported=True) == 1.0
    world.end()
