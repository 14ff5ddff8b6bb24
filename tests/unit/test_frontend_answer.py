"""The middleware: every byte of others untouched, ``ttt`` where it belongs, no event late."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import vllm
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import receipt
from vllm_ttt.frontend.answer import ANSWERED, BY_HEADER, UNLEARNED, AnswerMiddleware
from vllm_ttt.frontend.body import EventStream, insert_ttt

pytestmark = pytest.mark.unit

TTT = {"session_id": "s", "version": 3, "tokens_learned": 7}
JSON = [(b"content-type", b"application/json"), (b"x-other", b"1")]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
App = Callable[[Any, Any, Any], Coroutine[Any, Any, None]]


def learned(session: str | None = "s", finished: bool = True) -> receipt.Receipt:
    note = receipt.current.get() or receipt.Receipt()
    note.session = session
    call = note.open()
    call.note({"version": 3, "tokens_learned": 7})
    call.finished = finished
    return note


def post(
    app: App, path: str = "/v1/completions", headers: Any = (), chunks: tuple[bytes, ...] = (b"{}",), **scope: Any
) -> list[Any]:
    """All messages that a client gets for a POST."""
    parts = [{"type": "http.request", "body": c, "more_body": i < len(chunks) - 1} for i, c in enumerate(chunks)]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    full = {"type": "http", "method": "POST", "path": path, "headers": list(headers), **scope}
    asyncio.run(AnswerMiddleware(app)(full, receive, send))
    return sent


def answering(body: list[bytes], headers: Any, status: int = 200, session: str | None = "s") -> App:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        learned(session)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, part in enumerate(body):
            await send({"type": "http.response.body", "body": part, "more_body": i < len(body) - 1})

    return app


def bytes_of(sent: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("path", sorted(ANSWERED))
@pytest.mark.parametrize("root", ["", "/proxy"])
def test_json_answer_gets_ttt(path: str, root: str) -> None:
    body = b'{"id": "x",\n "choices": [{"text": "\xc3\xa4 }"}] } \n'
    headers = [(b"Content-Length", str(len(body)).encode()), *JSON]
    start, end = post(answering([body[:9], body[9:]], headers), root + path, root_path=root)
    assert json.loads(end["body"]) == {**json.loads(body), "ttt": TTT}
    assert end["body"].startswith(body.rstrip()[:-1])
    assert dict(start["headers"])[b"Content-Length"] == str(len(end["body"])).encode()
    assert dict(start["headers"])[b"x-other"] == b"1"


def test_an_empty_object_needs_no_comma() -> None:
    assert json.loads(insert_ttt(b"{ }", TTT)) == {"ttt": TTT}
    assert insert_ttt(b"[1]", TTT) == b"[1]"
    assert insert_ttt(b'{"a":1}', None) == b'{"a":1}'


EVENTS = [
    b'data: {"id":"c","choices":[{"delta":{"content":"a"}}]}\n\n',
    b": keep-alive\n\n",
    b'data: {"id":"c","choices":[{"finish_reason":"stop"}]}\n\n',
    b'data: {"id":"c","choices":[],"usage":{"total_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]
BODY = b"".join(EVENTS)


@pytest.mark.parametrize(
    ("headers", "status", "session", "path"),
    [
        (JSON, 200, None, "/v1/completions"),
        (SSE, 200, None, "/v1/chat/completions"),
        (JSON, 400, "s", "/v1/completions"),
        (JSON, 200, "s", "/v1/messages"),
        (SSE, 200, "s", "/inference/v1/generate"),
        ([*JSON, (b"content-encoding", b"gzip")], 200, "s", "/v1/completions"),
        ([(b"content-type", b"text/plain")], 200, "s", "/v1/completions"),
    ],
)
def test_other_answers_pass_message_for_message(headers: Any, status: int, session: str | None, path: str) -> None:
    app = answering([*EVENTS, b"{}"], headers, status, session)
    direct: list[Any] = []

    async def send(message: Any) -> None:
        direct.append(message)

    asyncio.run(app({}, None, send))
    assert post(app, path) == direct


def test_a_session_of_which_the_engine_says_nothing_yet_is_untouched() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note = receipt.current.get()
        assert note is not None
        note.session = "s"  # a background response: answered before it is generated
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": b'{"status":"queued"}'})

    assert bytes_of(post(app)) == b'{"status":"queued"}'


@given(cuts=st.lists(st.integers(0, len(BODY)), max_size=12), finished=st.booleans())
def test_stream_cut_anywhere(cuts: list[int], finished: bool) -> None:
    edges = [0, *sorted(cuts), len(BODY)]
    parts = [BODY[a:b] for a, b in pairwise(edges)]
    stream = EventStream(learned(finished=finished))
    out = b"".join(stream.feed(part, more=i < len(parts) - 1) for i, part in enumerate(parts))
    if not finished:  # an answer that broke off
        assert out == BODY
        return
    events = out.split(b"\n\n")
    assert sorted(events) == sorted((*BODY[: BODY.index(EVENTS[3])].split(b"\n\n")[:-1], events[-3], b"data: [DONE]", b""))
    assert events[-2:] == [b"data: [DONE]", b""]
    assert json.loads(events[-3].removeprefix(b"data: ")) == {**json.loads(EVENTS[3][6:]), "ttt": TTT}
    assert events[-3].startswith(EVENTS[3].rstrip()[:-1])


def test_no_event_is_late() -> None:
    """What the client has after each event that vLLM sends."""
    seen: list[bytes] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note = learned(finished=False)
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        for i, event in enumerate(EVENTS):
            note.calls[0].finished = i >= 2
            await send({"type": "http.response.body", "body": event, "more_body": True})
            seen.append(bytes_of(sent))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(AnswerMiddleware(app)(scope, None, send))  # pyright: ignore[reportArgumentType]
    assert seen[0] == EVENTS[0]
    assert seen[1] == EVENTS[0] + EVENTS[1]
    assert seen[2] == seen[1]  # generation has finished: one event is held
    assert seen[3] == seen[1] + EVENTS[2]
    assert seen[4].endswith(b'"ttt":{"session_id":"s","version":3,"tokens_learned":7}}\n\ndata: [DONE]\n\n')
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


CREATED = b'event: response.created\ndata: {"type":"response.created"}\n\n'


def streaming(then: Callable[[receipt.Receipt], list[bytes]], first: bytes = CREATED) -> App:
    """Starts a stream before the engine has said anything of the session; ``then``: what happens, and what is sent then."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note = receipt.current.get()
        assert note is not None
        note.session = "s"
        note.open()
        await send({"type": "http.response.start", "status": 200, "headers": SSE})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        for part in then(note):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def refuse(note: receipt.Receipt) -> list[bytes]:
    note.calls[0].refused = RequestError("at most 3 sessions", status=429)
    return [b'data: {"error":{}}\n\n', b"data: [DONE]\n\n"]


@pytest.mark.parametrize("status", [409, 503])
def test_a_refusal_that_will_pass_says_when_streamed_or_not(status: int) -> None:
    def refuse_for_now(note: receipt.Receipt) -> list[bytes]:
        note.calls[0].refused = RequestError("another server has it", status, retry_after=2)
        return [b'data: {"error":{}}\n\n']

    start, _ = post(streaming(refuse_for_now))
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (status, b"2")

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        note = receipt.current.get()
        assert note is not None
        note.open()
        refuse_for_now(note)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    start, _ = post(app)
    assert dict(start["headers"])[b"retry-after"] == b"2"


def refuse_and_break(note: receipt.Receipt) -> list[bytes]:
    refuse(note)
    raise ValueError("vLLM cannot say so in this stream")


@pytest.mark.parametrize("then", [refuse, refuse_and_break])
def test_a_stream_that_the_engine_refuses_has_not_begun(then: Any) -> None:
    start, end = post(streaming(then))
    assert (start["status"], dict(start["headers"])[b"content-type"]) == (429, b"application/json")
    assert json.loads(end["body"])["error"]["message"] == "at most 3 sessions"
    assert not end.get("more_body")


def test_a_stream_begins_when_the_engine_does() -> None:
    def begin(note: receipt.Receipt) -> list[bytes]:
        note.calls[0].note({"version": 3, "tokens_learned": 7})
        note.calls[0].finished = True
        return [EVENTS[0], EVENTS[4]]

    sent = post(streaming(begin))
    assert sent[0] == {"type": "http.response.start", "status": 200, "headers": SSE}
    assert sent[1]["body"] == CREATED
    assert bytes_of(sent) == CREATED + EVENTS[0].rstrip()[:-1] + b',"ttt":' + json.dumps(
        TTT, separators=(",", ":")
    ).encode() + (b"}\n\n" + EVENTS[4])


def test_a_stream_that_is_kept_alive_has_begun() -> None:
    """vLLM's --sse-keep-alive-interval: while the request waits, the client sees that somebody is there."""
    alive = b": keep-alive\n\n"
    sent = post(streaming(refuse, first=alive))
    assert sent[0]["status"] == 200
    assert bytes_of(sent).startswith(alive)


def test_another_error_of_a_stream_is_vllms() -> None:
    def fail(_: receipt.Receipt) -> list[bytes]:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        post(streaming(fail))


def test_responses_get_it_in_their_last_event_and_wait_for_no_tool() -> None:
    stream = EventStream(learned())
    item = b'event: response.output_item.done\ndata: {"type":"response.output_item.done"}\n\n'
    last = b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r"}}\n\n'
    assert stream.feed(item, more=True) == item
    assert stream.feed(last, more=True) == b""
    out = stream.feed(b"", more=False)
    assert out.startswith(b"event: response.completed\ndata: ")
    assert json.loads(out.partition(b"data: ")[2]) == {
        "type": "response.completed",
        "response": {"id": "r"},
        "ttt": TTT,
    }


def test_several_calls_are_one_answer() -> None:
    note = receipt.Receipt(session="s")
    first, second = note.open(), note.open()
    first.note({"version": 5, "tokens_learned": 2})
    first.note({"version": 5, "tokens_learned": 10})
    first.finished = True
    assert not note.finished
    second.note({"version": 4, "tokens_learned": 3})
    second.finished = True
    assert note.finished
    assert note.answer() == {"session_id": "s", "version": 4, "tokens_learned": 13}


def test_requests_at_the_same_time_do_not_mix() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        note = learned(scope["session"])
        await asyncio.sleep(0.01)
        assert receipt.current.get() is note
        await answering([b"{}"], JSON, session=scope["session"])(scope, receive, send)

    async def one(name: str) -> Any:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "session": name}
        await AnswerMiddleware(app)(scope, None, send)  # pyright: ignore[reportArgumentType]
        return json.loads(bytes_of(sent))["ttt"]["session_id"]

    async def both() -> list[Any]:
        return list(await asyncio.gather(one("a"), one("b")))

    assert asyncio.run(both()) == ["a", "b"]
    assert receipt.current.get() is None


async def echo(_scope: Any, receive: Any, send: Any) -> None:
    """Sends back the body that it was given."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        await send({"type": "http.response.body", "body": message.get("body", b""), "more_body": more})


@pytest.mark.parametrize("path", sorted(UNLEARNED))
@pytest.mark.parametrize(
    ("headers", "chunks"),
    [
        ([(b"x-session-id", b"s")], (b"\x00form",)),
        ([(b"x-session-id", b"")], (b"{}",)),
        (JSON, (b'{"input": "x", "sess', b'ion_id": "s"}')),
        (JSON, (b'{"session_id": ""}',)),
    ],
)
def test_a_session_where_nothing_learns_is_refused(path: str, headers: Any, chunks: tuple[bytes, ...]) -> None:
    start, end = post(echo, path, headers, chunks)
    assert start["status"] == 400
    error = json.loads(end["body"])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == 400
    assert path in error["message"]
    assert "/v1/chat/completions" in error["message"]


@pytest.mark.parametrize(
    ("headers", "chunks"),
    [
        (JSON, (b'{"input": "session_id"}',)),
        (JSON, (b'{"session_id": null, "in', b'put": 1}')),
        (JSON, (b'{"session_id": ',)),
        (JSON, (b'["session_id"]', b"", b"")),
        (JSON, (b'{"session_id":"s","x":"', b"y" * 2**20, b'"}')),
        ([*JSON, (b"content-length", b"2000000")], (b'{"session_id": "s"}',)),
        ([(b"content-type", b"multipart/form-data")], (b'{"session_id": "s"}',)),
        (JSON, (b"[" * 100_000 + b'"session_id"',)),
    ],
)
def test_what_names_no_session_reaches_the_route_whole(headers: Any, chunks: tuple[bytes, ...]) -> None:
    sent = post(echo, "/v1/embeddings", headers, chunks)
    assert sent[0]["status"] == 200
    assert bytes_of(sent) == b"".join(chunks)


@pytest.mark.parametrize("path", sorted(BY_HEADER))
def test_a_session_in_a_body_that_has_no_place_for_it_is_refused(path: str) -> None:
    """It would be ignored."""
    start, end = post(echo, path, JSON, (b'{"messages": [], "session_id": "s"}',))
    assert start["status"] == 400
    assert json.loads(end["body"])["error"]["message"] == f"{path} takes a session by the header X-Session-ID, not in its body"
    for headers, body in ((JSON, b'{"messages": []}'), ([*JSON, (b"x-session-id", b"s")], b'{"session_id": "t"}')):
        sent = post(echo, path, headers, (body,))
        assert sent[0]["status"] == 200
        assert bytes_of(sent) == body


#: vLLM's other POST routes: those that serve sessions and have no `ttt`, and those that ask the model for nothing
SERVED = BY_HEADER | {"/invocations"}
ASKING_NOTHING = {
    *(
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/ping",
        "/v1/responses/{response_id}/cancel",
        "/abort_requests",
    ),
    *("/v1/chat/completions/render", "/v1/chat/completions/derender", "/v1/completions/render", "/v1/completions/derender"),
    *("/v1/messages/render", "/v1/responses/render", "/cohere/v2/chat/render"),
    # an operator's
    *(
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/pause",
        "/resume",
        "/sleep",
        "/wake_up",
        "/start_profile",
        "/stop_profile",
    ),
    *("/reset_prefix_cache", "/reset_encoder_cache", "/reset_mm_cache", "/release_kv_cache_memory"),
    *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update"),
    *("/finish_weight_update", "/update_weights", "/update_weight_version", "/weight_checker"),
}


def test_every_route_of_vllm_serves_a_session_or_refuses_one() -> None:
    """A route that runs the model and that nobody thought of would ignore the session."""
    folder = Path(vllm.__file__).parent / "entrypoints"
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    found = {route for text in sources for route in re.findall(r'\.post\(\s*"(/[^"]*)"', text)}
    assert len(found) > 40
    assert found - ANSWERED - UNLEARNED - SERVED - ASKING_NOTHING == set()
