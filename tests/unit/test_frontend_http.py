"""Over HTTP: vLLM's own routes, request models and error handlers, with ours on top, and a fake engine."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completion
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.openai.responses import api_router as responses
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from vllm_ttt.frontend import receipt, tenants
from vllm_ttt.frontend.endpoint import endpoint_plugin
from vllm_ttt.patches import frontend
from vllm_ttt.types import SESSION_ID, SESSION_ID_RULE, SessionKey

pytestmark = pytest.mark.unit

BODIES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}
LOSS = {
    "version": 0,
    "tokens": 2,
    "loss": float("nan"),
    "frozen_loss": None,
    "cache_loss": 1.5,
    "cache_share": 0.25,
    "skipped": "nonfinite",
    "rate": 0.012,
}
SESSION = {
    "session_id": "s", "version": 1, "tokens_seen": 3, "tokens_learned": 2, "tokens_skipped": {"nonfinite": 1},
    "frozen": False, "frozen_reason": None, "probe_regression": float("nan"), "versions": [0, 16],
    "tokens_pending": 0, "requests_open": 0, "created": 1.5, "last_used": 2.5,
    "norm": {"o_proj": 0.1, "down_proj": float("nan")}, "rate": 0.0125, "tier": "slot", "bytes": 10, "losses": [LOSS],
}  # fmt: skip
RECEIPT = {
    "session_id": "s", "deleted": True, "version": 3, "tokens_learned": 9, "digest": "d", "bytes": 9,
    "files": [{"version": 3, "bytes": 9, "sha256": "f", "digest": "d"}], "files_left": [], "database_wiped": True, "time": 1.5,
}  # fmt: skip


class FakeServing:
    """Names the session as vLLM's handlers do, and answers at once. Also the engine that ttt_admin is asked of."""

    def __init__(self) -> None:
        self.engine_core = self
        self.sessions: list[str | None] = []
        self.asked: list[tuple[str, ...]] = []
        self.admin: dict[str, Any] = {}

    async def create(self, request: Any, raw_request: Any) -> Any:
        self.sessions.append(GenerateBaseServing._get_session_id(request, raw_request))
        note = receipt.current.get()
        assert note is not None
        note.open().note({"version": 4, "tokens_learned": 2})
        note.calls[0].finished = True
        if request.stream:
            return self.stream()
        return CompletionResponse(model="m", choices=[], usage=UsageInfo())

    create_completion = create_chat_completion = create_responses = create

    async def stream(self) -> Any:
        yield 'data: {"choices":[{"text":"a"}]}\n\n'
        yield "data: [DONE]\n\n"

    async def call_utility_async(self, *args: str) -> Any:
        self.asked.append(args)
        return self.admin


@pytest.fixture(scope="module")
def serving() -> FakeServing:
    return FakeServing()


def build(serving: FakeServing, keys: list[str] | None) -> FastAPI:
    frontend.install()
    tenants.ensure_secret()
    app = FastAPI()
    app.state.args = Namespace(
        api_key=keys, log_error_stack=False, allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"],
        allowed_headers=["*"], enable_request_id_headers=False, middleware=[], enable_server_load_tracking=False,
    )  # fmt: skip
    app.state.enable_server_load_tracking = False
    app.state.openai_serving_completion = app.state.openai_serving_chat = app.state.openai_serving_responses = serving
    app.state.ttt_engine = serving
    for core in (completion, chat, responses):
        core.attach_router(app)
    endpoint_plugin().attach_router(app)
    init_exception_handler(app)
    init_entrypoints_middleware(app.state.args, app, ())
    return app


@pytest.fixture(scope="module")
def client(serving: FakeServing) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_API_KEY", raising=False)
        yield TestClient(build(serving, None), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def keyed(serving: FakeServing) -> TestClient:
    return TestClient(build(serving, ["key-a", "key-b"]), raise_server_exceptions=False)


def refused(answer: Any, *says: str, status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    for text in says:
        assert text in error["message"]


BAD_NAMES = ["", ".", "..", "a" * 129, "a b", "a/b", "../x", "a\n", "\x00", "ä", "日本", "a\u2028", "%2e", "a\\b", "{}", "'"]


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize("name", [*BAD_NAMES, 5, True, ["s"], {"s": 1}, 1.5])
def test_bad_names_in_the_body(client: TestClient, path: str, name: Any) -> None:
    refused(client.post(path, json={**BODIES[path], "session_id": name}), SESSION_ID_RULE)
    if name is not True:  # vLLM takes it for the number 1
        xargs = {"session_id": name}
        refused(client.post(path, json={**BODIES[path], "vllm_xargs": xargs}), SESSION_ID_RULE, "vllm_xargs")


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize("name", [b"", b"a" * 129, b"a b", b"a/b", b"\xc3\xa4", b"\xff", b"a,b"])
def test_bad_names_in_the_header(client: TestClient, path: str, name: bytes) -> None:
    refused(client.post(path, json=BODIES[path], headers={b"X-Session-ID": name}), SESSION_ID_RULE, "X-Session-ID")


@given(name=st.text(max_size=140))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_a_name_is_served_or_refused(client: TestClient, serving: FakeServing, name: str) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", "session_id": name})
    if SESSION_ID.match(name):
        assert answer.json()["ttt"]["session_id"] == name
        assert serving.sessions[-1] == f"-/{name}"
    else:
        refused(answer, SESSION_ID_RULE)


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"session_id": "a.B-1:_"}, {}),
        ({}, {"x-session-id": "a.B-1:_"}),
        ({"vllm_xargs": {"session_id": "a.B-1:_"}}, {}),
        ({"session_id": "a.B-1:_"}, {"x-session-id": "a.B-1:_"}),
        ({"vllm_xargs": {"session_id": "a.B-1:_"}}, {"x-session-id": "a.B-1:_"}),
        ({"vllm_xargs": {"session_id": "a.B-1:_"}, "session_id": "a.B-1:_"}, [("x-session-id", "a.B-1:_")] * 2),
    ],
)
def test_a_session_is_named_once_or_the_same_way_twice(
    client: TestClient, serving: FakeServing, path: str, body: Any, headers: Any
) -> None:
    answer = client.post(path, json={**BODIES[path], **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert serving.sessions[-1] == "-/a.B-1:_"
    if path == "/v1/completions":
        assert answer.json()["ttt"] == {"session_id": "a.B-1:_", "version": 4, "tokens_learned": 2}


@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"session_id": "a"}, [("x-session-id", "b")]),
        ({"vllm_xargs": {"session_id": "a"}}, [("x-session-id", "b")]),
        ({"session_id": "a", "vllm_xargs": {"session_id": "b"}}, []),
        ({}, [("x-session-id", "a"), ("X-Session-ID", "b")]),
    ],
)
def test_two_names_are_refused(client: TestClient, serving: FakeServing, path: str, body: Any, headers: Any) -> None:
    """A gateway that sets the header says whose session it is: no body gets another one."""
    before = len(serving.sessions)
    answer = client.post(path, json={**BODIES[path], **body}, headers=headers)
    refused(answer, "'a'", "'b'", "name two sessions; send one of them")
    assert len(serving.sessions) == before


def test_without_a_session_nothing_is_added(client: TestClient, serving: FakeServing) -> None:
    for body in ({}, {"session_id": None}, {"vllm_xargs": {"ttt_learn": 0, "mine": "x"}}):
        answer = client.post("/v1/completions", json={"prompt": "x", **body})
        assert answer.status_code == 200
        assert "ttt" not in answer.json()
        assert serving.sessions[-1] is None


def test_a_stream_ends_with_ttt(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", "stream": True, "session_id": "s"})
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(events[-1][6:])["ttt"] == {"session_id": "s", "version": 4, "tokens_learned": 2}


@pytest.mark.parametrize("session", [{}, {"session_id": "s"}])
@pytest.mark.parametrize("path", sorted(BODIES))
@pytest.mark.parametrize(
    ("knob", "value", "says"),
    [
        ("ttt_learn", 2, "ttt_learn must be 0 or 1"),
        ("ttt_learn", -1, "ttt_learn must be 0 or 1"),
        ("ttt_learn", 0.5, "ttt_learn must be 0 or 1"),
        ("ttt_learn", "yes", "ttt_learn must be 0 or 1"),
        ("ttt_learn", "1", "ttt_learn must be 0 or 1"),
        ("ttt_learn", [1], "ttt_learn must be 0 or 1"),
        ("ttt_learn", {"a": 1}, "ttt_learn must be 0 or 1"),
        ("ttt_learn", [{"a": 1}], "ttt_learn must be 0 or 1"),
        ("ttt_learn", None, "ttt_learn must be 0 or 1"),
        ("ttt_learn_output", 10**30, "ttt_learn_output must be 0 or 1"),
        ("ttt_rate", 1, "allowed: ttt_learn, ttt_learn_output"),
        ("ttt_", {"x": 1}, "allowed: ttt_learn, ttt_learn_output"),
    ],
)
def test_bad_knobs(client: TestClient, path: str, session: Any, knob: str, value: Any, says: str) -> None:
    refused(client.post(path, json={**BODIES[path], **session, "vllm_xargs": {knob: value}}), says)


@pytest.mark.parametrize("value", [0, 1, True, 1.0])
def test_good_knobs(client: TestClient, value: Any) -> None:
    body = {"prompt": "x", "session_id": "s", "vllm_xargs": {"ttt_learn": value, "ttt_learn_output": value}}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_other_validation_errors_are_vllms(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "x", "n": "many", "vllm_xargs": {"mine": {"x": 1}}})
    assert answer.status_code == 400
    assert "validation errors" in answer.json()["error"]["message"]


def test_beam_search_has_no_session(client: TestClient) -> None:
    body = {"prompt": "x", "use_beam_search": True, "n": 2}
    refused(client.post("/v1/completions", json={**body, "session_id": "s"}), "beam search")
    refused(client.post("/v1/completions", json=body, headers={"x-session-id": "s"}), "beam search")
    assert client.post("/v1/completions", json=body).status_code == 200


def test_sessions_of_two_keys_are_two(keyed: TestClient, serving: FakeServing) -> None:
    body = {"prompt": "x", "session_id": "s"}
    for key in ("key-a", "key-b", "key-a"):
        answer = keyed.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.json()["ttt"]["session_id"] == "s"
        tenant = SessionKey.from_wire(serving.sessions[-1] or "").tenant
        assert key not in answer.text
        assert tenant not in answer.text
    first, second, third = serving.sessions[-3:]
    assert first == third != second
    assert keyed.post("/v1/completions", json=body).status_code == 401


def test_admin_asks_for_the_sessions_of_the_key(keyed: TestClient, serving: FakeServing) -> None:
    serving.admin = {"ok": True, "result": {"sessions": [SESSION]}}
    key = {"Authorization": "Bearer key-a"}
    keyed.post("/v1/completions", json={"prompt": "x", "session_id": "s"}, headers=key)
    tenant = SessionKey.from_wire(serving.sessions[-1] or "").tenant
    assert keyed.get("/v1/ttt/sessions", headers=key).status_code == 200
    assert serving.asked[-1] == ("ttt_admin", "list", tenant, "", {"limit": 500, "after": None})
    assert keyed.get("/v1/ttt/sessions?limit=3&after=x", headers=key).status_code == 200
    assert serving.asked[-1] == ("ttt_admin", "list", tenant, "", {"limit": 3, "after": "x"})
    before = len(serving.asked)
    for query in ("limit=0", "limit=10001", "limit=x", "after=" + "x" * 1001):
        assert keyed.get(f"/v1/ttt/sessions?{query}", headers=key).status_code == 422
    assert len(serving.asked) == before
    assert keyed.get("/v1/ttt/sessions").status_code == 401


def test_admin_answers(client: TestClient, serving: FakeServing) -> None:
    serving.admin = {"ok": True, "result": {"sessions": [SESSION]}}
    (summary,) = client.get("/v1/ttt/sessions").json()["sessions"]
    assert "losses" not in summary
    serving.admin = {"ok": True, "result": SESSION}
    answer = client.get("/v1/ttt/sessions/s").json()
    assert answer["losses"] == [{**LOSS, "loss": None}]
    assert answer["norm"] == {"o_proj": 0.1, "down_proj": None}
    assert answer["rate"] == summary["rate"] == 0.0125
    assert client.post("/v1/ttt/sessions/s/reset").json()["session_id"] == "s"
    assert serving.asked[-1] == ("ttt_admin", "reset", "-", "s")
    assert answer["probe_regression"] is None
    for op in ("freeze", "unfreeze"):
        assert client.post(f"/v1/ttt/sessions/s/{op}").json()["versions"] == [0, 16]
        assert serving.asked[-1] == ("ttt_admin", op, "-", "s")
    assert client.post("/v1/ttt/sessions/s/rollback", json={"version": 16}).json()["version"] == 1
    assert serving.asked[-1] == ("ttt_admin", "rollback", "-", "s", 16)
    serving.admin = {"ok": True, "result": RECEIPT}
    assert client.delete("/v1/ttt/sessions/s").json() == RECEIPT
    assert serving.asked[-1] == ("ttt_admin", "delete", "-", "s")
    serving.admin = {"ok": True, "result": {"adapt": {"rank": 128}}}
    assert client.get("/v1/ttt/config").json() == {"adapt": {"rank": 128}}


@pytest.mark.parametrize(
    ("method", "suffix"), [("GET", ""), ("DELETE", ""), *(("POST", f"/{op}") for op in ("reset", "freeze", "unfreeze"))]
)
def test_admin_errors(client: TestClient, serving: FakeServing, method: str, suffix: str) -> None:
    for status in (404, 409):
        serving.admin = {"ok": False, "status": status, "message": "session 's' is so"}
        refused(client.request(method, f"/v1/ttt/sessions/s{suffix}"), "session 's' is so", status=status)
    asked = len(serving.asked)
    for name in ("a%20b", "%2F", "a%2Fb", "%00", "%C3%A4", "a" * 129, "%2e%2e%2fx"):
        refused(client.request(method, f"/v1/ttt/sessions/{name}{suffix}"), SESSION_ID_RULE)
    assert len(serving.asked) == asked


@pytest.mark.parametrize(
    ("method", "path", "sent", "says"),
    [
        ("POST", "sessions/s/fork", {"json": {"to": 5}}, "body.to: Input should be a valid string"),
        ("POST", "sessions/s/fork", {"json": {}}, "body.to: Field required"),
        ("POST", "sessions/s/rollback", {"json": {"version": -1, "x" * 500: 1}}, "greater than or equal to 0"),
        ("POST", "sessions/s/rollback", {"json": {"version": 0, **dict.fromkeys("abcdef")}}, "; and 3 more"),
        ("POST", "sessions/s/rollback", {"content": "{", "headers": {"Content-Type": "application/json"}}, "JSON"),
        ("GET", "sessions/s/adapter", {"params": {"format": "pickle"}}, "query.format: Input should be 'safetensors' or 'tar'"),
        ("GET", "sessions", {"params": {"all": "some"}}, "query.all: Input should be a valid boolean"),
    ],
)
def test_what_the_schema_forbids(
    client: TestClient, serving: FakeServing, method: str, path: str, sent: dict[str, Any], says: str
) -> None:
    asked = len(serving.asked)
    answer = client.request(method, f"/v1/ttt/{path}", **sent)
    refused(answer, says, status=422)
    assert len(answer.content) < 1000
    assert len(serving.asked) == asked


def test_the_routes_are_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path: sorted(methods) for path, methods in paths.items() if "ttt" in path} == {
        "/v1/ttt/config": ["get"],
        "/v1/ttt/sessions": ["get"],
        "/v1/ttt/sessions/{session_id}": ["delete", "get"],
        "/v1/ttt/sessions/{session_id}/adapter": ["get"],
        "/v1/ttt/sessions/{session_id}/fork": ["post"],
        "/v1/ttt/sessions/{session_id}/freeze": ["post"],
        "/v1/ttt/sessions/{session_id}/reset": ["post"],
        "/v1/ttt/sessions/{session_id}/rollback": ["post"],
        "/v1/ttt/sessions/{session_id}/save": ["post"],
        "/v1/ttt/sessions/{session_id}/unfreeze": ["post"],
    }
    told = {
        answer["content"]["application/json"]["schema"]["$ref"]
        for path, methods in paths.items()
        if path.startswith("/v1/ttt/")
        for method in methods.values()
        for status, answer in method["responses"].items()
        if status >= "400"
    }
    assert {ref.split("__")[-1].split("/")[-1] for ref in told} == {"ErrorResponse"}, "every refusal has OpenAI's shape"


def test_each_route_declares_what_it_is_refused_with(client: TestClient) -> None:
    """All are a 503 while the server ends. What gives a name a place of its key may find none (429), a page of another site
    changes nothing (403), and the list of all keys needs the admin's (403)."""
    named, written = {400, 404, 422, 503}, {400, 404, 409, 422, 503, 507}
    changed = written | {403}
    expected = {
        ("get", "/config"): {422, 503},
        ("get", "/sessions"): {400, 403, 422, 429, 503},
        ("get", "/sessions/{session_id}"): named,
        ("get", "/sessions/{session_id}/adapter"): written | {429},
        ("delete", "/sessions/{session_id}"): changed,
        ("post", "/sessions/{session_id}/save"): changed,
        **{
            ("post", f"/sessions/{{session_id}}/{op}"): changed | {429}
            for op in ("reset", "freeze", "unfreeze", "rollback", "fork")
        },
    }
    paths = client.get("/openapi.json").json()["paths"]
    assert {
        (method, path.removeprefix("/v1/ttt")): {int(status) for status in answers["responses"] if status >= "400"}
        for path, methods in paths.items()
        if path.startswith("/v1/ttt/")
        for method, answers in methods.items()
    } == expected


def test_without_the_patches_nothing_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "installed", lambda: False)
    app = FastAPI()
    before = list(app.routes)
    endpoint_plugin().attach_router(app)
    assert app.routes == before
    assert not app.user_middleware


def test_a_server_that_ends_takes_nothing_new(serving: FakeServing, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    app = build(serving, None)
    app.state.engine_client = engine = object.__new__(AsyncLLM)
    monkeypatch.setattr("vllm.v1.engine.async_llm.shutdown_prometheus", lambda: None)
    client, asked = TestClient(app, raise_server_exceptions=False), lambda: len(serving.sessions)
    assert client.post("/v1/completions", json=BODIES["/v1/completions"]).status_code == 200
    before = asked()
    engine.shutdown(timeout=60)
    for path in (*BODIES, "/tokenize", "/v1/ttt/sessions/s/save", "/pooling"):
        answer = client.post(path, json={})
        refused(answer, "shutting down", status=503)
        assert answer.headers["connection"] == "close", "the next request of this client goes to another server"
    serving.admin = {"ok": True, "result": {}}
    for path in ("/health", "/ping", "/v1/ttt/config", "/v1/ttt/sessions"):
        refused(client.get(path), "shutting down", status=503)
    refused(client.delete("/v1/ttt/sessions/s"), "shutting down", status=503)
    assert asked() == before
