"""docs/recipes.py, which runs the recipes of docs/recipes.md, as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("recipes", Path(__file__).parents[1] / "docs" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["recipes"] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


recipes = _module()
