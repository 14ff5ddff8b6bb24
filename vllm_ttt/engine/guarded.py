"""Calls whose failure must not end serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.log import Rarely, logger_of

logger = logger_of(__name__)


class Guarded:
    """Called with a hook and its arguments: what it returns, or None where it raised, which is counted and logged."""

    def __init__(self) -> None:
        self.errors = Rarely()

    def __call__(self, hook: Callable[..., Any], *args: Any) -> Any:
        try:
            return hook(*args)
        except Exception:
            self.failed(hook.__qualname__)
            return None

    def refusal(self, error: Exception) -> RequestError:
        """The answer to the request that met ``error``, which is being handled."""
        if isinstance(error, RequestError):
            return error
        self.failed("to bring in a session")
        return RequestError("the session could not be brought in; the server's log says why", 503)

    def failed(self, what: str) -> None:
        """Count the exception that is being handled, and log it, but rarely."""
        if self.errors.again():
            logger.exception("vllm-ttt: %s failed (error %d)", what, self.errors.count)
