"""vllm.entrypoints.generate.base.serving.GenerateBaseServing: session names are checked and scoped by API key.

vLLM takes any text as a session's name, silently takes the next source where one is empty, and hands it on as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import naming, refusals
from vllm_ttt.patches import _contract

_PARAMETERS = {"_get_session_id": "request raw_request", "_get_session_id_from_headers": "raw_request"}


def install() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    _contract.wrap(GenerateBaseServing, "_get_session_id", _PARAMETERS["_get_session_id"], _get_session_id)
    name = "_get_session_id_from_headers"
    _contract.wrap(GenerateBaseServing, name, _PARAMETERS[name], _get_session_id_from_headers)


def check() -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    for name, parameters in _PARAMETERS.items():
        _contract.check(GenerateBaseServing, name, parameters)


def _get_session_id(original: Callable) -> Callable:
    def get_session_id(request: Any, raw_request: Any | None) -> str | None:
        try:
            naming.check_request(request, raw_request)
            name = original(request, raw_request)
            return None if name is None else naming.scoped(name, raw_request)
        except RequestError as error:
            raise refusals.to_vllm(error) from None

    return get_session_id


def _get_session_id_from_headers(original: Callable) -> Callable:
    def get_session_id_from_headers(raw_request: Any | None) -> str | None:
        try:
            naming.check_header(raw_request)
            name = original(raw_request)
            return None if name is None else naming.scoped(name, raw_request)
        except RequestError as error:
            raise refusals.to_vllm(error) from None

    return get_session_id_from_headers
