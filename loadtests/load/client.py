"""One user's connection: sends a request, reads the stream, and tells locust when its tokens came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import requests
from locust.env import Environment

#: Seconds for an answer. A held request waits for its session's earlier ones.
TIMEOUT = 120.0


@dataclass
class Answer:
    """``ttt``: the object of our own, if there is one. ``error``: None where the answer is complete."""

    status: int = 0
    ttt: dict[str, Any] | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str | None = None
    #: moments of the first and the last token, s
    moments: list[float] = field(default_factory=list)


class Client:
    def __init__(self, environment: Environment, url: str, model: str, key: str | None):
        self.environment, self.url, self.model = environment, url.rstrip("/"), model
        self.http = requests.Session()
        self.http.trust_env = False
        if key:
            self.http.headers["Authorization"] = f"Bearer {key}"

    def complete(self, kind: str, body: dict[str, Any], route: str = "/v1/completions") -> Answer:
        """POST and read the stream to its end. Fires "answer", "TTFT" and "TPOT", in ms, under the name ``kind``."""
        answer, began = Answer(), time.perf_counter()
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
        try:
            with self.http.post(self.url + route, json=body, stream=True, timeout=TIMEOUT) as response:
                answer.status = response.status_code
                if answer.status != 200:
                    answer.error = f"{answer.status}: {response.text[:200]}"
                else:
                    _read(events(response), answer)
        except requests.RequestException as error:
            answer.error = f"{type(error).__name__}: {error}"
        took = time.perf_counter() - began
        self.fire("answer", kind, took, answer.error)
        if answer.error is None and answer.moments:
            first, last = answer.moments
            self.fire("TTFT", kind, first - began)
            if answer.output_tokens > 1:
                self.fire("TPOT", kind, (last - first) / (answer.output_tokens - 1))
        return answer

    def leave(self, kind: str, body: dict[str, Any], after: int) -> None:
        """Close the connection after so many events of the stream; 0: as soon as the request has been sent."""
        began, error = time.perf_counter(), None
        body = {"model": self.model, "stream": True, **body}
        try:
            timeout = TIMEOUT if after else (TIMEOUT, 0.05)
            with self.http.post(self.url + "/v1/completions", json=body, stream=True, timeout=timeout) as response:
                if response.status_code != 200:
                    error = f"{response.status_code}: {response.text[:200]}"
                for _, _ in zip(range(after), events(response), strict=False):
                    pass
        except requests.ReadTimeout:
            error = "ReadTimeout" if after else None
        except requests.RequestException as problem:
            error = f"{type(problem).__name__}: {problem}"
        self.fire("left", kind, time.perf_counter() - began, error)

    def ask(self, kind: str, method: str, path: str, expected: tuple[int, ...], **options: Any) -> Any:
        """A call that is not streamed; what it answers, or None. A status that is not ``expected`` is an error."""
        began, error, found = time.perf_counter(), None, None
        try:
            response = self.http.request(method, self.url + path, timeout=TIMEOUT, **options)
            found = response.json() if "json" in response.headers.get("content-type", "") else None
            if response.status_code not in expected:
                error = f"{response.status_code}, not {' or '.join(map(str, expected))}: {response.text[:200]}"
            elif response.status_code >= 400 and not _is_openai_error(found, response):
                error = f"{response.status_code} not in OpenAI's shape, or too long: {response.text[:200]}"
        except (requests.RequestException, ValueError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        self.fire("asked", kind, time.perf_counter() - began, error)
        return found if error is None else None

    def fire(self, what: str, kind: str, seconds: float, error: str | None = None) -> None:
        """One line of locust's statistics."""
        self.environment.events.request.fire(
            request_type=what,
            name=kind,
            response_time=1e3 * seconds,
            response_length=0,
            exception=RuntimeError(error) if error else None,
            context={},
        )


def events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream, up to ``[DONE]``. Raises requests' error where it ends without."""
    for line in response.iter_lines(chunk_size=None):  # type: ignore[arg-type]  # as it arrives
        if line == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise requests.ConnectionError("the stream ended without [DONE]")


def _read(stream: Iterator[dict[str, Any]], answer: Answer) -> None:
    for event in stream:
        if "error" in event:
            answer.error = f"in the stream: {str(event['error'])[:200]}"
        for choice in event.get("choices", ()):
            piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if piece:
                now = time.perf_counter()
                answer.moments = [answer.moments[0] if answer.moments else now, now]
            answer.text += piece
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.ttt = event.get("ttt", answer.ttt)


def _is_openai_error(found: Any, response: requests.Response) -> bool:
    error = found.get("error") if isinstance(found, dict) else None
    return isinstance(error, dict) and bool(error.get("message")) and len(response.content) < 10_000
