"""A proxy in the environment, and our own clients: a server on this machine is asked directly, since no proxy can reach it."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.request import getproxies

import httpx

from vllm_ttt.errors import TTTError

T = TypeVar("T")


def connect(make: Callable[..., T], url: str, error: type[TTTError], **options: Any) -> T:
    """``make(**options)``, a client of httpx for ``url``. Raises ``error`` where there can be none."""
    if local(url):
        options["trust_env"] = False
        if url.startswith("https:"):
            options["verify"] = httpx.create_ssl_context()  # with the certificates that the environment names
    try:
        return make(**options)
    except ImportError as missing:  # httpx asks for it whichever host is meant
        raise error(f"{url} would be asked {named()}: {missing} Or name the host in NO_PROXY") from None
    except (ValueError, httpx.InvalidURL) as wrong:
        raise error(f"{url} cannot be asked: {wrong}") from None


def local(url: str) -> bool:
    """Whether the URL's host is this machine, by its name or address."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or host.endswith(".localhost") or _loopback(host)
    except httpx.InvalidURL:
        return False


def _loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def through(url: str) -> str:
    """How a server is asked that did not answer, for a message: nothing, or by which variables."""
    return "" if local(url) or not named() else f" (asked {named()})"


def named() -> str:
    """The variables of the environment that name a proxy; never what they hold, which may be a password."""
    found = [f"{kind.upper()}_PROXY" for kind in ("http", "https", "all") if getproxies().get(kind)]
    return f"through the proxy of {' or '.join(found)}" if found else ""
