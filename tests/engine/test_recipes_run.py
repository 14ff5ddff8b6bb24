"""Recipes of docs/recipes.md that need no further package, as they stand there."""

from __future__ import annotations

import pytest
from recipe_page import recipes
from served import Served

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["openai-python", "locust"])
def test_a_recipe_runs_and_its_session_learns(server: Served, name: str) -> None:
    done = recipes.run(recipes.recipes()[name], server.url, "demo")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    session = recipes.session(server.url, name)
    assert session["tokens_learned"] > 16
    assert server.http.delete(f"/v1/ttt/sessions/{name}").status_code == 200
