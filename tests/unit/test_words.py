"""The words of README and docs/: no sentence that readers stumbled at, no name that the code does not know, each term once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from vllm_ttt.config import TTTConfig
from vllm_ttt.metrics import METRICS, PREFIX
from vllm_ttt.types import Knobs

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.md"))]
#: What a user reads besides: settings, fields of an answer, commands.
SOURCES = [
    ROOT / "configs" / "default.yaml",
    *(ROOT / "vllm_ttt" / name for name in ("config.py", "cli.py", "frontend/models.py", "frontend/routes.py", "metrics.py")),
]
TEXTS = {page: " ".join(page.read_text(encoding="utf-8").split()) for page in [*PAGES, *SOURCES]}

#: Beginnings and ends of sentences that made newcomers stop.
STUMBLED_AT = (
    "so much of its delta the session is served with",
    "less where that was not like what the session had sent before",
    "why it could not be saved lately, or was not what had been saved",
    "why the session could not be saved lately, or was not what had been saved",
    "a prompt of which a smaller share is like the session's past",
    "the session that has most gives up its oldest",
    "learning takes at most this factor less one of the serving time",
    "for what is no session id",
    "for a session that this key has not",
    "what is to be learned is computed, also where the prefix cache has it",
    "is served knowing nothing of itself",
    "s knows the pairs and not their losses",
    "what is computed while the delta may be moving gets keys that nobody asks for",
    "it ceases to write such blocks one step before the other prompt begins",
    "goes on from an earlier one of the session, what they share is history",
    "in bf16 the imported b is the served one",
    "where nothing is ever idle, that is",
    "before the no-regret scale",
    "the second line was not measured again",
)


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_sentence_that_readers_stumbled_at(page: Path) -> None:
    found = [words for words in STUMBLED_AT if words in TEXTS[page].lower()]
    assert not found


def code(page: Path) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_the_pages_are_in_the_code(page: Path) -> None:
    """Settings (``section.name``), metrics, knobs, and commands with what they are told to do."""
    from vllm_ttt.cli import app

    sections = {name: type(field.default).model_fields for name, field in TTTConfig.model_fields.items()}
    for text in code(page):
        for section, name in re.findall(rf"^({'|'.join(sections)})\.(\w+)", text):
            assert name in sections[section], f"there is no setting {text}"
        if knob := re.match(r"(ttt_\w+)(?:: [01])?$", text):
            Knobs.parse({knob[1]: 1})
        if match := re.match(r"vllm-ttt ([a-z]+)(?: ([a-z]+)\b)?", text):
            command = typer.main.get_command(app)
            for word in filter(None, match.groups()):
                if not hasattr(command, "commands"):
                    break  # what follows is an argument
                assert word in command.commands, f"there is no command {text}"  # pyright: ignore
                command = command.commands[word]  # pyright: ignore
    names = {f"{PREFIX}{metric.name}" for metric in METRICS}
    series = names | {name + end for name in names for end in ("_sum", "_count", "_bucket")}
    for name in re.findall(rf"{PREFIX}\w+", page.read_text(encoding="utf-8")):
        assert name in series or name == PREFIX, f"there is no metric {name}"


def test_each_term_is_defined_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)[
        2:
    ]
    terms = [term for row, _ in rows for term in row.split(", ")]
    assert len(terms) == len(set(terms)) > 20
    first = [row for row, _ in rows]
    assert first == sorted(first, key=str.lower), "in the order of the alphabet"
    for row, meaning in rows:
        assert meaning.endswith("."), row
