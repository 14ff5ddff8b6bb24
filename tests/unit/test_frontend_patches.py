"""The patches of the API server: applied once, and refused where vLLM is another."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.plugins
from fastapi.exceptions import RequestValidationError
from vllm import SamplingParams, envs
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.serve.exception_handling import register
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_ttt.errors import ConfigError, PatchContractError, RequestError
from vllm_ttt.patches import _contract, async_llm, endpoint_plugins, frontend, validation
from vllm_ttt.types import SAMPLES

pytestmark = pytest.mark.unit

TARGETS = [
    (GenerateBaseServing, "_get_session_id"),
    (GenerateBaseServing, "_get_session_id_from_headers"),
    (AsyncLLM, "generate"),
    (register, "validation_exception_handler"),
]


def install_all() -> None:
    frontend.install()
    endpoint_plugins.install([])


@pytest.mark.parametrize(("owner", "name"), [*TARGETS, (vllm.plugins, "load_endpoint_plugins")])
def test_installing_twice_wraps_once(owner: Any, name: str) -> None:
    install_all()
    once = inspect.getattr_static(owner, name)
    install_all()
    assert inspect.getattr_static(owner, name) is once
    function: Any = once.__func__ if isinstance(once, staticmethod) else once
    assert getattr(function, _contract.MARK)
    assert not getattr(function.__wrapped__, _contract.MARK, False)
    assert frontend.installed()


@pytest.mark.parametrize(("owner", "name"), TARGETS)
def test_a_changed_signature_is_named(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, something_new: int) -> None: ...

    raw = inspect.getattr_static(owner, name)
    monkeypatch.setattr(owner, name, staticmethod(changed) if isinstance(raw, staticmethod) else changed)
    for apply in (frontend.check, frontend.install):
        with pytest.raises(PatchContractError, match=rf"{name} takes \(self something_new\)"):
            apply()
    assert inspect.getattr_static(owner, name) is not raw  # nothing of it was wrapped meanwhile


@pytest.mark.parametrize(("owner", "name"), [target for target in TARGETS if target[0] is not AsyncLLM])
def test_a_function_that_is_gone_is_named(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(owner, name)
    with pytest.raises(PatchContractError, match=f"{name} does not exist"):
        frontend.check()


def test_a_changed_plugin_loader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.plugins, "load_endpoint_plugins", lambda tasks, strict: [tasks, strict])
    with pytest.raises(PatchContractError, match=r"load_endpoint_plugins takes \(tasks strict\)"):
        endpoint_plugins.install(["ttt"])
    with pytest.raises(PatchContractError):
        endpoint_plugins.check()


class Point:
    """An entry point of a plugin that has the tasks ``tasks``, or that fails."""

    def __init__(self, name: str, tasks: tuple[str, ...] | None = ("generate",), error: Exception | None = None):
        self.name, self.value, self.tasks, self.error, self.made = name, f"somewhere:{name}", tasks, error, 0

    def load(self) -> Any:
        def factory() -> Any:
            self.made += 1
            if self.error:
                raise self.error
            return SimpleNamespace(name=self.name, required_tasks=self.tasks)

        return factory


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Installed endpoint plugins, of which only ttt is asked for by --plugin."""
    found = [Point("other"), Point("ttt"), Point("third", tasks=None)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if "endpoint" in group else [])
    monkeypatch.setattr(endpoint_plugins, "entry_points", lambda group: found if "endpoint" in group else [])
    monkeypatch.setattr(endpoint_plugins, "_asked", {})
    endpoint_plugins.install(["ttt"])
    return found


def load(tasks: tuple[str, ...] | None = ("generate",)) -> list[str]:
    return [plugin.name for plugin in vllm.plugins.load_endpoint_plugins(tasks)]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (None, ["ttt"]),
        ("", ["ttt"]),
        ("other", ["other", "ttt"]),
        ("ttt,third", ["ttt", "third"]),
        ("nobody", ["ttt"]),
    ],
)
def test_endpoint_plugins_that_load(
    points: list[Point], monkeypatch: pytest.MonkeyPatch, allowed: str | None, expected: list[str]
) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert load() == expected
    assert [point.name for point in points if point.made] == expected
    assert all(point.made <= 1 for point in points)
    assert (None if allowed is None else allowed.split(",")) == envs.VLLM_PLUGINS


def test_not_asked_for_is_stock(points: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_plugins, "_asked", {})
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert load() == []
    monkeypatch.setenv("VLLM_PLUGINS", "ttt")
    assert load() == ["ttt"]
    assert not points[0].made


@pytest.mark.usefixtures("points")
def test_tasks_decide_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "third")
    assert load(("embed",)) == ["third"]
    assert load(None) == ["third"]


def test_the_warning_names_those_that_are_left_out(
    points: list[Point], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(vllm.plugins.logger, "propagate", True)
    load()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "['other', 'third']" in warnings[0]
    points[:] = [Point("ttt")]
    caplog.clear()
    load()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_broken_plugin_that_was_asked_for_stops_the_start(points: list[Point], monkeypatch: pytest.MonkeyPatch) -> None:
    points[1].error = RuntimeError("no such thing")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with pytest.raises(ConfigError, match=r"--plugin ttt.*no such thing"):
        load()
    assert envs.VLLM_PLUGINS is None


def test_what_the_server_tells_itself_is_not_the_clients() -> None:
    with pytest.raises(RequestError, match=r"vllm_ttt\.samples is what the server tells itself"):
        async_llm._check("x", SamplingParams(extra_args={SAMPLES: 10**12}), None)


def test_an_error_that_is_a_text_stays_vllms() -> None:
    """As that of a wrong content type is, of requests without a session, too."""

    async def vllms(req: Any, exc: Any) -> Any:
        return exc.errors()

    found = asyncio.run(validation._validation_exception_handler(vllms)(None, RequestValidationError(["Unsupported"])))
    assert found == ["Unsupported"]
