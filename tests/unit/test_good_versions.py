"""The last version that the guard found good is there also when its session has left memory, and when the server was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from world import World

from vllm_ttt.engine.ledger import Session
from vllm_ttt.worker.deltas.versions import keep

pytestmark = pytest.mark.unit


def found_good(world: World, session: Session) -> None:
    """A trial of what the session is."""
    key = session.adapter
    world.trainer.guard.drop(key)
    world.trainer.versions.add_good(key, session.version, keep(world.trainer.deltas, key))


def found_bad(world: World, name: str, reached: int) -> float:
    """A trial of the session, which is back in memory. Returns what its delta then holds, also after a restart."""
    session = world.use(name)
    assert session.version == reached
    back = world.trainer.versions.last_good(session.adapter)
    world.guard_stops(session, session.version, back)
    world.save(name)
    return world.value(name)


def learned(folder: Path, **settings: int) -> World:
    """Version 2 was found good, and not saved; version 3 was."""
    world = World(folder, **settings)
    found_good(world, world.use("a", 1.0, 2.0))
    world.use("a", 4.0)
    world.save("a")
    return world


def recorded(world: World, name: str = "a") -> list[int]:
    return world.tiers.versions(world.use(name), ())


@pytest.mark.parametrize("keep_versions", [1, 3])
def test_after_a_kill(tmp_path: Path, keep_versions: int) -> None:
    learned(tmp_path / "state", keep_versions=keep_versions).crash()
    world = World(tmp_path / "state", keep_versions=keep_versions)
    assert recorded(world) == [2, 3]
    assert found_bad(world, "a", 3) == 3.0
    assert recorded(world) == [2]
    world.end()


def test_after_an_eviction(tmp_path: Path) -> None:
    world = learned(tmp_path / "state", limit=1)
    world.use("b", 1.0)
    world.save("b")
    assert found_bad(world, "a", 3) == 3.0
    world.end()


def test_it_is_written_once_and_kept_as_long_as_nothing_later_is_good(tmp_path: Path) -> None:
    world = learned(tmp_path / "state", keep_versions=1)
    files = set(world.store.folder.files())
    for version in (4, 5):
        world.use("a", 8.0)
        world.save("a")
        assert recorded(world) == [2, version]
    (good,) = files & set(world.store.folder.files())
    found_good(world, world.use("a"))
    world.use("a", 16.0)
    world.save("a")
    assert recorded(world) == [5, 6]
    assert good not in world.store.folder.files()
    world.end()


def test_a_save_of_an_earlier_version_has_it_too(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    found_good(world, world.use("a", 1.0, 2.0))
    session = world.use("a", 4.0, 8.0)
    world.wait(world.go_back(session, 3))
    world.crash()
    world = World(tmp_path / "state")
    assert recorded(world) == [2, 3]
    assert found_bad(world, "a", 3) == 3.0
    world.end()


def test_what_was_another_version_of_that_number_is_not_taken_for_it(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    session = world.use("a", 1.0, 2.0)
    world.save("a")
    world.guard_stops(session, 2, 0)
    session.frozen = None
    found_good(world, world.use("a", 16.0, 32.0))
    world.use("a", 64.0)
    world.save("a")
    world.crash()
    world = World(tmp_path / "state")
    assert found_bad(world, "a", 3) == 48.0
    world.end()


def test_on_a_full_disk_it_goes_after_all_others(tmp_path: Path) -> None:
    world = learned(tmp_path / "state", keep_versions=2)
    world.use("a", 8.0)
    world.save("a")
    assert recorded(world) == [2, 3, 4]
    world.store.limit = world.store.bytes
    for other, kept in (("b", [2, 4]), ("c", [4])):
        world.use(other, 1.0)
        world.save(other)
        assert recorded(world) == kept
    world.crash()
    world = World(tmp_path / "state")
    assert world.value("a") == 15.0, "it goes on without"
    assert found_bad(world, "a", 4) == 0.0
    world.end()


def test_one_that_is_damaged_is_done_without(tmp_path: Path) -> None:
    world = learned(tmp_path / "state")
    saved = world.use("a").saved
    assert saved is not None
    good = saved.state["good"][1]
    world.end()
    (tmp_path / "state" / good).write_bytes(b"")
    world = World(tmp_path / "state")
    assert world.value("a") == 7.0
    assert found_bad(world, "a", 3) == 0.0
    world.end()
