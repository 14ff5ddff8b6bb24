"""Every input of every route of ours, and our fields on vLLM's: drawn at random from the server's own schema, and beyond it.

Whatever is sent, the answer is no 5xx, an error has OpenAI's shape and is no longer than it must be, and the engine serves on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from load.logs import unexpected
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from served import Documents, Served

from vllm_ttt.types import SESSION_ID

pytestmark = pytest.mark.engine

#: Requests per operation, allowed and forbidden ones each; of our fields, per route of vLLM's.
EXAMPLES, FIELDS = 25, 120
QUICKLY = settings(
    max_examples=EXAMPLES,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x y z", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
}
#: A session that there is, unless it has just been deleted.
KNOWN = "fuzz-known"
#: The longest answer that an error may have, bytes: nobody's input is sent back whole.
LONGEST = 4096

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=200)
words = st.text(max_size=9)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
good_ids = st.from_regex(SESSION_ID, fullmatch=True).map(lambda name: f"fuzz-{name}"[:128])
ids = good_ids | st.text(max_size=150) | st.sampled_from(["", "a/b", "..", "%2e", "x" * 129, "nul\0", "\U0001f600"])
knobs = st.sampled_from(["ttt_learn", "ttt_learn_output", "ttt_interleave", "ttt_", "ttt_x"])
xargs = st.dictionaries(knobs | words, st.sampled_from([0, 1, True, False]) | anything, max_size=3) | anything


@pytest.fixture
def alive(server: Served, documents: Documents) -> Iterator[Served]:
    """The engine learns on afterwards, nothing was raised that nobody expected; sessions that were made go."""
    listed = lambda: {s["session_id"] for s in server.http.get("/v1/ttt/sessions").json()["sessions"]}  # noqa: E731
    before, logged = listed(), len(server.logged())
    yield server
    answer = server.complete(documents["kjv"][0][:100], "fuzz-alive")
    assert answer["ttt"]["tokens_learned"] == 99
    server.settle()
    for name in listed() - before:
        assert server.http.delete(f"/v1/ttt/sessions/{name}").status_code == 200
    assert unexpected(server.logged()[logged:]) == []


def judge(answer: httpx.Response | schemathesis.Response, sent: Any) -> None:
    """No 5xx but 507 of a full disk, which this server has not; an error in OpenAI's shape."""
    assert answer.status_code < 500, (answer.status_code, answer.text[:500], sent)
    if answer.content == b"Invalid HTTP request received.":
        return  # of a header that is none: it has not come to vLLM
    if answer.status_code >= 400 and answer.status_code not in (404, 405):
        error = answer.json().get("error")
        assert error, (answer.status_code, answer.text[:500], sent)
        assert error["message"], sent
        assert error["code"] == answer.status_code, sent
        assert len(answer.content) < LONGEST, (sent, answer.text[:300])


def operations(server: Served) -> list[Any]:
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json()).include(path_regex=r"^/v1/ttt(/|$)|^/ttt$")
    found = list(schema.get_all_operations())
    return [result.ok() for result in found if isinstance(result, Ok)]


def test_our_routes(alive: Served, documents: Documents) -> None:
    """What the schema allows, and what it forbids."""
    found = operations(alive)
    assert len(found) >= 11, [operation.label for operation in found]
    statuses: Counter[str] = Counter()
    for operation in found:
        alive.complete(documents["kjv"][0][:100], KNOWN)
        send(alive, operation, operation.as_strategy(generation_mode=GenerationMode.POSITIVE), statuses)
        if operation.path_parameters or operation.query:  # else nothing can be wrong
            send(alive, operation, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), statuses)
    print(dict(statuses))
    assert statuses["200"] > EXAMPLES
    assert statuses["404"] > EXAMPLES
    assert statuses["400"] + statuses["422"] > EXAMPLES
    assert statuses["422"]


def send(alive: Served, operation: Any, strategy: Any, statuses: Counter[str]) -> None:
    @QUICKLY
    @given(case=strategy, known=st.booleans())
    def one(case: Any, known: bool) -> None:
        if known and "session_id" in case.path_parameters:
            case.path_parameters["session_id"] = KNOWN
        try:
            answer = case.call(base_url=alive.url, timeout=60)
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader, UnicodeEncodeError):
            return  # it cannot even be sent
        statuses[str(answer.status_code)] += 1
        judge(answer, case.as_curl_command())
        if answer.status_code == 200:
            operation.validate_response(answer)

    one()


@pytest.mark.parametrize("route", ROUTES)
def test_our_fields_on_their_routes(alive: Served, route: str) -> None:
    """Session ids in body and header, and ``vllm_xargs``: accepted as README says, or refused in words."""
    accepted: Counter[bool] = Counter()

    @settings(QUICKLY, max_examples=FIELDS)
    @given(
        name=st.none() | ids | anything,
        header=st.none() | ids.map(lambda text: text.encode("utf-8", "surrogatepass")[:200]),
        xargs=st.none() | xargs,
        stream=st.booleans(),
    )
    def one(name: Any, header: bytes | None, xargs: Any, stream: bool) -> None:
        body = {"model": "demo", **ROUTES[route], "stream": stream, "session_id": name, "vllm_xargs": xargs}
        body = {key: value for key, value in body.items() if value is not None}
        headers = [(b"Content-Type", b"application/json")] + ([(b"X-Session-ID", header)] if header is not None else [])
        try:
            content = json.dumps(body)
            answer = alive.http.post(route, content=content, headers=headers)
        except httpx.LocalProtocolError:
            return  # no header that HTTP has
        judge(answer, (body, header))
        accepted[answer.status_code == 200] += 1
        if answer.status_code != 200:
            return
        given_names = [name] if name is not None else [header.decode("latin-1").strip()] if header is not None else []
        if given_names:
            assert SESSION_ID.match(given_names[0]), (body, header)
            assert f'"session_id":"{given_names[0]}"' in answer.text, "the answer says whose it is"

    one()
    assert accepted[True]
    assert accepted[False]


@pytest.mark.parametrize("path", ["/v1/ttt/sessions/fuzz-known/rollback", "/v1/ttt/sessions/fuzz-known/fork"])
def test_bodies_that_are_no_json_or_too_large(alive: Served, path: str) -> None:
    large = b'{"to": "' + b"x" * 10**6 + b'"}'
    for content in (b"", b"{", b"[]", b"null", large, b"\xff" * 100, b"[" * 10**5, b'{"version": 1e999}'):
        for kind in ("application/json", "text/plain", ""):
            judge(alive.http.post(path, content=content, headers={"Content-Type": kind}), (content[:20], kind))
