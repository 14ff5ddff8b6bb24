"""Load goes to this machine alone, unless somebody says otherwise."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_host(url: str, allow: bool) -> None:
    """Raise ValueError where ``url`` is not of this machine, and that is not allowed."""
    host = urlsplit(url).hostname
    if host is None:
        raise ValueError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
    if host not in ("127.0.0.1", "::1", "localhost") and not allow:
        raise ValueError(f"{host} is not this machine; load on somebody's server needs --allow-host")
