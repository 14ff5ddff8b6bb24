"""What one API key may have: sessions, and tokens that are learned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_deep_scheduler import PROMPT, Engine
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from world import World

from vllm_ttt import plugin, support
from vllm_ttt.config import parse_config
from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.limits.quotas import Quotas
from vllm_ttt.errors import RequestError
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


def fill(quotas: Quotas, key: str) -> RequestError:
    """The key takes what it gets; how it is refused then."""

    def take() -> None:
        while quotas.total < 1000:
            quotas.check(key)
            quotas.add(key)

    with pytest.raises(RequestError) as caught:
        take()
    return caught.value


@pytest.mark.parametrize("stored", [False, True])
def test_a_key_takes_its_share_of_what_is_free(tmp_path: Path, stored: bool) -> None:
    """However many keys come, the next finds room; a key that is alone has all."""
    world = World(tmp_path / "state", limit=1000)
    store = world.store if stored else None
    quotas = Quotas(100, share=0.5, store=store)
    had = []
    for key in "abcdef":
        error = fill(quotas, key)
        assert error.status == 429
        assert "a key may have 50 % of both together (sessions.key_share)" in error.message
        had.append(quotas.of(key))
    assert had == [50, 25, 12, 6, 3, 2]
    quotas.add("a", -10)
    quotas.check("f")
    alone = Quotas(100, store=store)
    for _ in range(100):
        alone.check("a")
        alone.add("a")
    if not stored:
        with pytest.raises(RequestError, match=r"at most 100 sessions \(sessions.host_gib\)"):
            alone.check("a")
    world.end()


class Shared(Engine):
    """Of a server with so many API keys."""

    def __init__(self, keys: int, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        make = plugin.settings
        monkeypatch.setattr(plugin, "settings", lambda config, http: make(config, http, keys))
        super().__init__("last", **config)


@pytest.mark.parametrize(("keys", "share"), [(0, 1.0), (1, 1.0), (2, 0.5)])
def test_where_there_is_one_key_it_has_all(keys: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler: Any = Shared(keys, monkeypatch, sessions={"resident": 4, "host_gib": 1e-9}).scheduler
    quotas = scheduler.ttt_ledger.quotas
    assert (quotas.share, quotas.places, quotas.per_key) == (share, 4, None)


def test_with_a_state_dir_the_disk_is_shared(tmp_path: Path) -> None:
    config = {"sessions": {"resident": 4, "state_dir": str(tmp_path / "state"), "disk_gib": 0.5}}
    scheduler: Any = Engine("last", **config).scheduler
    hf = scheduler.vllm_config.model_config.hf_text_config
    size = 0.5 * 2**30 / scheduler.ttt_ledger.quotas.places
    parsed = parse_config(config, "last")
    assert size == pytest.approx(support.Geometry.of(hf, parsed.adapt).bytes + parsed.cache.bytes, rel=0.01)


@pytest.mark.parametrize("keys", [[], ["one"], ["one", "two"]])
def test_the_engine_is_told_how_many_keys_there_are(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--api-key", nargs="*")
    args: Any = parser.parse_args(["--plugin", "ttt", *(["--api-key", *keys] if keys else [])])
    found = EngineArgs.from_cli_args(args).additional_config
    assert isinstance(found, dict)
    assert found[plugin.NAME]["keys"] == len(keys)


def test_what_a_key_may_have_learned_in_an_hour() -> None:
    """A new name, a reset and a deletion do not give it back."""
    engine = Engine("last", guard={"every": 0, "hourly_tokens_per_key": 250})
    rpc = lambda method, args=(): [{"tier": "memory", "bytes": 1, "tokens_pending": 0, "norm": {}}]  # noqa: E731
    core = SimpleNamespace(scheduler=engine.scheduler, model_executor=SimpleNamespace(collective_rpc=rpc))
    accepted = {}

    def ask(name: str, prompt: list[int]) -> None:
        request = engine.send(name, prompt, learn=True)
        engine.step()
        accepted[name, len(prompt)] = request in engine.session(name).open
        engine.learned(request, name, 1)
        engine.drain()
        engine.step()

    ask("a", PROMPT)
    ask("b", PROMPT)
    ask("c", PROMPT)
    assert engine.finish(admin(core, "delete", "-", "a"))["ok"]
    assert engine.finish(admin(core, "reset", "-", "b"))["ok"]
    ask("a", PROMPT[:99])
    ask("b", PROMPT[:98])
    ask("d", PROMPT[:40])
    assert accepted == {
        ("a", 100): True, ("b", 100): True, ("c", 100): False, ("a", 99): False, ("b", 98): False, ("d", 40): True,
    }  # fmt: skip
    assert engine.session("c").tokens_skipped["limit"] == 99


def test_what_one_session_may_not_have_learned_is_not_taken_from_its_key() -> None:
    engine = Engine("last", guard={"every": 0, "hourly_tokens": 50, "hourly_tokens_per_key": 250})
    for i in range(5):
        engine.send("a", PROMPT[i:], learn=True)
        engine.step()
    engine.drain()
    assert engine.scheduler.ttt_trust.keys["-"].tokens == pytest.approx(250, abs=1)


def test_a_name_that_gets_a_row_takes_a_place(tmp_path: Path) -> None:
    """A session that has learned nothing takes none; what is reset, rolled back or frozen gets a row, and takes one first."""
    world = World(tmp_path / "state", per_key=1)
    for name in "abc":
        session = world.ledger.open(SessionKey("-", name), learns=False)
        world.tiers.changes(session)
        world.run(lambda session=session: world.tiers.ready(session))
        world.tiers.left(session)
        assert world.ledger.quotas.of("-") == (name != "a")
        if name == "a":
            world.wait(world.tiers.owner.reset(session, dict))
        else:
            owner = world.tiers.owner
            for asked in (owner.reset(session, dict), world.go_back(session, 0), owner.freeze(session, "asked for")):
                with pytest.raises(RequestError, match=r"at most 1 sessions \(sessions.per_key\)"):
                    world.wait(asked)
    assert (world.store.count(), world.ledger.quotas.of("-"), world.ledger.quotas.total) == (1, 1, 1)
    session = world.ledger.find(SessionKey("-", "a"))
    assert session is not None
    gone = world.tiers.owner.remove(session)
    session.requests.add("r")  # it is named again while it is being deleted, by a request that learns nothing
    world.wait(gone)
    session.requests.discard("r")
    world.tiers.left(session)
    world.run()
    assert (world.store.count(), world.ledger.quotas.of("-"), world.ledger.quotas.total) == (0, 0, 0)
    world.end()
