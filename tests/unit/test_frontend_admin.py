"""The admin routes over HTTP, with a fake engine: who may ask what, what is asked of the engine, what a bad request is told."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_frontend_http import RECEIPT, SESSION, FakeServing, build, refused
from world import GEOMETRY

from vllm_ttt import engine_args
from vllm_ttt.errors import ConfigError
from vllm_ttt.frontend import adapter, engines, tenants
from vllm_ttt.worker.deltas import delta_file, peft

pytestmark = pytest.mark.unit

#: (method, what follows the session in the path, body, what the engine is asked)
ROUTES: list[tuple[str, str, Any, tuple[Any, ...]]] = [
    ("GET", "", None, ("get",)),
    ("POST", "/reset", None, ("reset",)),
    ("DELETE", "", None, ("delete",)),
    ("POST", "/freeze", None, ("freeze",)),
    ("POST", "/unfreeze", None, ("unfreeze",)),
    ("POST", "/save", None, ("save",)),
    ("POST", "/rollback", {"version": 3}, ("rollback", 3)),
    ("POST", "/fork", {"to": "t"}, ("fork", "t")),
]


@pytest.fixture(scope="module")
def serving() -> FakeServing:
    return FakeServing()


@pytest.fixture(scope="module")
def keyed(serving: FakeServing, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server with two keys, and an admin key that it learned from a file."""
    file = tmp_path_factory.mktemp("admin") / "key"
    file.write_text("the-key-of-the-admin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tenants.ADMIN_VARIABLE, "")
        patch.delenv("VLLM_API_KEY", raising=False)
        tenants.ensure_secret()
        args = Namespace(api_key=["key-a", "key-b"])
        tenants.admit_admin(args, str(file))
        assert args.api_key == ["key-a", "key-b", "the-key-of-the-admin"]
        assert "the-key" not in os.environ[tenants.ADMIN_VARIABLE]
        yield TestClient(build(serving, args.api_key), raise_server_exceptions=False)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "rest", "body", "asked"), ROUTES, ids=lambda x: str(x))
def test_each_route_asks_for_the_callers_session(
    keyed: TestClient, serving: FakeServing, method: str, rest: str, body: Any, asked: tuple[Any, ...]
) -> None:
    serving.admin = {"ok": True, "result": SESSION | RECEIPT}
    tenants_seen = []
    for key in ("key-a", "key-b"):
        answer = keyed.request(method, "/v1/ttt/sessions/s" + rest, json=body, headers=bearer(key))
        assert answer.status_code == 200, answer.text
        utility, op, tenant, name, *argument = serving.asked[-1]
        assert (utility, op, *argument) == ("ttt_admin", *asked)
        assert name == "s"
        assert tenant not in answer.text
        tenants_seen.append(tenant)
    assert len(set(tenants_seen)) == 2


@pytest.mark.parametrize(("method", "rest", "body", "asked"), [*ROUTES, ("GET", "/adapter", None, ())], ids=lambda x: str(x))
def test_each_route_needs_a_key(
    keyed: TestClient, serving: FakeServing, method: str, rest: str, body: Any, asked: tuple[Any, ...]
) -> None:
    before = len(serving.asked)
    for headers in ({}, bearer("key-c"), {"Authorization": "key-a"}):
        assert keyed.request(method, "/v1/ttt/sessions/s" + rest, json=body, headers=headers).status_code == 401
    for path in ("/v1/ttt/sessions", "/v1/ttt/config", "/v1/ttt/sessions?all=true"):
        assert keyed.get(path).status_code == 401
    assert len(serving.asked) == before


def test_only_the_admin_key_lists_all(keyed: TestClient, serving: FakeServing) -> None:
    serving.admin = {"ok": True, "result": {"sessions": [{**SESSION, "tenant": "t"}]}}
    answer = keyed.get("/v1/ttt/sessions?all=true", headers=bearer("the-key-of-the-admin"))
    assert answer.json()["sessions"][0]["tenant"] == "t"
    assert serving.asked[-1][1] == "list_all"
    before = len(serving.asked)
    refused(keyed.get("/v1/ttt/sessions?all=true", headers=bearer("key-a")), "admin_key_file", status=403)
    assert len(serving.asked) == before
    assert keyed.get("/v1/ttt/sessions", headers=bearer("key-a")).status_code == 200
    assert serving.asked[-1][1] == "list"


@pytest.mark.parametrize("name", ["a" * 129, "a b", "a/b", "a\\b", "{}", "'"])
@pytest.mark.parametrize("rest", ["/save", "/freeze", "/adapter"])
def test_bad_names(keyed: TestClient, serving: FakeServing, name: str, rest: str) -> None:
    before = len(serving.asked)
    method = "GET" if rest == "/adapter" else "POST"
    refused(keyed.request(method, f"/v1/ttt/sessions/{name}{rest}", headers=bearer("key-a")), "1 to 128 characters")
    assert len(serving.asked) == before


@pytest.mark.parametrize(
    ("rest", "body", "status"),
    [
        *(("/rollback", {"version": v}, 422) for v in (-1, 2**31, "1", 1.5, None, True)),
        ("/rollback", {}, 422),
        ("/rollback", {"version": 1, "more": 2}, 422),
        ("/rollback", [1], 422),
        *(("/fork", {"to": to}, 400) for to in ("", "a b", "../x", "x" * 129)),
        *(("/fork", {"to": to}, 422) for to in (5, None)),
        ("/fork", {}, 422),
    ],
)
def test_bad_bodies(keyed: TestClient, serving: FakeServing, rest: str, body: Any, status: int) -> None:
    before = len(serving.asked)
    refused(keyed.post("/v1/ttt/sessions/s" + rest, json=body, headers=bearer("key-a")), status=status)
    assert len(serving.asked) == before


@pytest.mark.parametrize("status", [403, 404, 409, 429, 503, 507])
def test_refusals_of_the_engine(keyed: TestClient, serving: FakeServing, status: int) -> None:
    serving.admin = {"ok": False, "status": status, "message": "says why"}
    for method, rest, body, _ in ROUTES:
        answer = keyed.request(method, "/v1/ttt/sessions/s" + rest, json=body, headers=bearer("key-a"))
        refused(answer, "says why", status=status)


def assert_adapter(sent: bytes, written: bytes, told: dict[str, Any]) -> None:
    """What the worker has written, and in its metadata where it comes from."""
    header, before = delta_file.read_header(sent), delta_file.read_header(written)
    assert header["__metadata__"] == before["__metadata__"] | {"provenance": json.dumps(told)}
    found, expected = safetensors.torch.load(sent), safetensors.torch.load(written)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_an_adapter_is_streamed_and_its_file_is_gone(keyed: TestClient, serving: FakeServing, tmp_path: Path) -> None:
    tensors = {name: torch.ones(shape) for name, shape in GEOMETRY.shapes.items()}
    data = peft.adapter(tensors, peft.projections(GEOMETRY, torch.bfloat16), GEOMETRY, "tiny", {"version": "3"})
    for format in ("safetensors", "tar"):
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        told = {"session_id": "s", "version": 3, "base_model": {"name": "tiny"}}
        serving.admin = {
            "ok": True,
            "result": {"path": str(path), "bytes": len(data), "version": 3, "provenance": told, "key": ""},
        }
        answer = keyed.get(f"/v1/ttt/sessions/s/adapter?format={format}", headers=bearer("key-a"))
        assert answer.status_code == 200
        assert not path.exists()
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert f's.{format}"' in answer.headers["content-disposition"]
        if format == "safetensors":
            assert_adapter(answer.content, data, told)
            continue
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            assert tar.getnames() == ["adapter_config.json", "provenance.json", "adapter_model.safetensors"]
            config, origin, model = (file for name in tar.getnames() if (file := tar.extractfile(name)) is not None)
            assert_adapter(model.read(), data, told)
            assert json.loads(config.read()) == peft.config(GEOMETRY, "tiny")
            assert json.loads(origin.read()) == told
    refused(keyed.get("/v1/ttt/sessions/s/adapter?format=pickle", headers=bearer("key-a")), status=422)


@pytest.mark.parametrize(
    ("content", "keys", "says"),
    [
        ("short", ["key-a"], "at least 16"),
        ("two keys in one file", ["key-a"], "without blanks"),
        ("the-key-of-the-admin", [], "needs --api-key"),
        (None, ["key-a"], "cannot be read"),
    ],
)
def test_admin_key_files_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, keys: list[str], says: str
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        tenants.admit_admin(Namespace(api_key=keys), str(file))
    assert content is None or content not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": "1"}', b'{"version": 1e999}'])
@pytest.mark.parametrize("rest", ["/rollback", "/fork"])
def test_bodies_that_cannot_be_read(keyed: TestClient, rest: str, content: bytes) -> None:
    headers = {**bearer("key-a"), "Content-Type": "application/json"}
    refused(keyed.post("/v1/ttt/sessions/s" + rest, content=content, headers=headers), status=422)


CONFIG = {
    "adapt": {"rank": 128},
    "sessions": {"resident": 64, "state_dir": "/srv/private", "admin_key_file": "/etc/private"},
    "guard": {"every": 64, "probe": None},
}


def test_paths_are_shown_to_the_admin_alone(keyed: TestClient, serving: FakeServing) -> None:
    serving.admin = {"ok": True, "result": CONFIG}
    assert keyed.get("/v1/ttt/config", headers=bearer("the-key-of-the-admin")).json() == CONFIG
    seen = keyed.get("/v1/ttt/config", headers=bearer("key-a"))
    assert "private" not in seen.text
    assert seen.json() == CONFIG | {"sessions": {"resident": 64, "state_dir": "set", "admin_key_file": "set"}}


@pytest.fixture(scope="module")
def openly(serving: FakeServing) -> Iterator[TestClient]:
    """A server that asks for no key, and lets nobody in by --allowed-origins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_API_KEY", raising=False)
        app = build(serving, None)
        app.state.args.allowed_origins = []
        yield TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


CHANGING = [route for route in ROUTES if route[0] != "GET"]
OTHERS = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]
SAME: list[dict[str, str]] = [
    {},
    {"Origin": "http://127.0.0.1:8000"},
    {"Origin": "https://front.example", "Sec-Fetch-Site": "same-origin"},  # behind a proxy that says another host
    {"Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize(("method", "rest", "body", "asked"), CHANGING, ids=lambda x: str(x))
def test_a_page_of_another_site_changes_nothing(
    openly: TestClient, keyed: TestClient, serving: FakeServing, method: str, rest: str, body: Any, asked: Any
) -> None:
    serving.admin = {"ok": True, "result": SESSION | RECEIPT}
    path = "/v1/ttt/sessions/s" + rest
    for headers in OTHERS:
        before = len(serving.asked)
        refused(openly.request(method, path, json=body, headers=headers), "--allowed-origins", "--api-key", status=403)
        assert len(serving.asked) == before, "the engine was asked"
        assert keyed.request(method, path, json=body, headers=headers | bearer("key-a")).status_code == 200
    for headers in SAME:
        assert openly.request(method, path, json=body, headers=headers).status_code == 200, headers


def test_a_site_that_the_operator_names_may(openly: TestClient, serving: FakeServing, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.admin = {"ok": True, "result": SESSION}
    app: Any = openly.app
    monkeypatch.setattr(app.state.args, "allowed_origins", ["http://mine.example"])
    for origin, status in (("http://mine.example", 200), ("http://evil.example", 403)):
        assert openly.post("/v1/ttt/sessions/s/reset", headers={"Origin": origin}).status_code == status


@pytest.mark.parametrize("held", [True, False])
def test_where_servers_share_a_state_dir_a_call_has_its_session_first(
    keyed: TestClient, serving: FakeServing, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """All but those that only look. What another server keeps is a 409 that says when to ask again."""
    config = engine_args(config={"sessions": {"shared": True, "state_dir": "s"}})["additional_config"]
    monkeypatch.setattr(serving, "vllm_config", SimpleNamespace(additional_config=config), raising=False)
    monkeypatch.setattr(engines, "HANDOVER", 0.0)
    monkeypatch.setattr(engines, "_PAUSE", 0.0)
    serving.admin = {"ok": True, "result": {**SESSION, **RECEIPT, "held": held}}
    for method, rest, body, (op, *_) in ROUTES:
        del serving.asked[:]
        answer = keyed.request(method, "/v1/ttt/sessions/s" + rest, json=body, headers=bearer("key-a"))
        asked = [(call[1], call[3]) for call in serving.asked]
        claims = {"get": [], "fork": [("claim", "s"), ("claim", "t")]}.get(op, [("claim", "s")])
        if held or not claims:
            assert answer.status_code == 200, answer.text
            assert asked == [*claims, (op, "s")]
        else:
            refused(answer, "another server", status=409)
            assert answer.headers["retry-after"] == "2"
            assert {call for call, _ in asked} == {"claim"}


def test_what_the_engine_refuses_says_when_to_ask_again(keyed: TestClient, serving: FakeServing) -> None:
    serving.admin = {"ok": False, "status": 409, "message": "another server has this session", "retry_after": 2}
    answer = keyed.post("/v1/ttt/sessions/s/save", headers=bearer("key-a"))
    refused(answer, "another server", status=409)
    assert answer.headers["retry-after"] == "2"
    serving.admin = {"ok": False, "status": 409, "message": "it has requests"}
    assert "retry-after" not in keyed.post("/v1/ttt/sessions/s/save", headers=bearer("key-a")).headers


class Client:
    """One that has asked the server ``app`` for an adapter, and reads a message when it is told to."""

    def __init__(self, app: FastAPI, key: str = "key-a", spec: str = "2.3", session: str = "s"):
        path = f"/v1/ttt/sessions/{session}/adapter"
        headers = [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        self.scope = scope | {"asgi": {"version": "3.0", "spec_version": spec}, "http_version": "1.1", "scheme": "http"}
        self.reads, self.gone, self.messages = asyncio.Event(), asyncio.Event(), list[Any]()
        #: raised where something is sent
        self.broken: OSError | None = None
        self.task = asyncio.ensure_future(app(self.scope, self.receive, self.send))

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.broken is not None:
            raise self.broken
        self.messages.append(message)
        if message["type"] == "http.response.body":
            await self.reads.wait()

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    async def answered(self) -> int:
        while not self.messages:
            await asyncio.sleep(0)
        return self.messages[0]["status"]


class Exporting(FakeServing):
    """Each answer names a file of its own."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.failed = folder, False

    async def call_utility_async(self, *args: str) -> Any:
        if self.failed:
            return {"ok": False, "status": 404, "message": "no such session"}
        self.asked.append(args)
        path = self.folder / f"{len(self.asked)}.safetensors"
        header = json.dumps({"__metadata__": {"adapter_config": "{}"}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3 * 2**20))
        return {"ok": True, "result": {"path": str(path), "provenance": {}, "key": ""}}


@pytest.fixture
def exporting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exporting:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return Exporting(tmp_path)


def still_open(folder: Path) -> list[str]:
    """Files of the folder that this process holds, and that have no name any more."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(str(folder))]


def test_a_key_has_so_many_downloads_until_they_have_ended(exporting: Exporting) -> None:
    """Their bytes stay on the disk for so long. Those of another key go on."""

    async def run() -> None:
        app = build(exporting, ["key-a", "key-b"])
        clients = [Client(app) for _ in range(4)]
        assert [await client.answered() for client in clients] == [200] * 4
        fifth = Client(app)
        assert await fifth.answered() == 429
        fifth.reads.set()
        await fifth.task
        assert "a key may wait for 4 adapters at once" in fifth.messages[1]["body"].decode()
        assert await Client(app, "key-b").answered() == 200
        assert len(exporting.asked) == 5, "the engine is not asked for what is refused"
        clients[0].reads.set()
        await clients[0].task
        assert sum(len(message["body"]) for message in clients[0].messages[1:]) > 3 * 2**20
        assert await Client(app).answered() == 200
        assert len(still_open(exporting.folder)) == 5
        assert app.state.ttt_adapters.counts.total() == 5

    asyncio.run(run())


@pytest.mark.parametrize("left", ["gone", "gone before the first piece", "broken", "refused", "not a session id", "given up"])
def test_a_download_that_does_not_come_to_its_end_is_given_back(exporting: Exporting, left: str) -> None:
    async def run() -> None:
        app = build(exporting, ["key-a"])
        exporting.failed = left == "refused"
        client = Client(app, spec="2.4" if left == "broken" else "2.3", session="a b" if left == "not a session id" else "s")
        if left == "broken":
            client.broken = BrokenPipeError()
        elif left == "gone before the first piece":
            client.gone.set()
        elif left == "gone":
            await client.answered()
            client.gone.set()
        elif left == "given up":
            while not exporting.asked:
                await asyncio.sleep(0)
            client.task.cancel()
        if left in ("refused", "not a session id"):
            client.reads.set()
        await asyncio.wait([client.task])
        assert not app.state.ttt_adapters.counts
        assert not still_open(exporting.folder)

    asyncio.run(run())


def test_a_download_of_which_nothing_is_taken_ends(exporting: Exporting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "PATIENCE", 0.01)

    async def run() -> None:
        app = build(exporting, ["key-a"])
        client = Client(app)
        await asyncio.wait_for(client.task, 10)
        assert client.status == 200
        assert not any(message.get("more_body") is False for message in client.messages), "it is not taken for the whole"
        assert not app.state.ttt_adapters.counts
        assert not still_open(exporting.folder)

    asyncio.run(run())
