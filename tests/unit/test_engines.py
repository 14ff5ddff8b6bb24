"""Several engine cores behind one client: each answers for its own sessions, and together they say what one would."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from test_admin import Engine
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.frontend import engines
from vllm_ttt.placement import owner
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

NAMES = [f"s{i}" for i in range(30)]


class Client:
    """vLLM's client of several engine cores, with real engines of ours behind it."""

    def __init__(self, folder: Path, count: int, **options: Any):
        self.core_engines = [i.to_bytes(2, "little") for i in range(count)]
        self.worlds = [World(folder / str(i), limit=100, rows=100, **options) for i in range(count)]
        self.engines = [Engine(world) for world in self.worlds]
        #: (engine, operation) of every call
        self.calls: list[tuple[int, str]] = []

    async def _call_utility_async(self, _: str, op: str, tenant: str, name: str, *argument: Any, engine: bytes) -> Any:
        index = self.core_engines.index(engine)
        self.calls.append((index, op))
        answer = admin(self.engines[index], op, tenant, name, *argument)
        if isinstance(answer, Future):
            self.worlds[index].run(answer.done)
            answer = answer.result()
        return answer

    async def call_utility_all_async(self, *call: Any) -> list[Any]:
        return [await self._call_utility_async(*call, engine=engine) for engine in self.core_engines]

    def world(self, name: str, tenant: str = "-") -> World:
        return self.worlds[owner(SessionKey(tenant, name).wire(), len(self.worlds))]

    def ask(self, op: str, name: str = "", *argument: Any, tenant: str = "-") -> Any:
        """The result; where it is refused, the status."""
        answer = asyncio.run(engines.ask(self, op, tenant, name, *argument))
        return answer["result"] if answer["ok"] else answer["status"]

    def listed(self, op: str, limit: int, tenant: str = "-") -> list[dict[str, Any]]:
        """All pages."""
        found, after = [], None
        while True:
            page = self.ask(op, "", {"limit": limit, "after": after}, tenant=tenant)
            assert len(page["sessions"]) <= limit
            assert page.keys() == {"sessions", "next"}
            found += page["sessions"]
            if (after := page["next"]) is None:
                return found
            assert len(page["sessions"]) == limit, "a page that is not the last is full"


@pytest.fixture(params=[2, 3])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    client = Client(tmp_path, request.param)
    for i, name in enumerate(NAMES):
        client.world(name).use(name, float(i))
        client.world(name, "other").use(name, 0.5, tenant="other")
    yield client
    for world in client.worlds:
        world.end()


@pytest.mark.parametrize("limit", [1, 4, 7, 60, 1000])
def test_a_list_is_one_engines_list(client: Client, limit: int) -> None:
    """Most recently used first, whichever engine has it, in pages that have each session once."""
    rng = random.Random(limit)
    for name in rng.sample(NAMES, 10):
        client.world(name).use(name)
    for name in rng.sample(NAMES, 10):
        client.world(name).save(name)
    if limit == 1:  # most pages are far behind the first sessions of some engine
        client.worlds[0].use(next(n for n in NAMES if client.world(n) is client.worlds[0]))
    found = client.listed("list", limit)
    assert sorted(s["session_id"] for s in found) == sorted(NAMES)
    used = [s["last_used"] for s in found]
    assert used == sorted(used, reverse=True)
    assert {s["tenant"] for s in found} == {None}, "of its own list a key learns no tenant"
    everybody = client.listed("list_all", limit)
    assert sorted((s["tenant"], s["session_id"]) for s in everybody) == sorted((t, n) for t in ("-", "other") for n in NAMES)
    used = [s["last_used"] for s in everybody]
    assert used == sorted(used, reverse=True)


def test_a_list_that_one_engine_refuses_is_refused(client: Client) -> None:
    assert client.ask("list", "", {"limit": 5, "after": "nonsense"}) == 400


def test_the_engine_that_has_a_session_is_asked_and_no_other(client: Client) -> None:
    for name in NAMES:
        client.calls.clear()
        assert client.ask("get", name)["version"] == 1
        assert client.calls == [(client.worlds.index(client.world(name)), "get")]
    client.calls.clear()
    assert client.ask("get", "nobody") == 404
    assert len(client.calls) == 1


def other(client: Client, name: str, near: bool, label: str = "copy") -> str:
    """A new name, whose engine is that of ``name``, or is not."""
    names = (f"{label}-{i}" for i in range(1000))
    return next(new for new in names if (client.world(new) is client.world(name)) is near)


@pytest.mark.parametrize("near", [True, False], ids=["same engine", "another"])
def test_a_fork_is_what_its_source_is_on_whichever_engine(client: Client, near: bool) -> None:
    source = NAMES[5]
    client.world(source).use(source, 10.0)
    new = other(client, source, near)
    made = client.ask("fork", source, new)
    assert (made["session_id"], made["version"], made["saved_version"]) == (new, 2, 2)
    told = client.ask("get", source)
    for same in ("tokens_learned", "tokens_seen", "losses", "frozen"):
        assert made[same] == told[same]
    assert client.world(new).value(new) == 15.0
    assert client.world(source).value(source) == 15.0
    client.world(new).use(new, 1.0)
    assert client.world(new).value(new) == 16.0
    assert client.world(source).value(source) == 15.0
    assert not any(list((world.store.folder.exports).iterdir()) for world in client.worlds), "nothing is left on the way"


def test_a_fork_of_what_has_learned_nothing_crosses_engines(client: Client) -> None:
    client.world("fresh").use("fresh")
    new = other(client, "fresh", near=False)
    assert client.ask("fork", "fresh", new)["version"] == 0
    client.world(new).use(new, 3.0)
    assert client.world(new).value(new) == 3.0


def test_a_fork_that_cannot_be_made_changes_nothing(client: Client) -> None:
    source = NAMES[3]
    taken = next(name for name in NAMES if client.world(name) is not client.world(source))
    before = client.ask("get", taken)
    assert client.ask("fork", source, taken) == 409
    assert client.ask("get", taken) == before
    assert client.ask("fork", "nobody", other(client, "nobody", near=False)) == 404
    new = other(client, source, near=False)
    session = client.world(source).ledger.sessions[SessionKey("-", source)]
    session.requests.add("r")
    assert client.ask("fork", source, new) == 409
    session.requests.clear()
    world = client.world(new)
    load, world.files._load = world.files._load, lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    assert client.ask("fork", source, new) == 507
    world.files._load = load
    world.tiers.audit.failing = "No space left"
    assert client.ask("fork", source, new) == 503
    world.tiers.audit.failing = ""
    assert client.ask("get", new) == 404
    assert client.ask("fork", source, new)["version"] == 1
    assert not any(list((world.store.folder.exports).iterdir()) for world in client.worlds)


def test_a_fork_that_is_sealed_opens_on_the_other_engine(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_bytes(bytes(range(32)))
    client = Client(tmp_path, 2, key_file=str(file))
    client.world("a").use("a", 4.0)
    new = other(client, "a", near=False)
    assert client.ask("fork", "a", new)["version"] == 1
    assert client.world(new).value(new) == 4.0
    for world in client.worlds:
        world.end()


def test_an_answered_fork_to_another_engine_outlives_a_kill(tmp_path: Path) -> None:
    client = Client(tmp_path, 2)
    client.world("a").use("a", 4.0)
    new = other(client, "a", near=False)
    assert client.ask("fork", "a", new)["version"] == 1
    for world in client.worlds:
        world.crash()
    again = Client(tmp_path, 2)
    assert again.world(new).value(new) == 4.0
    for world in again.worlds:
        world.end()


def test_the_audit_log_of_the_engine_that_has_the_copy_tells_of_a_fork(tmp_path: Path) -> None:
    import json

    client = Client(tmp_path, 2, audit_log="audit.jsonl")
    client.world("a").use("a", 4.0)
    new = other(client, "a", near=False)
    client.ask("fork", "a", new)
    uids = {name: client.world(name).ledger.sessions[SessionKey("-", name)].uid for name in ("a", new)}
    lines = [json.loads(line) for line in (client.world(new).store.folder.root / "audit.jsonl").read_text().splitlines()]
    (fork,) = [line for line in lines if line["event"] == "fork"]
    assert (fork["session"], fork["uid"], fork["to_session"], fork["to_uid"]) == ("a", uids["a"], new, uids[new])
    for world in client.worlds:
        world.end()


def test_one_engine_is_asked_as_ever() -> None:
    """Without --data-parallel-size vLLM's own call is made, with what was given and nothing else."""

    class Core:
        core_engines = (b"\0\0",)

        async def call_utility_async(self, *call: Any) -> Any:
            return {"ok": True, "result": call}

    page = {"limit": 3, "after": None}
    assert asyncio.run(engines.ask(Core(), "list", "-", "", page))["result"] == ("ttt_admin", "list", "-", "", page)
    assert asyncio.run(engines.ask(Core(), "fork", "-", "a", "b"))["result"] == ("ttt_admin", "fork", "-", "a", "b")
    assert asyncio.run(engines.ask_one(Core(), 0, "metrics"))["result"] == ("ttt_admin", "metrics", "", "")
    assert engines.rank_of(Core(), "-/s") is None
