"""Which engine has a session, what each engine's part of a server's limits is, and what cannot be placed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ttt.config import parse_config
from vllm_ttt.engine.limits.admission import check_owner
from vllm_ttt.errors import ConfigError, RequestError
from vllm_ttt.placement import check_engines, config_of_engine, owner
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

WIRES = [SessionKey(tenant, f"session-{i}").wire() for tenant in ("-", "t" * 32) for i in range(5000)]


def test_every_process_and_every_release_says_the_same() -> None:
    """Another answer would leave sessions on a shelf where nobody looks."""
    assert [owner(wire, 2) for wire in ("-/alice", "-/bob", "-/carol", "k/alice")] == [0, 0, 1, 1]
    assert [owner(wire, 3) for wire in ("-/alice", "-/bob", "-/carol", "k/alice")] == [0, 0, 1, 2]


@pytest.mark.parametrize("engines", [1, 2, 3, 8])
def test_engines_have_as_many_sessions(engines: int) -> None:
    counts = Counter(owner(wire, engines) for wire in WIRES)
    assert set(counts) == set(range(engines))
    assert all(abs(count * engines / len(WIRES) - 1) < 0.12 for count in counts.values()), counts


@pytest.mark.parametrize("engines", [1, 2, 3, 7])
def test_one_engine_more_takes_its_share_and_moves_nobody_else(engines: int) -> None:
    moved = [(owner(wire, engines), to) for wire in WIRES if (to := owner(wire, engines + 1)) != owner(wire, engines)]
    assert {to for _, to in moved} == {engines}
    assert abs(len(moved) * (engines + 1) / len(WIRES) - 1) < 0.12


def test_the_parts_of_a_limit_are_the_limit(tmp_path: Path) -> None:
    sessions = {"per_key": 7, "disk_gib": 3.0, "state_dir": str(tmp_path / "state"), "audit_log": "audit.jsonl"}
    config = parse_config({"sessions": sessions, "guard": {"hourly_tokens_per_key": 1000}})
    parts = [config_of_engine(config, engine, 3) for engine in range(3)]
    assert sum(part.sessions.per_key or 0 for part in parts) == 7
    assert sum(part.sessions.disk_gib for part in parts) == pytest.approx(3.0)
    assert sum(part.guard.hourly_tokens_per_key for part in parts) == 1000
    assert [part.sessions.state_dir for part in parts] == [str(tmp_path / "state" / x) for x in ("", "engine-1", "engine-2")]
    logs = [part.sessions.audit_path for part in parts]
    assert logs == [tmp_path / "state" / x / "audit.jsonl" for x in ("", "engine-1", "engine-2")]
    elsewhere = config.model_copy(update={"sessions": config.sessions.model_copy(update={"audit_log": "/var/log/a"})})
    assert [str(config_of_engine(elsewhere, e, 3).sessions.audit_path) for e in (0, 2)] == ["/var/log/a", "/var/log/a.engine-2"]
    untouched = {"resident", "host_gib", "keep_versions", "autosave", "ttl"}
    assert all(getattr(part.sessions, x) == getattr(config.sessions, x) for part in parts for x in untouched)
    assert config_of_engine(config, 0, 1) is config, "one engine has all of it"


def vllm_config(engines: int = 2, **changes: Any) -> Any:
    """What `check_engines` reads of vLLM's."""
    options = {"http": True, "is_moe": False, "external": False, "local": engines, "backend": "mp", "index": 0, **changes}
    parallel = SimpleNamespace(
        data_parallel_size=engines, local_engines_only=options["external"], data_parallel_size_local=options["local"],
        data_parallel_backend=options["backend"], data_parallel_index=options["index"],
    )  # fmt: skip
    model = SimpleNamespace(is_moe=options["is_moe"])
    return SimpleNamespace(
        parallel_config=parallel, model_config=model, device_config=SimpleNamespace(device_type="cpu"),
        additional_config={"ttt": {"http": options["http"]}},
    )  # fmt: skip


SHARED = {"shared": True, "state_dir": "s"}


@pytest.mark.parametrize(
    ("changes", "sessions", "says"),
    [
        ({"http": False}, {}, "a script: it needs vllm serve"),
        ({"external": True}, {}, "--data-parallel-external-lb, --data-parallel-hybrid-lb"),
        ({"local": 1}, {}, "engines on other machines"),
        ({"backend": "ray"}, {}, "--data-parallel-backend ray"),
        ({"is_moe": True}, {}, "a mixture of experts"),
        ({}, {"per_key": 1}, "sessions.per_key 1: each engine has its part of it, so it must be 2 at least"),
        ({}, SHARED, "--data-parallel-size 2: start so many servers instead"),
        ({"engines": 1, "http": False}, SHARED, "sessions.shared is not supported with a script"),
        ({"engines": 1}, {"shared": True}, "no state dir"),
        ({"engines": 1}, {**SHARED, "audit_log": "audit.jsonl"}, "sessions.audit_log"),
    ],
)
def test_what_cannot_be_placed_is_refused(changes: dict[str, Any], sessions: dict[str, Any], says: str) -> None:
    made = vllm_config(**changes)
    with pytest.raises(ConfigError) as error:
        check_engines(made, parse_config({"sessions": sessions}))
    assert says in str(error.value)
    assert "engines" not in made.additional_config["ttt"]


def test_a_part_of_a_limit_is_never_no_limit() -> None:
    with pytest.raises(ConfigError, match=r"guard\.hourly_tokens_per_key 1: .* it must be 2 at least, or 0 for no limit"):
        check_engines(vllm_config(), parse_config({"guard": {"hourly_tokens_per_key": 1}}))
    for hourly in (0, 2):
        check_engines(vllm_config(), parse_config({"guard": {"hourly_tokens_per_key": hourly}}))


def test_a_request_that_came_to_another_engine_is_refused() -> None:
    for engines, index, refused in ((1, 0, False), (2, 1, False), (2, 0, True)):
        made = vllm_config(engines, index=index)
        check_engines(made, parse_config(None))
        if refused:
            with pytest.raises(RequestError, match="belongs to engine 1, and its request came to engine 0") as error:
                check_owner(SessionKey("-", "carol"), made)
            assert error.value.status == 503
        else:
            check_owner(SessionKey("-", "carol"), made)
