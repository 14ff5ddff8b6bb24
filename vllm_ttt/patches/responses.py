"""vllm.entrypoints.openai.responses.serving.OpenAIServingResponses: a background response that the engine refuses has failed.

vLLM leaves it `queued` for good, and its stream waiting for an event that never comes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm_ttt.frontend import receipt
from vllm_ttt.patches import _contract

_PARAMETERS = {
    "_run_background_request": "self request *args **kwargs",
    "_run_background_request_stream": "self request *args **kwargs",
    "responses_background_stream_generator": "self response_id starting_after",
}


def install() -> None:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    wrappers = {"responses_background_stream_generator": _end_with_a_failure}
    for name, parameters in _PARAMETERS.items():
        _contract.wrap(OpenAIServingResponses, name, parameters, wrappers.get(name, _fail))


def check() -> None:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    for name, parameters in _PARAMETERS.items():
        _contract.check(OpenAIServingResponses, name, parameters)


def _fail(original: Callable) -> Callable:
    async def run_background_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        try:
            await original(self, request, *args, **kwargs)
        except Exception:
            note = receipt.current.get()
            if note is None or not any(call.refused for call in note.calls):
                raise
            await _mark(self, request.request_id)

    return run_background_request


async def _mark(serving: Any, response_id: str) -> None:
    """The stored response has failed; so says the last event of its stream."""
    from openai.types.responses import ResponseFailedEvent

    async with serving.response_store_lock:
        stored = serving.response_store[response_id]
        if stored.status not in ("completed", "cancelled"):
            stored.status = "failed"
    if response_id in serving.event_store:
        events, signal = serving.event_store[response_id]
        number = events[-1].sequence_number + 1 if events else 0
        # Not validated: vLLM's response has keys of its own, and leaves out some that OpenAI asks for.
        events.append(ResponseFailedEvent.model_construct(type="response.failed", sequence_number=number, response=stored))
        signal.set()


def _end_with_a_failure(original: Callable) -> Callable:
    """vLLM's ends with `response.completed` alone."""

    async def responses_background_stream_generator(
        self: Any, response_id: str, starting_after: int | None = None
    ) -> AsyncGenerator[Any, None]:
        async with aclosing(original(self, response_id, starting_after)) as events:
            async for event in events:
                yield event
                if getattr(event, "type", None) == "response.failed":
                    return

    return responses_background_stream_generator
