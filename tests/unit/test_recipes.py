"""docs/recipes.md: all code compiles, every recipe names its session, and what it imports is asked for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from recipe_page import recipes

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


RECIPES = recipes.recipes()


def test_there_is_one_for_each_client():
    assert list(RECIPES) == ["openai-python", "langchain", "litellm", "agent", "guidellm", "locust", "llm"]


@pytest.mark.parametrize("name", RECIPES)
def test_code_is_code_and_names_its_session(name: str):
    recipe = RECIPES[name]
    asked = {re.split(r"[=\[]", line)[0] for line in (ROOT / "requirements" / "recipes.txt").read_text().splitlines()}
    for file, text in recipe.files.items():
        if file.endswith(".py"):
            tree = ast.parse(text)
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            imports = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
            assert {str(i).replace("_", "-") for i in imports} <= asked | {"json"}
        else:
            assert yaml.safe_load(text)
    everything = "".join(recipe.files.values())
    assert re.search(rf"(?:session_id|X-Session-ID)\W+{name}\b", everything), "docs/recipes.py looks at this session"
    assert recipes.URL in everything + recipe.command
    program = recipe.command.replace("export LLM_USER_PATH=.\n", "").split()[0]
    assert program == "python" or program in asked
