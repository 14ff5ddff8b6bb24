"""When sessions are saved, and that what was acknowledged is there."""

from __future__ import annotations

import time
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from test_tiers import Make, files, make

from vllm_ttt.engine.life.alarm import Alarm
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

__all__ = ["make"]
pytestmark = pytest.mark.unit


def test_a_save_that_is_acknowledged_survives_a_crash(make: Make) -> None:
    world = make()
    world.use("a", 1.0)
    assert world.save("a").version == 1
    world.use("a", 2.0)
    world.use("b", 4.0)
    world.crash()
    again = make()
    assert again.value("a") == 1.0
    session = again.ledger.sessions[SessionKey("-", "a")]
    assert (session.version, session.tokens_learned) == (1, 16), "what came after the save did not happen"
    assert again.value("b") == 0.0
    assert again.ledger.sessions[SessionKey("-", "b")].version == 0


def test_a_snapshot_has_the_ledger_of_its_version(make: Make) -> None:
    """Also where more is learned in the step in which it is taken."""
    world = make()
    session = world.use("a", 1.0)
    future = world.tiers.save(session)
    world.files.step(world.tiers.take_orders())
    world.trainer.learn(session.adapter, 2.0)
    world.run(future.done)
    assert future.result().version == 1
    assert future.result().state["tokens_learned"] == 16
    assert session.version == 2
    assert Offline(world.store.folder.root).fsck()["problems"] == []


def test_a_snapshot_waits_for_a_step_that_is_under_way(make: Make) -> None:
    world = make()
    session = world.use("a", 1.0)
    world.trainer.flying.add(session.adapter)
    future = world.tiers.save(session)
    for _ in range(20):
        world.step()
    assert not files(world)
    world.trainer.flying.clear()
    assert world.wait(future).version == 1


def test_versions_are_kept_and_older_ones_go(make: Make) -> None:
    world = make(keep_versions=2)
    for _ in range(5):
        world.use("a", 1.0)
        world.save("a")
    assert Offline(world.store.folder.root).show("a")["versions"] == [4, 5]
    assert len(files(world)) == 2


def test_the_next_save_succeeds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make(limit=2, autosave=0.1)
    session = world.use("a", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RequestError, match="No space left"):
            world.save("a")
    assert not list(world.store.folder.sessions.rglob(".*")), "the draft is gone"
    world.run(lambda: session.saved is not None)
    assert session.error is None
    world.use("c", 1.0)


def test_the_end_saves_what_is_still_being_used(make: Make) -> None:
    world = make()
    session = world.use("a", 1.0)
    session.requests.add("r2")
    world.tiers.close()
    world.run(lambda: session.saved is not None)
    world.run()  # it comes to rest although one is in use: a paused engine, too, must end
    world.trainer.learn(session.adapter, 2.0)
    world.step()
    session.requests.clear()
    world.run()
    assert session.saved is not None
    assert session.saved.version == 2


def test_autosave(make: Make) -> None:
    world = make(autosave=0.1)
    session = world.use("a", 1.0)
    world.run(lambda: session.saved is not None)
    assert not world.saves.changed


def test_the_alarm_looks_when_a_round_is_due(make: Make) -> None:
    """Not in a rhythm of its own: what changed just after a look would wait for two."""
    world = make(autosave=30.0)
    queue: SimpleQueue[Any] = SimpleQueue()
    alarm = Alarm(SimpleNamespace(input_queue=queue), 30.0, world.tiers)
    world.saves.next_round = time.monotonic() + 20.0
    assert 19.0 < alarm.pause() <= 20.1
    world.saves.next_round = time.monotonic() - 5.0
    assert alarm.pause() == 30.0, "whoever changes now begins a round in the same step"
    session = world.use("a", 1.0)
    assert session.unsaved
    world.saves.next_round -= 12.0
    assert alarm.pause() <= 18.1, "the session has changed by then, and its round is due"


def test_of_files_that_other_servers_remove_nothing_is_kept_in_memory(make: Make) -> None:
    world = make(shared=True)
    world.use("a", 1.0)
    world.save("a")
    assert world.store.sizes == {}
    assert world.store.bytes == sum(file.stat().st_size for file in world.store.folder.sessions.glob("*/*")) > 0
    world.end()
