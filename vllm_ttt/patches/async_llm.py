"""vllm.v1.engine.async_llm.AsyncLLM. ``generate``: what the engine says about a session goes into the answer's ``ttt``.

The engine attaches it to every output as ``kv_transfer_params["ttt"]``. All online generation passes here, whichever
route it came by, so the ``ttt_*`` knobs and the prompt are checked here too. Of several engine cores, a session's request goes
to the one that has the session; where servers share a state dir, it goes to the engine once this server has the session.

``shutdown``: from its beginning on the API server takes nothing new (frontend/draining.py). At its end, whoever still waits for
the engine core is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm_ttt import plugin
from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import draining, engines, naming, receipt, refusals
from vllm_ttt.patches import _contract
from vllm_ttt.types import NO_ADAPTERS, Knobs, SessionKey, check_session_id

_GENERATE = (
    "self prompt sampling_params request_id prompt_text lora_request tokenization_kwargs trace_headers priority "
    "data_parallel_rank session_id kv_hints reasoning_ended reasoning_parser_kwargs"
)

_SHUTDOWN = "self timeout"


def install() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    _contract.wrap(AsyncLLM, "generate", _GENERATE, _generate)
    _contract.wrap(AsyncLLM, "shutdown", _SHUTDOWN, _shutdown)


def check() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient

    _contract.check(AsyncLLM, "generate", _GENERATE)
    _contract.check(AsyncLLM, "shutdown", _SHUTDOWN)
    # Not wrapped, but relied on where there are several engine cores (frontend/engines.py).
    _contract.check(AsyncMPClient, "_call_utility_async", "self method *args engine")
    _contract.check(AsyncMPClient, "call_utility_all_async", "self method *args")
    _contract.check(DPLBAsyncMPClient, "get_core_engine_for_request", "self request")


def _generate(original: Callable) -> Callable:
    # Not a generator itself: a refusal must come before a streamed answer has begun, and who has no session gets vLLM's
    # own generator.
    def generate(
        self: Any,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any | None = None,
        session_id: str | None = None,
        **rest: Any,
    ) -> AsyncGenerator[Any, None]:
        try:
            if lora_request is not None:
                _check_adapter(self.vllm_config)
            session_id = _check(prompt, sampling_params, session_id)
        except RequestError as error:
            raise refusals.to_vllm(error) from None
        if session_id is not None and (rank := engines.rank_of(getattr(self, "engine_core", None), session_id)) is not None:
            rest["data_parallel_rank"] = rank  # wherever else a balancer would have it
        stream = original(self, prompt, sampling_params, request_id, lora_request=lora_request, session_id=session_id, **rest)
        if session_id is None:
            return stream
        note = receipt.current.get()
        call = note.open() if note else receipt.Call()
        if engines.shares(getattr(self, "vllm_config", None)):
            stream = _claimed(self.engine_core, session_id, stream, call)
        return _without_ttt(stream, call)

    return generate


def _shutdown(original: Callable) -> Callable:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        setattr(self, draining.MARK, True)
        original(self, timeout=timeout)
        # Calls that the engine core had not answered when it ended: vLLM's HTTP server would wait for them, and never end.
        for future in list(getattr(getattr(self, "engine_core", None), "utility_results", {}).values()):
            future.get_loop().call_soon_threadsafe(_give_up, future)

    return shutdown


def _give_up(future: asyncio.Future) -> None:
    if not future.done():
        future.set_exception(RuntimeError("the engine core is shutting down"))


def _check_adapter(vllm_config: Any) -> None:
    """Raise RequestError where no adapter is served."""
    config = plugin.config_of(vllm_config)
    if config is None or config.adapt.in_slots:
        raise RequestError(NO_ADAPTERS, param="model")


def _check(prompt: Any, sampling_params: Any, session_id: str | None) -> str | None:
    """The session as the engine knows it, or None. Raises RequestError."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    Knobs.parse(extra)
    if session_id is None:
        # Python callers may name a session in extra_args, and the engine takes it; over HTTP that would be a name that
        # nobody checked or scoped.
        if "session_id" in extra and receipt.current.get() is not None:
            raise RequestError(
                f"this route takes no session in its sampling parameters; use the header {naming.HEADER}",
                param="session_id",
            )
        return None
    naming.check_prompt(prompt)
    if "/" not in session_id:
        # From Python, where there is no API key.
        return SessionKey("-", check_session_id(session_id)).wire()
    return session_id


async def _claimed(core: Any, wire: str, stream: AsyncGenerator[Any, None], call: receipt.Call) -> AsyncGenerator[Any, None]:
    """``stream``, once this server has the session, of those that share the state dir. Raises vLLM's exception if it cannot."""
    key = SessionKey.from_wire(wire)
    async with aclosing(stream):
        try:
            await engines.claim(core, key.tenant, key.name)
        except RequestError as error:
            call.refused = error
            raise refusals.of_engine(error) from None
        async for output in stream:
            yield output


async def _without_ttt(stream: AsyncGenerator[Any, None], call: receipt.Call) -> AsyncGenerator[Any, None]:
    """Pass on the outputs of ``stream``, and what they say of the session to ``call``.

    Raises vLLM's exception where the engine refused: it then says ``{"status": 4xx, "message": str}``, and no version.
    """
    # Closing vLLM's generator is what aborts the request in the engine when the client is gone.
    async with aclosing(stream):
        async for output in stream:
            params = output.kv_transfer_params
            if params and "ttt" in params:
                ttt = params["ttt"]
                if "message" in ttt:
                    call.refused = engines.refused(ttt)
                    raise refusals.of_engine(call.refused)
                call.note(ttt)
                output.kv_transfer_params = {key: value for key, value in params.items() if key != "ttt"} or None
            call.finished = output.finished
            yield output
