"""vllm.v1.engine.output_processor: the span of a session's request also says the version that answered, and what is learned.

vLLM makes the span, with --otlp-traces-endpoint, inside `do_tracing` and ends it there: the attributes join on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm_ttt.patches import _contract

_TRACE = "self engine_core_output req_state iteration_stats"
_SPAN = "span_name start_time end_time attributes context kind"
#: What the span that is being made gets besides.
_attributes: ContextVar[dict[str, Any] | None] = ContextVar("vllm_ttt_span", default=None)


def install() -> None:
    from vllm.v1.engine import output_processor

    _contract.wrap(output_processor.OutputProcessor, "do_tracing", _TRACE, _do_tracing)
    _contract.wrap(output_processor, "instrument_manual", _SPAN, _instrument_manual)


def check() -> None:
    from vllm.v1.engine import output_processor

    _contract.check(output_processor.OutputProcessor, "do_tracing", _TRACE)
    _contract.check(output_processor, "instrument_manual", _SPAN)


def _do_tracing(original: Callable) -> Callable:
    def do_tracing(self: Any, engine_core_output: Any, req_state: Any, iteration_stats: Any) -> None:
        ttt = (engine_core_output.kv_transfer_params or {}).get("ttt") or {}
        if "version" not in ttt:
            return original(self, engine_core_output, req_state, iteration_stats)
        token = _attributes.set({"vllm_ttt.version": ttt["version"], "vllm_ttt.tokens_learned": ttt["tokens_learned"]})
        try:
            return original(self, engine_core_output, req_state, iteration_stats)
        finally:
            _attributes.reset(token)

    return do_tracing


def _instrument_manual(original: Callable) -> Callable:
    def instrument_manual(*args: Any, attributes: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        ours = _attributes.get()
        return original(*args, attributes={**(attributes or {}), **ours} if ours else attributes, **kwargs)

    return instrument_manual
