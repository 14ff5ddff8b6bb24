"""Whose sessions: each API key has its own. The key itself never leaves this module."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from vllm_ttt.errors import ConfigError, RequestError
from vllm_ttt.state_dir import SECRET_VARIABLE, StateDir

#: The tenant of the admin key, for the API servers: not the key itself.
ADMIN_VARIABLE = "TTT_ADMIN_TENANT"
#: The tenant of everybody where the server asks for no API key.
OPEN = "-"


def ensure_secret(state_dir: str | None = None) -> None:
    """Find or make the secret that turns keys into tenants, unless it is set; API servers inherit it as environment.

    Call it in the process that starts the API servers, before it starts them. The tenants outlive a restart where there is a
    state dir, which keeps the secret, or where the user sets the variable. Raises ConfigError where the dir cannot be used.
    """
    if not os.environ.get(SECRET_VARIABLE):
        os.environ[SECRET_VARIABLE] = StateDir(state_dir).secret() if state_dir else secrets.token_hex(32)


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
    return _tenant(given)


def admit_admin(args: Any, file: str | None) -> None:
    """Make the key in ``file`` one that the server knows, and remember its tenant for `is_admin`.

    Args:
        args: vLLM's Namespace; its ``api_key`` gets one key more.
    Raises:
        ConfigError: the file cannot be read, holds no key, or the server asks for no keys.
    """
    if file is None:
        return
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sessions.admin_key_file {file} cannot be read: {error}") from None
    known = known_keys(args)
    if not known:
        raise ConfigError("sessions.admin_key_file needs --api-key: without it everybody may do everything")
    if len(key) < 16 or any(c.isspace() for c in key):
        raise ConfigError(f"sessions.admin_key_file {file} must hold one key of at least 16 characters, without blanks")
    if key not in known:
        args.api_key = [*known, key]
    os.environ[ADMIN_VARIABLE] = _tenant(key.encode())


def is_admin(request: Any) -> bool:
    """Whether the request brings the admin key. Raises RequestError (401) as `tenant_of`."""
    admin = os.environ.get(ADMIN_VARIABLE, "")
    return bool(admin) and hmac.compare_digest(tenant_of(request), admin)


def _tenant(key: bytes) -> str:
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        raise RuntimeError("tenants.ensure_secret() was not called before the API server started")
    return derive(secret, key)


def derive(secret: str, key: bytes) -> str:
    """The tenant of an API key under a secret: 32 hex digits."""
    return hmac.new(secret.encode(), key, hashlib.sha256).digest()[:16].hex()


def _api_keys(request: Any | None) -> list[str]:
    """The keys that vLLM's AuthenticationMiddleware accepts (vllm/entrypoints/serve/middleware/register.py)."""
    args = getattr(request.app.state, "args", None) if request is not None else None
    return known_keys(args) if args is not None else []


def known_keys(args: Any) -> list[str]:
    """The API keys that vLLM's Namespace ``args``, or else the environment, names."""
    from vllm import envs

    return [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]
