"""Run the recipes of docs/recipes.md against a server, as they stand there, and see that their sessions have learned.

python docs/recipes.py [--base-url http://127.0.0.1:8000] [--model smollm2] [RECIPE ...]

A recipe is a heading with code below it: files, whose first line says what they are called, and one `sh` block, which is run
beside them. Its session is called as the heading is. Needs nothing but what the recipes need.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
URL, MODEL = "http://127.0.0.1:8000", "smollm2"


@dataclass(frozen=True)
class Recipe:
    """``files`` by name, and the ``command`` that is run beside them."""

    files: dict[str, str]
    command: str


def recipes() -> dict[str, Recipe]:
    """All recipes of the page that have code, by the name of their session."""
    found = {}
    for section in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title = section.partition("\n")[0]
        blocks = re.findall(r"^```(\w+)\n(.+?)^```", section, re.MULTILINE | re.DOTALL)
        if blocks:
            files = {text.partition("\n")[0].removeprefix("# "): text for kind, text in blocks if kind != "sh"}
            (command,) = [text for kind, text in blocks if kind == "sh"]
            found[title.lower()] = Recipe(files, command)
    return found


def run(recipe: Recipe, url: str, model: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe with another server, and another name of its model, than stand on the page."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in recipe.files.items():
            for quoted in (f'"{MODEL}"', f'"openai/{MODEL}"'):
                text = text.replace(quoted, quoted.replace(MODEL, model))
            (Path(folder) / name).write_text(text.replace(URL, url))
        (Path(folder) / "demo").symlink_to(ROOT / "demo")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = ["bash", "-euc", recipe.command.replace(URL, url)]
        environment = {**os.environ, "PATH": path, "NO_PROXY": "127.0.0.1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def session(url: str, name: str) -> dict[str, Any]:
    """The session once nothing of it waits."""
    while True:
        with urllib.request.urlopen(f"{url}/v1/ttt/sessions/{name}") as answer:
            found = json.load(answer)
        if not found["tokens_pending"] and not found["requests_open"]:
            return found
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"some of: {', '.join(recipes())}")
    parser.add_argument("--base-url", default=URL)
    parser.add_argument("--model", default=MODEL, help="what the server calls its model")
    given = parser.parse_args()
    failed = []
    for name in given.recipes or recipes():
        done = run(recipes()[name], given.base_url, given.model)
        print(f"== {name}\n{done.stdout.strip()}")
        try:
            learned = session(given.base_url, name)["tokens_learned"]
        except urllib.error.HTTPError:
            learned = 0
        print(
            f"-- {'ends well' if done.returncode == 0 else f'FAILED ({done.returncode})'}; its session learned {learned} tokens"
        )
        if done.returncode or not learned:
            print(done.stderr[-3000:])
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
