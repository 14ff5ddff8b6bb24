"""The admin operations on sessions in memory and on disk, with the real tiers and files; the engine's loop is a stand-in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from world import World

from vllm_ttt import plugin
from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.admin import OPERATIONS, admin
from vllm_ttt.engine.ledger import Open
from vllm_ttt.metrics import Values
from vllm_ttt.sessions.offline import Offline

pytestmark = pytest.mark.unit


class Engine:
    """What `admin` needs of vLLM's EngineCore."""

    def __init__(self, world: World):
        self.world = world
        made = SimpleNamespace(additional_config={"ttt": plugin.settings(TTTConfig(), http=True)})
        self.scheduler = SimpleNamespace(
            ttt_ledger=world.ledger, ttt_tiers=world.tiers, ttt_config=TTTConfig(), vllm_config=made
        )
        self.model_executor = SimpleNamespace(collective_rpc=self.rpc)
        self.calls: list[str] = []

    def rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        if method == "ttt_metrics":
            names = ("pending_tokens", "guard_active", "step_seconds", "learning_seconds_total", "serving_seconds_total")
            return [Values(*names).snapshot() | {"slots": {"": []}}]
        if method == "ttt_sessions":
            return [[self.world.worker("ttt_session", key) for key in args[0]]]
        return [self.world.worker(method, *args)]

    def ask(self, op: str, name: str = "", argument: Any = None, tenant: str = "-") -> Any:
        """The result; where it is refused, the status."""
        answer = admin(self, op, tenant, name, argument)
        if isinstance(answer, Future):
            self.world.run(answer.done)
            answer = answer.result()
        return answer["result"] if answer["ok"] else answer["status"]


@contextlib.contextmanager
def one_session(folder: Path) -> Iterator[Engine]:
    """An engine on a state dir, with a session a of version 2, saved; it holds 3."""
    engine = Engine(World(folder))
    engine.world.use("a", 1.0, 2.0)
    engine.world.save("a")
    yield engine
    engine.world.end()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Twenty sessions, all saved, of which three fit memory."""
    world = World(tmp_path / "state", limit=3)
    for i in range(20):
        world.use(f"s{i}", 1.0, float(i))
        world.save(f"s{i}")
    yield Engine(world)
    world.end()


def test_a_list_has_all_of_them_and_asks_the_worker_once(engine: Engine) -> None:
    engine.world.use("x", 1.0, tenant="other")
    listed = engine.ask("list")["sessions"]
    assert [s["session_id"] for s in listed] == [f"s{i}" for i in reversed(range(20))]
    assert [s["version"] for s in listed] == [2] * 20
    assert sum(s["tier"] == "disk" for s in listed) == 18
    assert all(s["tenant"] is None for s in listed)
    assert engine.calls == ["ttt_sessions"]
    everybody = engine.ask("list_all")["sessions"]
    assert len(everybody) == 21
    assert {s["tenant"] for s in everybody} == {"-", "other"}
    assert [s["session_id"] for s in engine.ask("list", tenant="other")["sessions"]] == ["x"]
    assert len(engine.world.ledger.sessions) <= 3, "to list them brings nobody back"


def test_to_look_at_one_brings_nobody_back(engine: Engine) -> None:
    shown = engine.ask("get", "s0")
    assert (shown["tier"], shown["version"], shown["saved_version"], shown["versions"]) == ("disk", 2, 2, [2])
    assert len(shown["losses"]) == 2
    assert not engine.calls


@pytest.mark.parametrize("op", sorted(set(OPERATIONS) - {"list", "list_all", "config", "metrics", "adopt", "claim"}))
def test_another_tenants_session_is_not_there(engine: Engine, op: str) -> None:
    argument = {"rollback": 1, "fork": "t"}.get(op)
    for name, tenant in (("s0", "other"), ("s19", "other"), ("nobody", "-")):
        assert engine.ask(op, name, argument, tenant) == 404
    assert engine.ask("list", tenant="other")["sessions"] == []


@pytest.mark.parametrize("name", ["s0", "s19"])
def test_a_fork_begins_where_the_other_is(engine: Engine, name: str) -> None:
    """On disk or in memory."""
    forked = engine.ask("fork", name, "copy")
    assert (forked["session_id"], forked["version"], forked["tokens_learned"]) == ("copy", 2, 32)
    value = engine.world.value(name)
    engine.world.use("copy", 100.0)
    assert engine.world.value("copy") == value + 100.0
    assert engine.world.value(name) == value
    assert engine.ask("fork", name, "copy") == 409
    engine.world.run()
    assert not any(s.life.queue for s in engine.world.ledger.sessions.values())


def test_a_session_that_is_used_cannot_be_changed_from_outside(engine: Engine) -> None:
    session = engine.world.use("s19")
    session.requests.add("r")
    for op, argument in (("reset", None), ("delete", None), ("rollback", 1), ("fork", "t")):
        assert engine.ask(op, "s19", argument) == 409
    session.requests.clear()
    assert engine.ask("get", "s19")["version"] == 2


@pytest.mark.parametrize("name", ["s0", "s19"])
def test_reset_and_delete(engine: Engine, name: str) -> None:
    created = engine.ask("get", name)["created"]
    fresh = engine.ask("reset", name)
    assert (fresh["version"], fresh["saved_version"], fresh["created"]) == (0, None, created)
    assert engine.world.value(name) == 0.0
    receipt = engine.ask("delete", name)
    assert (receipt["session_id"], receipt["deleted"], receipt["version"], receipt["files"]) == (name, True, 0, [])
    engine.world.run()
    offline = Offline(engine.world.store.folder.root)
    assert name not in {s["session_id"] for s in offline.list()}
    assert len(list(engine.world.store.folder.sessions.rglob("*.safetensors"))) == 19
    assert engine.ask("get", name) == 404


def test_save_and_rollback(engine: Engine) -> None:
    engine.world.use("s19", 5.0)
    assert engine.ask("save", "s19")["saved_version"] == 3
    assert engine.ask("rollback", "s19", 7) == 409
    back = engine.ask("rollback", "s19", 2)
    assert (back["version"], back["tokens_learned"], back["versions"]) == (2, 32, [2])
    assert engine.world.value("s19") == 20.0
    assert engine.ask("rollback", "s19", 3) == 409, "what came later is no more"
    engine.world.use("s19", 7.0)
    assert engine.ask("save", "s19")["saved_version"] == 3
    assert engine.world.value("s19") == 27.0


def test_a_version_in_memory_is_returned_to_and_is_what_the_disk_has(engine: Engine) -> None:
    world = engine.world
    session = world.use("s19", 5.0, 6.0, 7.0)
    assert engine.ask("save", "s19")["saved_version"] == 5
    later = session.history.add(range(100), [100], 99)
    session.history.settle(later, 99, version=5)
    back = engine.ask("rollback", "s19", 3)
    assert (back["version"], back["saved_version"], back["versions"]) == (3, 3, [0, 2, 3])
    assert session.history.known(range(200)) == 0, "what it forgot may be learned again"
    assert world.value("s19") == 25.0
    world.use("s19", 1.0, 1.0)
    assert session.version == 5
    assert session.unsaved, "another version 5 than the one that was saved"
    world.crash()
    again = World(world.store.folder.root)
    assert again.value("s19") == 25.0, "an answered rollback outlives a crash"
    again.end()


def test_version_0_is_the_base_model(engine: Engine) -> None:
    back = engine.ask("rollback", "s19", 0)
    assert (back["version"], back["saved_version"], back["versions"]) == (0, 0, [0])
    assert engine.world.value("s19") == 0.0
    assert engine.ask("rollback", "s0", 0)["version"] == 0, "one that is on disk comes back for it"


def test_no_rollback_while_it_learns(engine: Engine) -> None:
    session = engine.world.use("s19", 5.0)
    session.open["r"] = Open(1)
    assert engine.ask("rollback", "s19", 2) == 409


def test_a_request_that_comes_during_a_rollback_meets_the_old_version(engine: Engine) -> None:
    engine.world.use("s19", 5.0)
    engine.ask("save", "s19")
    answer = admin(engine, "rollback", "-", "s19", 2)
    assert engine.world.value("s19") == 20.0
    engine.world.run(answer.done)
    assert answer.result()["result"]["version"] == 2


@pytest.mark.parametrize("name", ["s0", "s19"])
def test_frozen_outlives_everything(engine: Engine, name: str) -> None:
    assert engine.ask("freeze", name)["frozen"]
    assert engine.ask("save", name)["frozen"]
    engine.world.run()
    assert {s["session_id"] for s in Offline(engine.world.store.folder.root).list() if s["frozen"]} == {name}
    assert engine.ask("rollback", name, 2)["frozen"]
    assert engine.world.use(name).frozen
    assert not engine.ask("unfreeze", name)["frozen"]


@pytest.mark.parametrize("name", ["s0", "s19"])
def test_an_export_is_what_is_served(engine: Engine, name: str) -> None:
    done = engine.ask("export", name)
    path = Path(done["path"])
    assert path.parent == engine.world.store.folder.exports
    assert path.stat().st_mode & 0o077 == 0
    tensors = safetensors.torch.load(path.read_bytes())
    value = torch.tensor(engine.world.value(name)).to(torch.bfloat16)
    assert all((b == value).all() for key, b in tensors.items() if "lora_B" in key)
    assert len(path.read_bytes()) == done["bytes"]
    engine.world.run()
    assert not any(s.life.queue for s in engine.world.ledger.sessions.values())
