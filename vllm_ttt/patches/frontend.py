"""The patches of the API server, together."""

from __future__ import annotations

from vllm_ttt.patches import _contract, api_servers, async_llm, responses, serving, tracing, validation

_MODULES = (serving, async_llm, validation, api_servers, tracing, responses)


def install() -> None:
    """Apply all; a second call does nothing. Raises PatchContractError where vLLM is not what they were written for."""
    check()
    for module in _MODULES:
        module.install()


def check() -> None:
    """Only look at the signatures. Raises PatchContractError."""
    for module in _MODULES:
        module.check()


def installed() -> bool:
    """Whether this process applied them."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return getattr(AsyncLLM.generate, _contract.MARK, False)
