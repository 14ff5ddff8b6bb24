"""A fork is what its source is, whoever asks for either meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from test_admin import Engine
from test_changes import ask
from world import World

from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


def test_a_fork_is_what_its_source_is_whoever_asks_for_it_meanwhile(tmp_path: Path) -> None:
    world = World(tmp_path / "state", limit=2)
    engine = Engine(world)
    for name, values in (("a", (10.0, 20.0)), ("x", (1.0,)), ("y", (1.0,))):
        world.use(name, *values)
        world.save(name)
    assert engine.ask("get", "a")["tier"] == "disk"
    gate, load = threading.Event(), world.files._load
    world.files._load = lambda *args: (gate.wait(), load(*args))[1]
    fork = ask(engine, "fork", argument="new")
    world.step()
    target = world.ledger.open(SessionKey("-", "new"))
    target.requests.add("r")
    for _ in range(3):
        world.step()
        assert not world.tiers.ready(target), "it is not what its source is yet"
    gate.set()
    world.run(lambda: world.tiers.ready(target))
    assert fork.result()["result"]["version"] == 2
    world.trainer.learn(target.adapter, 5.0)
    world.step()
    target.requests.clear()
    world.tiers.left(target)
    assert world.value("new") == 35.0
    world.end()


def test_a_fork_that_fails_leaves_a_fresh_session_to_who_asked_for_it(tmp_path: Path) -> None:
    world = World(tmp_path / "state", limit=2)
    engine = Engine(world)
    for name in ("a", "x", "y"):
        world.use(name, 1.0)
        world.save(name)
    gate, load = threading.Event(), world.files._load

    def fail(*_: object) -> None:
        gate.wait()
        raise OSError(5, "Input/output error")

    world.files._load = fail
    fork = ask(engine, "fork", argument="new")
    world.step()
    target = world.ledger.open(SessionKey("-", "new"))
    target.requests.add("r")
    gate.set()
    world.run(fork.done)
    assert fork.result()["status"] == 507
    world.files._load = load
    world.run(lambda: world.tiers.ready(target))
    target.requests.clear()
    world.tiers.left(target)
    assert world.value("new") == 0.0
    world.end()


def test_a_fork_and_a_save_of_it_do_not_escape_the_guard(tmp_path: Path) -> None:
    """What no trial has seen counts in the copy too, and so does the last version that was good."""
    world = World(tmp_path / "state", limit=8, rows=4)
    engine = Engine(world)
    session = world.use("a", *[1.0] * 15)
    world.trainer.versions.add_good(session.adapter, 3, world.trainer.versions.kept[session.adapter][15])
    assert engine.ask("fork", "a", "b")["version"] == 15
    copied = world.use("b")
    assert world.trainer.guard.untried(copied.adapter) == 15
    assert world.trainer.versions.last_good(copied.adapter) == 3
    assert engine.ask("fork", "b", "c")["version"] == 15
    world.save("c")
    world.crash()

    after = World(tmp_path / "state", limit=8, rows=4)
    again = after.use("c")
    assert after.trainer.guard.untried(again.adapter) == 15
    after.end()
