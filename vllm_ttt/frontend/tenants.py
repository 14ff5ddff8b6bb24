"""Whose sessions: each API key has its own. The key itself never leaves this module."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from typing import Any

from vllm_ttt.errors import RequestError

#: Not VLLM_*: vLLM warns of such variables that it does not know, and --fail-on-environ-validation refuses them.
SECRET_VARIABLE = "TTT_SECRET"
#: The tenant of everybody where the server asks for no API key.
OPEN = "-"


def ensure_secret() -> None:
    """Make the secret that turns keys into tenants, unless there is one; API servers inherit it as environment.

    Call it in the process that starts the API servers, before it starts them. A user who wants the tenants to outlive
    a restart sets the variable.
    """
    if not os.environ.get(SECRET_VARIABLE):
        os.environ[SECRET_VARIABLE] = secrets.token_hex(32)


def tenant_of(request: Any | None) -> str:
    """The tenant of an HTTP request: ``-`` without --api-key, else 32 hex digits derived from its key.

    Args:
        request: starlette's Request, or None where there is none (``vllm run-batch``).
    Raises:
        RequestError: 401, the server has API keys and the request brings none of them. vLLM's own check lets that
            happen on routes outside /v1, such as /invocations.
    """
    keys = _api_keys(request)
    if not keys:
        return OPEN
    assert request is not None
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    given = token.encode()
    known = [hmac.compare_digest(given, key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(known):
        raise RequestError(
            "sessions belong to an API key, and this request has none that the server knows; "
            "send the header `Authorization: Bearer KEY`",
            status=401,
            param="Authorization",
        )
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        raise RuntimeError("tenants.ensure_secret() was not called before the API server started")
    return hmac.new(secret.encode(), given, hashlib.sha256).digest()[:16].hex()


def _api_keys(request: Any | None) -> list[str]:
    """The keys that vLLM's AuthenticationMiddleware accepts (vllm/entrypoints/serve/middleware/register.py)."""
    args = getattr(request.app.state, "args", None) if request is not None else None
    if args is None:
        return []
    from vllm import envs

    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
