"""The demo without its server: what is read, what is shown, who is said to win, and what an interruption leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from vllm_ttt.errors import ConfigError
from vllm_ttt.eval import demo, plots, rounds
from vllm_ttt.eval.board import HEADS, Board, later, progress, verdict
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.measures import Measures
from vllm_ttt.eval.protocols import Result

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
#: how the best of a row begins
BEST = "\x1b[1;32m"


async def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text[::4]]


def test_a_checkout_has_enough_to_read():
    work = asyncio.run(rounds.library(ROOT, letters, demo.ROUNDS, demo.SESSIONS))
    assert work.domains == list(work.files) == ["source code", "documents", "kjv"]
    for domain, windows in zip(work.domains, work.windows, strict=True):
        assert [len(window) for window in windows] == [rounds.WINDOW + 1] * demo.ROUNDS
        assert len(set(work.files[domain])) == demo.ROUNDS
        assert all((ROOT / name).is_file() for name in work.files[domain])
    again = asyncio.run(rounds.library(ROOT, letters, 3, 2))
    assert again.files == {domain: work.files[domain][:3] for domain in work.domains[:2]}, "the order is fixed"


def test_a_file_that_is_added_moves_no_other(tmp_path: Path):
    others = "docs/a.md", "patches/README.md", "CONTRIBUTING.md", "demo/texts/kjv/0.txt"
    for name in (*(f"vllm_ttt/{i}.py" for i in range(9)), *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    before = rounds.files(tmp_path)["source code"]
    assert before != sorted(before), "it is not the order of names"
    for i in range(9):
        added = tmp_path / "vllm_ttt" / f"added{i}.py"
        added.touch()
        after = rounds.files(tmp_path)["source code"]
        assert [path for path in after if path != added] == before
        added.unlink()


def test_elsewhere_it_says_what_is_missing(tmp_path: Path):
    with pytest.raises(ConfigError, match="no checkout of vllm-ttt"):
        rounds.files(tmp_path)
    with pytest.raises(ConfigError, match=r"the demo needs 9000"):
        asyncio.run(rounds.library(ROOT, letters, 9000))


def made(nats: Callable[[str, int, int], float]) -> Result:
    """Three rounds of two sessions; each accepts 100 characters less its loss's tenths, in ten runs."""
    result = Result(["a", "b"])
    for arm in HEADS:
        losses = [[nats(arm, i, s) for s in range(2)] for i in range(3)]
        result.arms[arm] = [[Measures(loss, 1, 1, 0, 0, 10, round(100 - 10 * loss)) for loss in row] for row in losses]
    return result


def losses(arm: str, i: int, s: int) -> float:
    """At first all are equal; then the context wins the second document, and the session the third."""
    gains = {"frozen": (0, 0), "retrieval": (0.1, -0.5), "context": (0.7, 0.1), "ttt": (0.2, 0.6 + s)}[arm]
    return 3 - (0.0, *gains)[i]


def shown(board: Board) -> list[str]:
    """The lines of a terminal of 80 columns, with colours."""
    text = StringIO()
    Console(width=80, force_terminal=True, color_system="standard", file=text).print(board.table())
    return text.getvalue().splitlines()


def test_the_table_fills_and_marks_who_was_best():
    board, result = Board(3, 2, progress(Console(quiet=True))), made(losses)
    for i in range(3):
        for arm in HEADS:
            for measures in result.arms[arm][i]:
                board.saw(arm, measures)
        assert board.row_is_whole()
        board.saw("frozen", result.arms["frozen"][i][0])
        assert not board.row_is_whole()
        board.cells["frozen"].pop()
    rows = {line.split()[0]: line for line in shown(board) if line.split()}
    assert BEST not in rows["1"], "nobody remembers anything yet"
    assert f"{BEST}2.300" in rows["2"]
    assert f"{BEST}1.900" in rows["3"], "of the session: 2.4 and 1.4"
    assert f"{BEST}8.10" in rows["3"]
    assert f"{BEST}2.350" in rows["2-3"]
    assert rows["2"].count(BEST) == rows["3"].count(BEST) == 2, "a loss, and characters"


def test_a_table_says_nothing_of_what_is_not_known():
    board = Board(3, 2, progress(Console(quiet=True)))
    board.saw("frozen", Measures(3.0))
    text = "\n".join(shown(board))
    assert "3.000" in text
    assert BEST not in text
    assert "2-3" not in text


def test_who_wins_is_said_as_it_is():
    least, most, sessions, harmed = verdict(made(losses))
    assert least == "least loss, by document: last documents 1 of 2, TTT session 1 of 2"
    assert most == "most characters accepted, by document: last documents 1 of 2, TTT session 1 of 2"
    assert sessions == "least loss, by session: a: last documents, b: TTT session"
    assert harmed.endswith("frozen model: BM25 retrieval 2 of 4, last documents 0 of 4, TTT session 0 of 4")
    never = verdict(made(lambda arm, i, s: 3.0 + (arm != "frozen") * i))
    assert never[0] == "least loss, by document: frozen model 2 of 2", "also where it is not the one that we wish"


def test_the_mean_is_of_what_came_after_something():
    found = later(made(losses))
    assert found["frozen"] == {"nats": 3.0, "characters_pooled": pytest.approx(7.0)}
    assert found["ttt"] == {"nats": pytest.approx(2.35), "characters_pooled": pytest.approx(7.65)}


def test_the_plot_is_of_all_arms(tmp_path: Path):
    plots.plot_rounds(made(losses), tmp_path / "new" / "demo.svg", "a title")
    text = (tmp_path / "new" / "demo.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {label} -->" in text for label in ("frozen model", "BM25 retrieval", "last documents", "TTT session"))
    assert "<!-- a title -->" in text


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("as it", 5), ("as it is", 8), ("as in", 4), ("other", 0), (" as in", 4), (" other", 0)]
)
def test_how_far_an_answer_is_right(text: str, count: int):
    assert rounds.agree(text, "as it is") == rounds.agree(text, " as it is") == count


class Parrot:
    """Of a Client, what a question needs: it answers as it is told."""

    def __init__(self, *answers: str):
        self.answers = iter(answers)

    tokenize = staticmethod(letters)

    async def ask(self, *_: object) -> str:
        return "a long answer " * 9

    async def go_on(self, *_: object) -> str:
        return next(self.answers)

    async def score(self, *_: object) -> list[float]:
        return [1.0]


def test_what_is_said_is_one_line_each_where_there_is_no_terminal():
    text = StringIO()
    client = cast(Client, Parrot(" very different", " vllm-ttt is a plugin" + " that goes on" * 9))
    asyncio.run(demo._question(client, Console(file=text, width=80)))
    lines = [line for line in text.getvalue().splitlines() if line.startswith("  ")]
    assert [line.partition(":")[0] for line in lines] == [
        "  before", "  after", "  before, 1 character right", "  after, 21 characters right",
    ]  # fmt: skip
    assert all(len(line) > 80 for line in (lines[0], lines[1], lines[3])), "nothing is broken at 80 columns"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interrupted_demo_leaves_no_files(tmp_path: Path, error: type[BaseException]):
    """An error leaves the log, which says what went wrong."""

    def run(folder: Path) -> None:
        with demo._no_files_if_interrupted(folder), demo._scratch(keep=True) as scratch:
            scratches.append(Path(scratch))
            folder.mkdir(exist_ok=True)
            (folder / "server.log").write_text("something")
            raise error

    scratches: list[Path] = []
    out, other = tmp_path / "out", tmp_path / "mine"
    other.mkdir()
    (other / "mine.txt").write_text("not the demo's")
    for folder in (out, other):
        with pytest.raises(error):
            run(folder)
    assert not any(scratch.exists() for scratch in scratches)
    assert out.exists() == (error is ZeroDivisionError)
    assert (other / "server.log").exists() == (error is ZeroDivisionError)
    assert (other / "mine.txt").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_a_server_that_runs_on_keeps_its_temporary_files(keep: bool):
    with demo._scratch(keep) as scratch:
        pass
    assert Path(scratch).exists() == keep
    if keep:
        Path(scratch).rmdir()
