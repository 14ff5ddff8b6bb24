"""GET /ttt: the live page. A shell that knows nothing: all data come through /v1/ttt, with the key that the person types in."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(tags=["test-time training"])


@router.get("/ttt", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """One document, with its style and its script inside it; nothing is loaded from anywhere else."""
    text, policy = _built()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


@functools.cache
def _built() -> tuple[str, str]:
    """The document, and a policy under which that style and that script run, and nothing else does."""
    folder = files("vllm_ttt.frontend") / "static"
    html, style, script = ((folder / name).read_text(encoding="utf-8") for name in ("ttt.html", "ttt.css", "ttt.js"))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html.replace("/* style */", style).replace("/* script */", script), policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
