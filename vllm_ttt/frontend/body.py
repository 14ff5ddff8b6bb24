"""Adding ``ttt`` to a JSON body or to the last event of an event stream, leaving every other byte as it is."""

from __future__ import annotations

import json
from typing import Any

from vllm_ttt.frontend.receipt import Receipt

#: What ends a stream of /v1/responses, whose events have names.
_LAST_NAMES = (b"response.completed", b"response.incomplete", b"response.failed")


def insert_ttt(text: bytes, ttt: dict[str, Any] | None) -> bytes:
    """Put ``"ttt": {...}`` last into the JSON object that ``text`` ends with; ``text`` itself where there is none."""
    head = text.rstrip()
    if ttt is None or not head.endswith(b"}"):
        return text
    comma = b"" if head[:-1].rstrip().endswith(b"{") else b","
    value = json.dumps(ttt, separators=(",", ":")).encode()
    return head[:-1] + comma + b'"ttt":' + value + b"}" + text[len(head) :]


class EventStream:
    """The body of a server-sent event stream, on its way to the client.

    Complete events leave at once while vLLM generates. When generation has finished, one event is held back until the
    next arrives, so that the last one before ``[DONE]`` (or before the end) can be given ``ttt``.
    """

    def __init__(self, receipt: Receipt):
        self._receipt = receipt
        self._partial = b""
        self._held = b""

    def feed(self, chunk: bytes, more: bool) -> bytes:
        """Take the next bytes of the body, cut anywhere; return those that may leave now.

        Args:
            more: False with the last chunk; nothing is held after it.
        """
        *events, self._partial = (self._partial + chunk).split(b"\n\n")
        out = [self._pass(event + b"\n\n") for event in events]
        if not more:
            out.append(self._pass(self._partial))
            out.append(self._release(last=True))
            self._partial = b""
        return b"".join(out)

    def _pass(self, event: bytes) -> bytes:
        name, data = _read(event)
        if data is None:
            return event  # a comment: keeps the connection alive, and has no place in the order of events
        if data == b"[DONE]":
            return self._release(last=True) + event
        ready = self._release(last=False)
        # Named events that do not end the stream are not held: a tool may be called between two of them.
        if self._receipt.finished and (name is None or name in _LAST_NAMES):
            self._held = event
            return ready
        return ready + event

    def _release(self, last: bool) -> bytes:
        event, self._held = self._held, b""
        return insert_ttt(event, self._receipt.answer()) if last else event


def _read(event: bytes) -> tuple[bytes | None, bytes | None]:
    """(name, last line of data) of an event, None where it has none."""
    name = data = None
    for line in event.splitlines():
        if line.startswith(b"event:"):
            name = line[6:].strip()
        elif line.startswith(b"data:"):
            data = line[5:].strip()
    return name, data
