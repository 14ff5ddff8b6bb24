"""`vllm-ttt sessions` on a state dir: what it shows, and that no file from outside does harm."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_admin import Engine
from typer.testing import CliRunner
from world import GEOMETRY, IDENTITY, World

from vllm_ttt.cli import app
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import ConfigError, RequestError, TTTError
from vllm_ttt.frontend import tenants
from vllm_ttt.sessions.offline import Offline, SessionsError, tenant_of
from vllm_ttt.state_dir import StateDir
from vllm_ttt.worker.deltas import delta_file, peft
from vllm_ttt.worker.deltas.delta_file import FileError

pytestmark = pytest.mark.unit


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state dir with sessions a (version 2) and b, of two tenants."""
    world = World(tmp_path / "state")
    for name, tenant in (("a", "-"), ("b", "-"), ("b", "t2")):
        world.use(name, 1.0, 2.0, tenant=tenant)
    world.end()
    return tmp_path / "state"


def run(*args: Any, fails: bool = False) -> Any:
    """The JSON that a command prints."""
    result = CliRunner().invoke(app, ["sessions", *map(str, args), "--json"])
    if fails:
        assert result.exit_code != 0
        return result.exception
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def adapter(folder: Path, **changes: Any) -> Path:
    """An adapter's folder that fits; ``changes`` to its configuration, and to its tensors by full name."""
    tensors = {name: torch.ones(shape) for name, shape in GEOMETRY.shapes.items()}
    data = safetensors.torch.load(peft.adapter(tensors, peft.projections(GEOMETRY, torch.bfloat16), GEOMETRY, "tiny", {}))
    config = peft.config(GEOMETRY, "tiny")
    for key, value in changes.items():
        if isinstance(value, torch.Tensor):
            data[key] = value
        elif value is None:
            del data[key]
        else:
            config[key] = value
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(data, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_list_show_rm(state: Path) -> None:
    assert sorted((s["session_id"], s["tenant"]) for s in run("list", state)) == [("a", "-"), ("b", "-"), ("b", "t2")]
    shown = run("show", state, "a")
    assert (shown["version"], shown["tokens_learned"], len(shown["losses"])) == (2, 32, 2)
    assert "t2" in str(run("show", state, "b", fails=True)), "which of the two"
    assert run("show", state, "b", "--tenant", "t2")["tenant"] == "t2"
    assert run("rm", state, "b", "--tenant", "t2")["deleted"]
    assert run("show", state, "b")["tenant"] == "-"
    assert len(list((state / "sessions").rglob("*.safetensors"))) == 2
    for command in (["show"], ["rm"], ["export", "x"]):
        error = run(command[0], state, "nobody", *command[1:], fails=True)
        assert "there is no session 'nobody'" in str(error)
    assert CliRunner().invoke(app, ["sessions", "list", str(state)]).exit_code == 0
    assert CliRunner().invoke(app, ["sessions", "show", str(state), "a"]).exit_code == 0


@pytest.mark.parametrize("command", [["list"], ["show", "a"], ["export", "a", "out"], ["rm", "a"]], ids=lambda c: c[0])
def test_a_server_is_asked_nothing_where_an_option_is_for_a_state_dir(
    monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """What it would do without the option concerns another session: that of the key."""
    url, key = "http://127.0.0.1:9", ("--api-key", "k")  # nobody is there
    if command[0] != "list":
        error = run(command[0], url, *command[1:], *key, "--tenant", "t2", fails=True)
        assert "--tenant is for a state dir" in str(error)
    error = run(command[0], url, *command[1:], *key, "--key-file", "there", fails=True)
    assert "--key-file is for a state dir" in str(error)
    monkeypatch.setenv("TTT_KEY_FILE", "there")
    assert url in str(run(command[0], url, *command[1:], *key, fails=True)), "it is asked"


def test_a_state_dir_says_what_its_server_says(tmp_path: Path) -> None:
    """Of each session that is on disk: one that is frozen, one that is not. Of one that has learned nothing the server alone
    knows, by its name."""
    world = World(tmp_path / "state", limit=1)
    engine = Engine(world)
    for name in ("free", "frozen", "other"):
        world.use(name, 1.0, 2.0)
        world.save(name)
        if name == "frozen":
            engine.ask("freeze", name)
    world.use("fresh")
    world.use("last", 1.0)
    world.run()
    offline = Offline(tmp_path / "state")
    listed = {s["session_id"]: s for s in offline.list()}
    compared = 0
    for said in engine.ask("list_all")["sessions"]:
        if said["tier"] == "new":
            assert (said["session_id"], said["version"]) == ("fresh", 0)
            assert "fresh" not in listed
        elif said["tier"] == "disk":
            assert listed[said["session_id"]] == said
            detail = engine.ask("get", said["session_id"])
            shown = offline.show(said["session_id"])
            assert {key: shown[key] for key in detail} == detail
            assert [file["version"] for file in shown["files"]] == detail["versions"]
            compared += 1
    assert compared >= 3
    assert [listed[name]["frozen"] for name in ("free", "frozen")] == [False, True]
    assert listed["frozen"]["frozen_reason"] == "asked for"
    world.end()


def test_an_export_falls_back_where_the_newest_version_is_damaged(tmp_path: Path) -> None:
    """As a server does that brings the session back."""
    world = World(tmp_path / "state")
    for value in (1.0, 2.0):
        world.use("a", value)
        world.save("a")
    world.end()
    newest = run("show", tmp_path / "state", "a")["files"][-1]
    assert newest["version"] == 2
    (tmp_path / "state" / newest["file"]).write_bytes(b"damaged")
    assert run("export", tmp_path / "state", "a", tmp_path / "out")["version"] == 1
    for file in run("show", tmp_path / "state", "a")["files"]:
        (tmp_path / "state" / file["file"]).unlink()
    assert "cannot be used" in str(run("export", tmp_path / "state", "a", tmp_path / "out", fails=True))


def test_an_api_key_shows_its_own(state: Path) -> None:
    assert run("list", state, "--api-key", "somebody") == []
    done = run("import", state, "c", adapter(state.parent / "ad"), "--api-key", "somebody")
    assert len(bytes.fromhex(done["tenant"])) == 16
    assert [s["session_id"] for s in run("list", state, "--api-key", "somebody")] == ["c"]


def test_a_key_that_is_replaced_loses_no_session(state: Path) -> None:
    """All of them or none; what they have learned, their versions and their counts are what they were."""
    before = {s["session_id"]: s for s in run("list", state) if s["tenant"] == "-"}
    done = run("move", state, "--to", "first")  # of a server that had no keys
    assert (done["from"], done["moved"]) == ("-", 2)
    run("move", state, "--from", "first", "--to", "second")
    assert run("list", state, "--api-key", "first") == []
    after = {s["session_id"]: s for s in run("list", state, "--api-key", "second")}
    same = lambda s: {key: s[key] for key in s if key != "tenant"}  # noqa: E731
    assert {name: same(s) for name, s in after.items()} == {name: same(s) for name, s in before.items()}
    world = World(state)
    assert world.value("a", tenant=after["a"]["tenant"]) == 3.0
    assert "in use by process" in str(run("move", state, "--from", "second", "--to", "third", fails=True))
    world.end()
    run("import", state, "a", adapter(state.parent / "ad"), "--api-key", "third")
    assert "of the same name, nothing was moved: a" in str(run("move", state, "--from", "second", "--to", "third", fails=True))
    assert len(run("list", state, "--api-key", "second")) == 2
    assert "same" in str(run("move", state, "--from", "second", "--to", "second", fails=True))
    assert run("fsck", state)["problems"] == []


def test_export_and_import(state: Path, tmp_path: Path) -> None:
    run("export", state, "a", tmp_path / "out")
    assert run("import", state, "copy", tmp_path / "out")["version"] == 2
    assert "already" in str(run("import", state, "copy", tmp_path / "out", fails=True))
    world = World(state)
    assert world.value("copy", imported=True) == 3.0
    world.use("copy", 4.0)
    assert world.value("copy") == 7.0
    world.end()
    assert run("fsck", state)["problems"] == []


def test_what_changes_something_keeps_out_while_a_server_runs(state: Path, tmp_path: Path) -> None:
    ad = adapter(tmp_path / "ad")
    world = World(state)
    assert len(run("list", state)) == 3
    assert run("fsck", state)["problems"] == []
    for args in (["import", state, "c", ad], ["rm", state, "a"], ["fsck", state, "--repair"]):
        assert "in use by process" in str(run(*args, fails=True))
    world.end()


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "x" * 129, "ä", "a\x00"])
def test_names_that_lead_elsewhere(state: Path, tmp_path: Path, name: str) -> None:
    ad = adapter(tmp_path / "ad")
    for args in (["show", state, name], ["import", state, name, ad], ["rm", state, name], ["export", state, name, tmp_path]):
        assert isinstance(run(*args, fails=True), RequestError)


A = "base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 8}, "has r 8; expected is 4"),
        ({"lora_alpha": 8}, "lora_alpha"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({B: torch.ones(3, 4)}, "shape"),
        ({B: torch.ones(16, 4, dtype=torch.int32)}, "int32"),
        ({B: torch.full((16, 4), float("nan"))}, "not finite"),
        ({B: torch.full((16, 4), float("inf"))}, "not finite"),
        ({A: torch.ones(4, 8)}, "adapt.seed 0"),
        ({B: None}, "expected are"),
        ({"model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(2, 2)}, "expected are"),
    ],
)
def test_adapters_that_do_not_fit(state: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    error = run("import", state, "c", adapter(tmp_path / "ad", **changes), fails=True)
    assert isinstance(error, SessionsError)
    assert says in str(error)
    assert len(run("list", state)) == 3
    assert run("fsck", state)["leftovers"] == []


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/vllm-ttt-was-here",)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "pickle": lambda: pickle.dumps(Bomb()),
    "10 GB header": lambda: (10 * 2**30).to_bytes(8, "little") + b"{}",
    "header beyond the end": lambda: (100).to_bytes(8, "little") + b"{}",
    "header that is no JSON": lambda: (4).to_bytes(8, "little") + b"\xff\xfe\x00\x01",
    "deep header": lambda: (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "list header": lambda: (2).to_bytes(8, "little") + b"[]",
    "offsets beyond the end": lambda: _header({B: {"dtype": "F32", "shape": [16, 4], "data_offsets": [0, 2**40]}}),
    "negative offsets": lambda: _header({B: {"dtype": "F32", "shape": [16, 4], "data_offsets": [-8, 0]}}),
    "huge shape": lambda: _header({B: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}),
    "metadata of another kind": lambda: _header({"__metadata__": [1]}),
}


def _header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_hostile_files(state: Path, tmp_path: Path, what: str) -> None:
    folder = adapter(tmp_path / "ad")
    (folder / "adapter_model.safetensors").write_bytes(HOSTILE[what]())
    for source in (folder, folder / "adapter_model.safetensors"):
        error = run("import", state, "c", source, fails=True)
        assert isinstance(error, SessionsError)
        assert "cannot be imported" in str(error)
    assert not Path("/tmp/vllm-ttt-was-here").exists()
    assert run("fsck", state)["problems"] == []


def test_files_that_are_no_files(state: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/hosts")
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(20 * 2**30)
    for source in ("pipe", "link", "huge.safetensors", "nothing", "."):
        error = run("import", state, "c", tmp_path / source, fails=True)
        assert isinstance(error, SessionsError)
    assert isinstance(run("import", state, "c", "/dev/zero", fails=True), SessionsError)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_any_byte_changed_is_read_or_refused(data: st.DataObject) -> None:
    tensors = {name: torch.ones(shape) for name, shape in GEOMETRY.shapes.items()}
    whole = bytearray(delta_file.encode(tensors, {"state": "{}"}))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
    try:
        found = delta_file.decode(bytes(whole[:cut]), dict(GEOMETRY.shapes), (torch.float32,))
    except FileError:
        return
    assert {name: tuple(x.shape) for name, x in found.items()} == GEOMETRY.shapes


def test_fsck_repairs(state: Path) -> None:
    file = next(iter(sorted((state / "sessions").rglob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (file.parent / f".{file.name}.0123abcd").write_bytes(b"x")
    found = CliRunner().invoke(app, ["sessions", "fsck", str(state), "--json"])
    assert found.exit_code == 1
    assert len(json.loads(found.stdout)["problems"]) == 1
    assert len(json.loads(found.stdout)["leftovers"]) == 1
    assert CliRunner().invoke(app, ["sessions", "fsck", str(state)]).exit_code == 1
    assert run("fsck", state, "--repair")["repaired"]
    clean = run("fsck", state)
    assert (clean["problems"], clean["leftovers"], clean["aside"]) == ([], [], [file.name])


def test_fsck_forgets_nothing_that_cannot_be_read_now(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    whole = run("list", state)
    with monkeypatch.context() as patch:
        patch.setattr(delta_file, "read", fail)
        for repair in ([], ["--repair"]):
            result = CliRunner().invoke(app, ["sessions", "fsck", str(state), "--json", *repair])
            found = json.loads(result.stdout)
            assert result.exit_code == 1
            assert {p["problem"] for p in found["problems"]} == {f"it cannot be read: {os.strerror(errno.ESTALE)}"}
            assert found["aside"] == []
    assert run("list", state) == whole
    assert run("fsck", state, "--repair")["problems"] == []


def test_a_state_dir_of_something_else_is_refused_by_name(state: Path) -> None:
    for change, says in (
        ({"adapt": {**IDENTITY["adapt"], "rank": 8}}, "adapt.rank 4, and this server has 8"),
        ({"adapt": {**IDENTITY["adapt"], "seed": 7}}, "adapt.seed 0, and this server has 7"),
        ({"model": {"name": "other", "config": "x", "weights": "w"}}, "sessions of the model tiny"),
        ({"model": {"name": "tiny", "config": "c", "weights": "x"}}, "differ"),
    ):
        with pytest.raises(ConfigError, match=says):
            Store(StateDir(state), {**IDENTITY, **change}, 3, 2**40)


def test_a_second_server_is_kept_out(state: Path) -> None:
    world = World(state)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        Store(StateDir(state), IDENTITY, 3, 2**40)
    world.end()
    World(state).end()


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"SQLite format 3\x00" + b"x" * 5000])
def test_a_database_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sessions.db").write_bytes(content)
    with pytest.raises(TTTError):
        Offline(tmp_path).list()


def test_the_secret(tmp_path: Path) -> None:
    folder = StateDir(tmp_path / "state")
    secret = folder.secret()
    assert len(bytes.fromhex(secret)) == 32
    assert folder.secret() == secret
    file = folder.root / "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.root.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        folder.secret()
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        folder.secret()


@pytest.mark.parametrize("file", ["../x", "sessions/../../x", "/etc/passwd", "sessions/x", "secret", "sessions/a/b/c"])
def test_file_names_of_the_database_stay_inside(tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match="not the name"):
        StateDir(tmp_path).path(file)


def test_the_secret_of_the_environment_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the server: who sets TTT_SECRET finds his sessions in the dir under the same key."""
    folder = StateDir(tmp_path)
    by_dir = tenant_of(folder, "key")
    assert by_dir == tenant_of(folder, "key") != tenant_of(folder, "other")
    monkeypatch.setenv(tenants.SECRET_VARIABLE, "s" * 64)
    assert tenant_of(folder, "key") == tenants.derive("s" * 64, b"key") != by_dir
    assert tenant_of(folder, None) == tenants.OPEN
