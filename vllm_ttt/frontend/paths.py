"""The path of a request as the routes know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def path_of(scope: Mapping[str, Any]) -> str:
    """Without ``--root-path``, which a proxy may or may not have taken away. ``scope`` is ASGI's."""
    return scope["path"].removeprefix(scope.get("root_path", ""))
