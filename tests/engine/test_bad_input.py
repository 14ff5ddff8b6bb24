"""Each mistake is a 4xx that says what is allowed; the server goes on."""

from __future__ import annotations

import time
from typing import Any

import pytest
from served import Documents, Served, completion

from vllm_ttt.types import SESSION_ID_RULE

pytestmark = pytest.mark.engine

NAMES: list[Any] = [
    *("", ".", "..", "x" * 129, "two words", "a/b", "a\\b", "a?b", "tab\t", "new\nline", "nul\x00", "bell\x07", "é", "会话"),
    *(7, ["a"], {"a": 1}),
]
ROUTES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
}
#: refused by the engine, on a CPU
SEEDED = {"temperature": 1, "seed": 1, "vllm_xargs": {"ttt_interleave": 1}}
KNOBS: list[tuple[dict[str, Any], str]] = [
    ({"ttt_learn": 2}, "ttt_learn must be 0 or 1; got 2"),
    ({"ttt_learn": -1}, "ttt_learn must be 0 or 1; got -1"),
    ({"ttt_learn": 0.5}, "ttt_learn must be 0 or 1; got 0.5"),
    ({"ttt_learn": "yes"}, "ttt_learn must be 0 or 1; got 'yes'"),
    ({"ttt_learn": [1]}, "ttt_learn must be 0 or 1"),
    ({"ttt_learn": {"a": 1}}, "ttt_learn must be 0 or 1"),
    ({"ttt_learn": None}, "ttt_learn must be 0 or 1"),
    ({"ttt_learn_output": 3}, "ttt_learn_output must be 0 or 1; got 3"),
    ({"ttt_lern": 1}, "unknown key 'ttt_lern' in vllm_xargs; allowed: ttt_learn, ttt_learn_output"),
    ({"ttt_" + "x" * 500: 1}, "allowed: ttt_learn, ttt_learn_output"),
]


@pytest.fixture(autouse=True)
def _the_server_goes_on(server: Served, documents: Documents) -> Any:
    known = {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]}
    yield
    assert {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]} == known, "no session was made"
    name = server.fresh("after")
    assert server.complete(documents["kjv"][0][:40], name)["ttt"]["tokens_learned"] == 39
    server.settle()
    assert server.http.delete(f"/v1/ttt/sessions/{name}").status_code == 200


def refused(answer: Any, message: str) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_session_ids_in_the_body(server: Served, route: str) -> None:
    for name in NAMES:
        body = {"model": "demo", **ROUTES[route], "session_id": name}
        refused(server.http.post(route, json=body), SESSION_ID_RULE)
        refused(server.http.post(route, json={**body, "stream": True}), SESSION_ID_RULE)


@pytest.mark.parametrize("route", ROUTES)
def test_session_ids_in_the_header(server: Served, route: str) -> None:
    """What HTTP lets through at all."""
    body = {"model": "demo", **ROUTES[route]}
    for name in (b"", b"x" * 129, b"two words", b"a/b", b"a\tb", "é".encode(), "é".encode("latin-1")):
        refused(server.http.post(route, json=body, headers=[(b"X-Session-ID", name)]), SESSION_ID_RULE)


def test_session_ids_in_paths(server: Served) -> None:
    for name in ("x" * 129, "two%20words", "a%2Fb", "a/b", "%C3%A9", "%00"):
        for method, route in (("GET", ""), ("DELETE", ""), ("POST", "/reset")):
            refused(server.http.request(method, f"/v1/ttt/sessions/{name}{route}"), SESSION_ID_RULE)


@pytest.mark.parametrize("route", ROUTES)
def test_knobs(server: Served, route: str) -> None:
    for xargs, message in KNOBS:
        for session in ({"session_id": "bad-knobs"}, {}):
            body = {"model": "demo", **ROUTES[route], **session, "vllm_xargs": xargs}
            refused(server.http.post(route, json=body), message)


def test_beam_search(server: Served) -> None:
    body = {**completion("x", "beams"), "use_beam_search": True, "n": 2}
    refused(server.http.post("/v1/completions", json=body), "cannot learn with beam search")


@pytest.mark.parametrize("route", ["/v1/embeddings", "/pooling", "/score", "/rerank", "/generative_scoring"])
def test_routes_that_cannot_learn(server: Served, route: str) -> None:
    message = "cannot learn and takes no session; sessions work on /v1/chat/completions"
    refused(server.http.post(route, json={"model": "demo", "input": "x", "session_id": "emb"}), message)
    refused(server.http.post(route, json={"model": "demo", "input": "x"}, headers={"X-Session-ID": "emb"}), message)


def test_longer_than_the_context(server: Served) -> None:
    refused(server.http.post("/v1/completions", json=completion([5] * 2100, "long")), "2048")


def test_token_ids_outside_the_vocabulary(server: Served) -> None:
    refused(server.http.post("/v1/completions", json=completion([5, 6, 100_000], "ids")), "out of vocabulary")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_what_the_engine_refuses(server: Served, route: str, stream: bool) -> None:
    """Here a seeded prompt that is to be read in parts: vLLM's CPU runner would end of it. A stream has not begun by then."""
    before = server.logged().count("Traceback")
    body = {"model": "demo", **ROUTES[route], **SEEDED, "session_id": "seeded", "stream": stream}
    answer = server.http.post(route, json=body)
    refused(answer, "cannot sample with a seed on a CPU")
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert server.logged().count("Traceback") == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_background_response_that_the_engine_refuses(server: Served, stream: bool) -> None:
    before = server.logged().count("Traceback")
    body = {"model": "demo", "input": "x", **SEEDED, "session_id": "seeded", "request_id": f"background-{stream}"}
    answer = server.http.post("/v1/responses", json={**body, "background": True, "store": True, "stream": stream}, timeout=20)
    if stream:
        refused(answer, "cannot sample with a seed on a CPU")
        events = server.http.get("/v1/responses/background-True", params={"stream": True}, timeout=20).text
        assert '"type":"response.failed"' in events, "who comes back for the stream sees how it ended"
    else:
        assert answer.json()["status"] == "queued"
    deadline, status = time.monotonic() + 20, "queued"
    while status == "queued" and time.monotonic() < deadline:
        status = server.http.get(f"/v1/responses/background-{stream}").json()["status"]
    assert status == "failed"
    assert server.logged().count("Traceback") == before


def test_an_adapter_that_is_given_to_the_worker(server: Served) -> None:
    adapter = ["mine", 8, "/somewhere/mine"]
    body = {"method": "add_lora", "args": [adapter]}
    # After an error that no route expects, the web server closes the connection.
    answer = server.http.post("/collective_rpc", json=body, headers={"Connection": "close"})
    assert answer.status_code == 500, "an operator's route, which vLLM's development mode opens"
    assert "no LoRA adapter is served beside --plugin ttt" in server.logged()
