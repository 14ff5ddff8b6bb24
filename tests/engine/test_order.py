"""Read-your-writes, order, and rest."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from served import Documents, Served, completion

pytestmark = pytest.mark.engine


def test_back_to_back_requests_see_what_came_before(server: Served, documents: Documents) -> None:
    name = server.fresh()
    versions = [server.complete(documents["kjv"][i][:1025], name)["ttt"]["version"] for i in range(4)]
    assert versions == [0, 4, 8, 12]


def test_concurrent_requests_of_a_session_keep_their_order(server: Served, documents: Documents) -> None:
    """They are served one after another, each with all that the earlier ones sent: request i meets version i."""
    name, texts = server.fresh(), [documents["man_fr"][0][100 * i : 100 * i + 257] for i in range(6)]
    answers = [answer.json() for answer in server.together(*(completion(text, name, max_tokens=3) for text in texts))]
    assert sorted(answer["ttt"]["version"] for answer in answers) == list(range(6))
    server.settle()
    assert server.session(name)["version"] == 6


def test_a_reader_waits_for_what_was_sent_before(server: Served, documents: Documents) -> None:
    """Also a request that learns nothing itself."""
    name = server.fresh()
    reader = completion(documents["kjv"][0][:50], name, vllm_xargs={"ttt_learn": 0})
    for i in range(3):
        server.complete(documents["kjv"][i][:1025], name)
        assert server.together(reader, reader)[1].json()["ttt"]["version"] == 4 * (i + 1)


def test_thirty_requests_over_five_sessions(server: Served, documents: Documents) -> None:
    names, texts = [server.fresh("thirty") for _ in range(5)], list(documents.values())
    lengths = (40, 257, 300, 600, 1025, 100)
    bodies = [
        completion(texts[i][j % 3][j : j + lengths[j]], name, max_tokens=1 + 3 * j)
        for j in range(6)
        for i, name in enumerate(names)
    ]
    answers = server.together(*bodies)
    assert [answer.status_code for answer in answers] == [200] * 30
    server.settle()
    chunks = sum(-(-(n - 1) // 256) for n in lengths)
    for i, name in enumerate(names):
        assert server.session(name)["version"] == chunks
        assert len({answer.json()["ttt"]["version"] for answer in answers[i::5]}) == 6, "each saw all before it, in some order"


def test_learning_goes_on_while_others_are_answered(server: Served, documents: Documents) -> None:
    """A long answer to somebody else must not keep a session's next request waiting until it ends."""
    name = server.fresh()
    long = completion(documents["man2"][0][:50], max_tokens=1000, ignore_eos=True, stream=True)
    with server.http.stream("POST", "/v1/completions", json=long) as answer:
        lines = answer.iter_lines()
        next(lines)
        for i in range(3):
            body = completion(documents["kjv"][0][: 513 - i], name)
            assert server.together(body)[0].json()["ttt"]["version"] == 2 * i
        assert sum(line.startswith("data: {") for line in lines) > 100, "all of it was over before the long answer was"


def test_more_sessions_at_once_than_slots(server: Served, documents: Documents) -> None:
    names = [server.fresh("crowd") for _ in range(10)]
    answers = server.together(*(completion(documents["kjv"][0][:257], name, max_tokens=30) for name in names))
    assert [answer.status_code for answer in answers] == [200] * 10
    server.settle()
    assert [server.session(name)["version"] for name in names] == [1] * 10


def test_an_idle_engine_rests(server: Served) -> None:
    """After all of it, no process of the server is busy. (vLLM's own worker spins for a second after each message.)"""
    server.settle()
    time.sleep(2)
    before, started = cpu_seconds(server.process.pid), time.monotonic()
    time.sleep(3)
    share = (cpu_seconds(server.process.pid) - before) / (time.monotonic() - started)
    assert share < 0.05, f"{share:.0%} of a core while nothing is asked of it"


def cpu_seconds(group: int) -> float:
    """Processor time of all processes of a group so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    assert ticks, "no process found"
    return ticks / os.sysconf("SC_CLK_TCK")
