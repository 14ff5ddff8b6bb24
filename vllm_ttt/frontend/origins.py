"""Pages of other sites: a browser sends what they ask it to, with nobody's consent, to a server that asks for no key."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import tenants


def check_origin(request: Any) -> None:
    """Raise RequestError (403) where a page of another site has a browser change a session.

    No page can make up the header with an API key; where there is none, the browser says where the request comes from, and who
    is no browser says nothing. What vLLM's ``--allowed-origins`` names may do as it likes.
    """
    if request.method in ("GET", "HEAD", "OPTIONS") or tenants.tenant_of(request) != tenants.OPEN:
        return
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    allowed = getattr(getattr(request.app.state, "args", None), "allowed_origins", None) or ()
    if "*" in allowed or origin in allowed:
        return
    # Browsers send the second to https and to this machine alone.
    other = site not in ("same-origin", "none") if site else origin and urlsplit(origin).netloc != request.headers.get("Host")
    if other:
        raise RequestError(
            "a page of another site may not change sessions of a server without API keys; start it with --api-key, or name the "
            "site in --allowed-origins",
            status=403,
        )
