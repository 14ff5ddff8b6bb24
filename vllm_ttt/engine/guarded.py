"""Calls whose failure must not end serving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_ttt.errors import RequestError

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own


class Guarded:
    """Called with a hook and its arguments: what it returns, or None where it raised, which is counted and logged."""

    def __init__(self) -> None:
        self.errors = 0

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
        """Count the exception that is being handled, and log it: the first ten, and every thousandth."""
        self.errors += 1
        if self.errors <= 10 or self.errors % 1000 == 0:
            logger.exception("vllm-ttt: %s failed (error %d)", what, self.errors)
