"""What ranks say to each other, and what becomes of the engine where they cannot go on together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from several import together

from vllm_ttt.worker.ranks import ALONE, FAILED, Ranks, Several

pytestmark = pytest.mark.unit


def test_a_rank_alone_says_nothing_and_copies_nothing() -> None:
    x = torch.randn(3)
    for answer in (ALONE.sum(x), ALONE.total(x), ALONE.same(x), ALONE.part(x, 0), *ALONE.channel().gather(x)):  # type: ignore[misc]
        assert answer is x
    assert torch.equal(ALONE.gather(x)[0], x)
    assert ALONE.agree("it", lambda: 3) == ALONE.channel().tell(lambda: 3) == 3
    ALONE.note(1)
    ALONE.failed("serving survives it")


def said(ranks: Several) -> dict[str, Any]:
    own, called, channel = torch.tensor([1.0, 10.0]) * (ranks.rank + 1), [], ranks.channel()
    ranks.note(5, 6)
    with torch.inference_mode():  # as the worker's hooks run
        found = {
            "sum": ranks.sum(own.clone()),
            "gather": ranks.gather(own),
            "total": ranks.total(own),
            "same": ranks.same(own.clone()),
            "part": ranks.part(torch.arange(6).view(1, 6), 1),
            "nothing": ranks.total(torch.zeros(2, 0, 3)),
            "agree": ranks.agree("number", lambda: called.append(1) or {"rank": ranks.rank}),
        }
    found |= {"called": len(called), "channel": channel.gather(own), "told": channel.tell(lambda: ranks.rank + 7)}
    try:
        channel.tell(_broken)
    except FileNotFoundError as error:
        found["error"] = str(error)
    return found


def _broken() -> None:
    raise FileNotFoundError("the file is gone")


def test_what_ranks_say(tmp_path: Path) -> None:
    found, codes = together(2, tmp_path, said)
    assert codes == [0, 0], (tmp_path / "1.log").read_text()
    for rank, answer in enumerate(found):
        assert answer["sum"].tolist() == answer["total"].tolist() == [3.0, 30.0]
        assert answer["gather"].tolist() == [[1.0, 10.0], [2.0, 20.0]]
        assert answer["same"].tolist() == [1.0, 10.0]
        assert answer["part"].tolist() == [[0, 1, 2], [3, 4, 5]][rank : rank + 1]
        assert answer["nothing"].shape == (2, 0, 3)
        assert (answer["agree"], answer["called"]) == ({"rank": 0}, int(rank == 0)), "the first decides, alone"
        assert (answer["told"], answer["error"]) == (7, "the file is gone"), "also that it cannot be"
    assert [x.tolist() for x in found[0]["channel"]] == [[1.0, 10.0], [2.0, 20.0]]
    assert found[1]["channel"] is None


def parted(ranks: Several, how: str) -> None:
    for step in range(100):
        ranks.note(step)
        if step == 50 and ranks.rank == 1:
            if how == "note":
                ranks.note(-1)
            elif how == "place":
                ranks.agree("something else", int)
            else:
                try:
                    raise RuntimeError("planted by a test")
                except RuntimeError:
                    ranks.failed("a hook failed")
        ranks.agree("step", lambda: 0)


@pytest.mark.parametrize("how", ["note", "place", "error"])
def test_a_rank_that_fails_or_parts_ends_the_engine_with_its_reason(tmp_path: Path, how: str) -> None:
    """At the next decision, and not when somebody's patience is at its end."""
    found, codes = together(2, tmp_path, parted, how)
    assert found == [None, None]
    assert codes[1] == FAILED
    assert codes[0] not in (0, -9), "the other one neither goes on nor waits for ever"
    log = (tmp_path / "1.log").read_text()
    assert "rank 1 of 2 ends the engine" in log
    expected = {
        "note": "the ranks have parted: it would decide 'step'",
        "place": "the ranks have parted: it would decide 'something else'",
        "error": "planted by a test",
    }
    assert expected[how] in log


def missed(ranks: Several) -> None:
    for iteration in range(9):
        ranks.note(iteration)
        if iteration != 5 or ranks.first:
            ranks.agree("what has been learned", lambda: 0)


def test_a_rank_that_misses_a_decision_does_not_take_another_for_it(tmp_path: Path) -> None:
    found, codes = together(2, tmp_path, missed)
    assert codes[1] == FAILED
    assert "the ranks have parted: it would decide 'what has been learned'" in (tmp_path / "1.log").read_text()
    assert found == [None, None]


def test_what_one_rank_is_asked_for_is_not_asked_of_the_base_class() -> None:
    """Every question has an answer for one rank, too."""
    assert {name for name in vars(Several) if not name.startswith("_")} - {"end"} <= set(vars(Ranks)) | {"size", "rank"}
