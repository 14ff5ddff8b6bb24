"""`vllm-ttt check --vllm-source`: it agrees with the live check, and finds what has changed in another vLLM."""

from __future__ import annotations

import ast
import inspect
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vllm_ttt
from vllm_ttt import cli, patches, plugin
from vllm_ttt.errors import ConfigError, PatchContractError
from vllm_ttt.patches import _contract, source_check
from vllm_ttt.patches._source import Module, Source, parameters

pytestmark = pytest.mark.unit

OURS = Path(vllm_ttt.__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of those files of the installed vLLM that the check reads."""
    sources: list[Source] = []
    init = Source.__init__

    def noted(self: Source, *args: Any) -> None:
        init(self, *args)
        sources.append(self)

    root = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "__init__", noted)
        rows = source_check.check_source(source_check.installed_source().path)
    assert all(row.ok for row in rows), rows
    for source in sources:
        for module in source.modules if source.package == "vllm" else ():
            if (file := source.file(module)) is not None:
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_bytes((source.path.parent / file).read_bytes())
    return root


def copy(installed: Path, to: Path, file: str, change: Callable[[str], str]) -> Path:
    """A copy of which one file is another."""
    for path in installed.rglob("*.py"):
        (to / path.relative_to(installed)).parent.mkdir(parents=True, exist_ok=True)
        (to / path.relative_to(installed)).write_bytes(path.read_bytes())
    text = (to / "vllm" / file).read_text()
    assert change(text) != text
    (to / "vllm" / file).write_text(change(text))
    return to


def failed(path: Path) -> dict[str, str]:
    return {row.what: row.why for row in source_check.check_source(path) if not row.ok}


def test_the_installed_vllm_passes_as_it_does_live(installed: Path) -> None:
    assert failed(installed) == {}
    live = plugin.check()
    assert all(row.ok for row in live)
    names = [row.what for row in source_check.check_source(installed)]
    assert names[: len(live)] == [row.what for row in live], "release and patches, as the live check has them"
    for verify in patches.worker_contracts().values():
        verify()


def test_every_signature_is_read_as_it_is_live() -> None:
    source, asked = source_check.installed_source(), list[_contract.Asked]()
    for verify in {**patches.contracts(), **patches.worker_contracts()}.values():
        with _contract.recorded() as notes:
            verify()
        asked += notes
    assert len(asked) >= 40
    assert {source_check.look_up(source, each) in (each.parameters or (None,)) for each in asked} == {True}


def test_no_contract_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module that compares something of vLLM's is among those that are asked."""
    asking = set()

    def note(*_: Any) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        asking.add(frame.f_back.f_globals["__name__"])

    for name in ("check", "absent"):
        monkeypatch.setattr(_contract, name, note)
    for verify in {**patches.contracts(), **patches.worker_contracts()}.values():
        verify()
    users = {
        ".".join(path.relative_to(OURS.parent).with_suffix("").parts)
        for path in OURS.rglob("*.py")
        if re.search(r"\b_contract\.(check|absent|wrap|add)\(", path.read_text(encoding="utf-8"))
    }
    assert asking == users


@pytest.mark.parametrize(
    ("file", "old", "new", "row", "says"),
    [
        (
            "v1/engine/core.py", "def _handle_shutdown(self)", "def _handle_shutdown(self, now)", "patch engine",
            r"^vllm\.v1\.engine\.core\.EngineCoreProc\._handle_shutdown takes \(self now\) in this vLLM; .* for \(self\)$",
        ),
        (
            "v1/core/kv_cache_utils.py", "def _gen_lora_extra_hash_keys(", "def _gen_lora_keys(", "patch engine",
            r"^vllm\.v1\.core\.kv_cache_utils\._gen_lora_extra_hash_keys does not exist in this vLLM$",
        ),
        (
            "v1/engine/core.py", "    def _handle_shutdown(", "    def ttt_admin(self): ...\n\n    def _handle_shutdown(",
            "", "",
        ),
        (
            "v1/engine/core.py", "class EngineCore:\n", "class EngineCore:\n    def ttt_admin(self): ...\n\n", "patch engine",
            r"^vllm\.v1\.engine\.core\.EngineCore has a method ttt_admin of its own$",
        ),
        (
            "model_executor/layers/logits_processor.py", "embedding_bias: ", "bias: ", "patch worker/step/lm_head",
            r"LogitsProcessor\.forward takes \(self lm_head hidden_states bias",
        ),
        (
            "v1/worker/gpu_worker.py", "def load_model(self", "def load_model(self, how", "overridden methods",
            r"\bvllm\.v1\.worker\.gpu_worker\.Worker\.load_model, which TTTCUDAWorker overrides, takes \(self how",
        ),
        (
            "lora/worker_manager.py", "def _load_adapter(", "def _read_adapter(", "overridden methods",
            r"LRUCacheWorkerLoRAManager\._load_adapter, which SessionLoRAManager overrides, does not exist in this vLLM",
        ),
        (
            "exceptions.py", "class GracefulHTTPError", "class HTTPError", "imported names",
            r"^vllm\.exceptions\.GracefulHTTPError, which vllm_ttt\.frontend\.refusals imports, does not exist in this vLLM$",
        ),
        (
            "envs.py", "VLLM_USE_RUST_FRONTEND: bool", "VLLM_USE_FRONTEND: bool", "imported names",
            r"^vllm\.envs\.VLLM_USE_RUST_FRONTEND, which vllm_ttt\.support",
        ),
    ],
)  # fmt: skip
def test_what_has_changed_is_found(installed: Path, tmp_path: Path, file: str, old: str, new: str, row: str, says: str) -> None:
    found = failed(copy(installed, tmp_path, file, lambda text: text.replace(old, new, 1)))
    assert list(found) == ([row] if row else [])
    if row:
        assert re.search(says, found[row])


def test_a_wheel_is_read_as_it_is(installed: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.99.0-cp38-abi3-manylinux1_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in installed.rglob("*.py"):
            if path.name != "_version.py":
                file.write(path, path.relative_to(installed))
    assert failed(wheel) == {"vLLM 0.99.0": source_check.support.release("0.99.0")[2]}, "nothing else"
    done = CliRunner().invoke(cli.app, ["check", "--json", "--vllm-source", str(wheel)])
    assert done.exit_code == 1
    assert '"check": "imported names",\n  "ok": true' in done.stdout


def test_what_is_no_vllm_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no wheel")
    for path, says in ((tmp_path, "has no Python package vllm"), (tmp_path / "text.whl", "neither a folder nor a wheel")):
        with pytest.raises(ConfigError, match=says):
            source_check.check_source(path)


def test_several_signatures() -> None:
    class Owner:
        def method(self, a: int, b: int = 0) -> None: ...

    _contract.check(Owner, "method", "self a", "self a b")
    with pytest.raises(PatchContractError, match=r"takes \(self a b\) in this vLLM; .* for \(self a\) or \(self c\)"):
        _contract.check(Owner, "method", "self a", "self c")


def test_names_of_a_module() -> None:
    text = """
if TYPE_CHECKING:
    A: int = 1
else:
    A = B = 2
try:
    from fast import f
except ImportError:
    f = None
from .near import g as h
import os.path
for i in range(3):
    pass
@overload
def k(a): ...
def k(a, /, b, *c, d, **e): ...
"""
    module = Module("vllm.some.where", ast.parse(text), False)
    assert set(module.names) >= {"A", "B", "f", "h", "os", "k"}
    assert getattr(module.names["h"], "module", None) == "vllm.some.near"
    assert getattr(module.names["f"], "module", None) == "fast", "the first branch is what counts"
    (function,) = [node for name, node in module.names.items() if name == "k"]
    assert isinstance(function, ast.FunctionDef)
    assert parameters(function) == "a b *c d **e"
