"""A RequestError in the shapes in which it leaves the server: vLLM's exceptions, and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from vllm_ttt.errors import RequestError

_TYPES = {400: "BadRequestError", 404: "NotFoundError"}


def to_vllm(error: RequestError) -> Exception:
    """The exception that vLLM's handlers answer with ``error.status`` (vllm/entrypoints/serve/exception_handling)."""
    from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError

    if error.status == 400:
        return VLLMValidationError(error.message, parameter=error.param)
    if error.status == 404:
        return VLLMNotFoundError(error.message)
    return GracefulHTTPError(error.message, HTTPStatus(error.status))


def of_engine(error: RequestError) -> Exception:
    """The same of what the engine refused, when vLLM already waits for the answer: an error that its streams expect, and log
    without a traceback."""
    from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMValidationError

    class RefusedRequest(VLLMValidationError, GenerationError):
        pass

    class Refused(GracefulHTTPError, GenerationError):
        pass

    status = HTTPStatus(error.status)
    refused = RefusedRequest(error.message, parameter=error.param) if error.status == 400 else Refused(error.message, status)
    refused.status_code = status
    return refused


def to_openai(error: RequestError) -> dict[str, Any]:
    """The JSON body of an answer that vLLM's handlers do not make."""
    kind = _TYPES.get(error.status) or HTTPStatus(error.status).phrase
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.status}}


def of_schema(errors: Sequence[Any]) -> str:
    """One line for pydantic's ``errors``: where, and what is allowed there; of many, the first three."""
    told = [f"{'.'.join(str(part)[:100] for part in error['loc'])}: {error['msg'][:200]}" for error in errors[:3]]
    return "; ".join(told) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else "")
