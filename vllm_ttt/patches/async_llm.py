"""vllm.v1.engine.async_llm.AsyncLLM. ``generate``: what the engine says about a session goes into the answer's ``ttt``.

The engine attaches it to every output as ``kv_transfer_params["ttt"]``. All online generation passes here, whichever
route it came by, so the ``ttt_*`` knobs and the prompt are checked here too. Of several engine cores, a session's request goes
to the one that has the session; where servers share a state dir, it goes to the engine once this server has the session.

``shutdown``: from its beginning on the API server takes nothing new (frontend/draining.py). Of several API servers none has
started the engine cores, which the first process ends once the API servers have ended: each waits until what it has asked is
answered. At its end, whoever still waits for an engine core is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm_ttt import plugin
from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import draining, engines, naming, receipt, refusals
from vllm_ttt.patches import _contract
from vllm_ttt.types import NO_ADAPTERS, SAMPLES, Knobs, SessionKey, check_session_id

_GENERATE = (
    "self prompt sampling_params request_id prompt_text lora_request tokenization_kwargs trace_headers priority "
    "data_parallel_rank session_id kv_hints reasoning_ended reasoning_parser_kwargs"
)

_SHUTDOWN = "self timeout"
#: What a request that runs may take of the time in which a server must have ended; the engine saves in the rest.
_SHARE = 0.5


def install() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    _contract.wrap(AsyncLLM, "generate", _GENERATE, _generate)
    _contract.wrap(AsyncLLM, "shutdown", _SHUTDOWN, _shutdown)


def check() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient
    from vllm.v1.engine.output_processor import OutputProcessor

    _contract.check(AsyncLLM, "generate", _GENERATE)
    _contract.check(AsyncLLM, "shutdown", _SHUTDOWN)
    _contract.check(OutputProcessor, "has_unfinished_requests", "self")
    _contract.check(OutputProcessor, "propagate_error", "self e")
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
    from vllm.v1.engine.exceptions import EngineDeadError

    def shutdown(self: Any, timeout: float | None = None) -> None:
        begun, core = getattr(self, draining.MARK, False), getattr(self, "engine_core", None)
        setattr(self, draining.MARK, True)
        if not begun and _has_no_engine(self):
            _let_end(self, _SHARE * (timeout or 0))
        original(self, timeout=timeout)
        # What the engine core had not answered when it ended: vLLM's HTTP server would wait for it, and never end.
        for future in list(getattr(core, "utility_results", {}).values()):
            future.get_loop().call_soon_threadsafe(_give_up, future)
        if _has_no_engine(self) and (handler := self.output_handler) is not None:
            handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())

    return shutdown


def _has_no_engine(client: Any) -> bool:
    """Whether another process has started the engine cores of an AsyncLLM, and ends them."""
    resources = getattr(getattr(client, "engine_core", None), "resources", None)
    return resources is not None and resources.engine_manager is None


def _let_end(client: Any, seconds: float) -> None:
    """Wait until what an AsyncLLM has asked of engine cores that it will not end itself is answered, and so long at most. In a
    thread of its own: the server's loop goes on."""
    deadline = time.monotonic() + seconds
    while client.output_processor.has_unfinished_requests() and time.monotonic() < deadline:
        time.sleep(0.05)


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
    if SAMPLES in extra:
        raise RequestError(f"{SAMPLES} is what the server tells itself of a request with n > 1; leave it out", param=SAMPLES)
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
