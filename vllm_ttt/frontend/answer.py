"""ASGI middleware: the ``ttt`` object in answers, and a refusal of sessions where nothing can be learned."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import receipt, refusals
from vllm_ttt.frontend.body import EventStream, insert_ttt
from vllm_ttt.frontend.naming import HEADER
from vllm_ttt.frontend.paths import path_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Routes whose answers get ``ttt``.
ANSWERED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"})
#: Routes that run the model and cannot learn.
UNLEARNED = frozenset(
    {
        *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
        *("/rerank", "/v1/rerank", "/v2/rerank", "/v1/audio/transcriptions", "/v1/audio/translations"),
        *("/generative_scoring", "/v1/systemone"),
    }
)
#: Routes that learn, and take a session by header alone: their bodies have no such field.
BY_HEADER = frozenset({"/v1/messages", "/inference/v1/generate", "/cohere/v2/chat"})
EVENTS = b"text/event-stream"
#: Larger bodies are not searched for a ``session_id`` that would be ignored, bytes.
_SEARCHED = 2**20


class AnswerMiddleware:
    """Gives each POST a Receipt for as long as it is served. Bytes of a request without a session pass untouched."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = path_of(scope)
        if path in UNLEARNED or path in BY_HEADER:
            headers = dict(scope["headers"])
            named, inside = HEADER.lower().encode() in headers, False
            if not named:
                receive, inside = await _search_body(headers, receive)
            if inside or (named and path in UNLEARNED):
                return await _refuse(path, send)
        note = receipt.Receipt()
        token = receipt.current.set(note)
        answer = _Answer(note, send) if path in ANSWERED else None
        try:
            return await self.app(scope, receive, answer or send)
        except Exception:
            if answer is None or not await answer.refuse():
                raise
        finally:
            receipt.current.reset(token)


class _Answer:
    """The ``send`` of a request that may have a session. Whether it has is known when its answer starts.

    vLLM starts a stream before the engine has seen the request. So it is held until the engine begins to answer: what the
    engine refuses is then an answer with a status, as it is for who does not stream.
    """

    def __init__(self, note: receipt.Receipt, send: Send):
        self._note, self._send = note, send
        self._stream: EventStream | None = None
        #: the start of a JSON answer, held until its length is known
        self._start: Message | None = None
        self._parts: list[bytes] = []
        #: a stream that the engine has not begun to answer, message by message; None: it has, or there is none
        self._waiting: list[Message] | None = None
        self._closed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._note.session is not None and _kind(message) == EVENTS:
            self._waiting = []
        if self._waiting is None:
            await self._pass(message)
        elif not await self.refuse():
            self._waiting.append(message)
            # An operator who asked for comments that keep connections alive wants them sent.
            comment = message.get("body", b"").startswith(b":")
            ends = message["type"] == "http.response.body" and not message.get("more_body", False)
            if self._note.begun or comment or ends:
                waiting, self._waiting = self._waiting, None
                for held in waiting:
                    await self._pass(held)

    async def refuse(self) -> bool:
        """Where nothing was sent and the engine has refused: say so, and nothing that comes after it. Whether that was so."""
        if self._waiting is None or self._note.refused is None:
            return False
        if not self._closed:
            self._closed = True
            await send_error(self._note.refused, self._send)
        return True

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400 and self._note.retry_after is not None:
            message["headers"] = [*message["headers"], _retry_after(self._note.retry_after)]
        if message["type"] == "http.response.start":
            kind = _kind(message) if self._note.session is not None else b""
            if kind == EVENTS:
                self._stream = EventStream(self._note)
            if kind == b"application/json":
                self._start = message
            else:
                await self._send(message)
        elif message["type"] == "http.response.body" and self._stream is not None:
            await self._send_events(self._stream, message)
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._send_json(self._start, message)
        else:
            await self._send(message)

    async def _send_events(self, stream: EventStream, message: Message) -> None:
        more = message.get("more_body", False)
        body = stream.feed(message.get("body", b""), more)
        if body or not more:
            await self._send({**message, "body": body})

    async def _send_json(self, start: Message, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = insert_ttt(b"".join(self._parts), self._note.answer())
        length = str(len(body)).encode()
        headers = [(name, length if name.lower() == b"content-length" else value) for name, value in start["headers"]]
        await self._send({**start, "headers": headers})
        await self._send({**message, "body": body})


def _kind(start: Message) -> bytes:
    """The content type of a 200 whose body is sent as it is, else nothing."""
    headers = dict(start["headers"])
    if start["status"] != 200 or b"content-encoding" in headers:
        return b""
    return headers.get(b"content-type", b"").partition(b";")[0].strip()


async def _search_body(headers: dict[bytes, bytes], receive: Receive) -> tuple[Receive, bool]:
    """Whether a JSON body has a ``session_id``, and a ``receive`` that gives the same messages once more."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    length = headers.get(b"content-length", b"0")
    if kind != b"application/json" or (length.isdigit() and int(length) >= _SEARCHED):
        return receive, False
    seen: list[Message] = []
    size, more = 0, True
    while more and size < _SEARCHED:
        message = await receive()
        seen.append(message)
        size += len(message.get("body", b""))
        more = message["type"] == "http.request" and message.get("more_body", False)

    async def again() -> Message:
        return seen.pop(0) if seen else await receive()

    body = b"".join(message.get("body", b"") for message in seen)
    return again, size < _SEARCHED and _names_session(body)


def _names_session(body: bytes) -> bool:
    if b'"session_id"' not in body:
        return False
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return False  # vLLM says what is wrong with it
    return isinstance(parsed, dict) and parsed.get("session_id") is not None


async def _refuse(path: str, send: Send) -> None:
    if path in BY_HEADER:
        message = f"{path} takes a session by the header {HEADER}, not in its body"
    else:
        message = f"{path} cannot learn and takes no session; sessions work on {', '.join(sorted(ANSWERED))}"
    await send_error(RequestError(message, param="session_id"), send)


async def send_error(error: RequestError, send: Send, further: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Answer with the error, as vLLM's handlers would; ``further`` headers go with it."""
    body = json.dumps(refusals.to_openai(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *further]
    if error.retry_after is not None:
        headers.append(_retry_after(error.retry_after))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _retry_after(seconds: int) -> tuple[bytes, bytes]:
    return b"retry-after", str(seconds).encode()
