"""What a server's log must not say, whatever it is sent."""

from __future__ import annotations

import re

#: Uncaught exceptions, answers of 500, hooks of ours that failed, an engine that died.
_BAD = re.compile(
    r"Traceback \(most recent call last\)|Exception in ASGI|Internal Server Error|EngineDeadError|failed \(error \d"
)
#: vLLM may log the stack of a request that it refuses with a 4xx (--log-error-stack, the development mode of the tests).
_REFUSAL = re.compile(r"\[(?:validation|vllm_error|http)\.py:\d+\]")


def unexpected(text: str) -> list[str]:
    """The lines that no request should cause."""
    return [line for line in text.splitlines() if _BAD.search(line) and not _REFUSAL.search(line)]
