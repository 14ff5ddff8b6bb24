"""A disk that is full to the last byte: sessions go on from memory, and whoever is told that there is no room can make some."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_tiers import files
from world import World

from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
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


def test_a_real_disk_that_is_full(small_disk: Path) -> None:
    """ENOSPC from the file system. What was on the disk stays, and the next save succeeds when there is room."""
    world = World(small_disk / "state", limit=4)
    world.use("a", 1.0)
    assert world.save("a").version == 1
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)) == 4096:
            pass
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
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)) == 4096:
            pass
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
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)) == 4096:
            pass
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
