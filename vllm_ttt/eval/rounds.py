"""What the demo does: sessions read this project and a book, a document at a time, beside whatever else remembers.

A round is one document of every session, in every arm. So the arms can be watched side by side while they go.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.measures import Measures, Reading, measure
from vllm_ttt.eval.protocols import CONTEXT_DOCUMENTS, NOT_AGAIN, Result, put_before

#: Tokens of a document that can be predicted, one chunk by default, and how many at its end are scored.
WINDOW, SCORED = 512, 384
ARMS = ("frozen", "retrieval", "context", "ttt")
#: Characters of a file that are looked at: it is cut to WINDOW + 1 tokens afterwards.
CHARACTERS = 6000

#: Tokens of the README that its session reads, and how often.
PAGE, READINGS = 400, 8
#: Asked before and after, and tokens of the answer.
QUESTION, ANSWER = "What is vllm-ttt a plugin for?", 48

#: arm, session, what it made of the round's document
Saw = Callable[[str, int, Measures], None]


@dataclass(frozen=True)
class Library:
    """What the sessions read: ``windows[session][round]``, token ids; and which files these are."""

    domains: list[str]
    windows: list[list[list[int]]]
    files: dict[str, list[str]]


@dataclass
class Answers:
    """What was said before and after the page was read: to the question (None: no chat template), and from its beginning."""

    asked: list[str | None] = field(default_factory=list)
    went_on: list[str] = field(default_factory=list)
    #: how the page begins, and goes on; its loss at each reading
    beginning: str = ""
    truth: str = ""
    losses: list[float] = field(default_factory=list)


def files(root: Path) -> dict[str, list[Path]]:
    """Files of a checkout by domain, ordered by `_place`. Raises ConfigError where ``root`` is none."""
    found = {
        "source code": [*(root / "vllm_ttt").rglob("*.py")],
        "documents": [*(root / "docs").glob("*.md"), root / "patches" / "README.md", root / "CONTRIBUTING.md"],
        "kjv": [*(root / "demo" / "texts" / "kjv").glob("*.txt")],
    }
    for paths in found.values():
        if not paths or not all(path.is_file() for path in paths):
            raise ConfigError(f"{root} is no checkout of vllm-ttt, whose files the demo reads: run `make demo` in one")
        paths.sort(key=lambda path: _place(path.relative_to(root)))
    return found


def _place(path: Path) -> bytes:
    """A key by which files stand in a random order; where one is added, the others keep theirs."""
    return hashlib.sha256(path.as_posix().encode()).digest()


async def library(root: Path, tokenize: Callable[[str], Awaitable[list[int]]], rounds: int, sessions: int = 3) -> Library:
    """Read the first files that are long enough for a window, ``rounds`` for each of ``sessions`` domains.

    Raises ConfigError: ``root`` is no checkout, or has too few of them.
    """
    work = Library([], [], {})
    for domain, paths in list(files(root).items())[:sessions]:
        windows, names = [], []
        for path in paths:
            ids = await tokenize(path.read_text(encoding="utf-8")[:CHARACTERS])
            if len(ids) > WINDOW:
                windows.append(ids[: WINDOW + 1])
                names.append(str(path.relative_to(root)))
            if len(windows) == rounds:
                break
        if len(windows) < rounds:
            raise ConfigError(f"{domain}: {len(windows)} files of more than {WINDOW} tokens; the demo needs {rounds}")
        work.domains.append(domain)
        work.windows.append(windows)
        work.files[domain] = names
    return work


def requests(work: Library) -> int:
    """How many times ``compare`` will call ``saw``."""
    return len(ARMS) * sum(map(len, work.windows))


def name_of(domain: str) -> str:
    """The session that reads ``domain``."""
    return f"demo-{domain.replace(' ', '-')}"


async def compare(client: Client, work: Library, saw: Saw) -> Result:
    """Every arm of every round; the sessions stay on the server. Raises ServerError, from the client.

    In the first round nothing has been sent before, so "retrieval" and "context" are the frozen model.
    """
    result = Result(work.domains, {arm: [] for arm in ARMS})
    for i in range(len(work.windows[0])):
        for arm in ARMS:
            result.arms[arm].append(await _row(client, work, arm, i, result, saw))
    return result


async def _row(client: Client, work: Library, arm: str, i: int, result: Result, saw: Saw) -> list[Measures]:
    async def one(s: int) -> Measures:
        if i == 0 and arm in NOT_AGAIN:
            measures = result.arms["frozen"][0][s]
        else:
            window = work.windows[s][i]
            measures = measure(window, await _read(client, arm, work.domains[s], work.windows[s][:i], window), SCORED)
        saw(arm, s, measures)
        return measures

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(s)) for s in range(len(work.domains))]
    except ExceptionGroup as errors:  # all sessions meet the same trouble: one of them tells it
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _read(client: Client, arm: str, domain: str, earlier: list[list[int]], window: list[int]) -> Reading:
    if arm == "ttt":
        return await client.read(window, name_of(domain))
    if arm == "frozen":
        return await client.read(window)
    before = put_before(arm, earlier, window, client.max_model_len - 1 - len(window), CONTEXT_DOCUMENTS)
    return (await client.read(before + window)).last(WINDOW)


async def question(client: Client, text: str, step: Callable[[], None]) -> Answers:
    """Ask a session, let it read ``text`` READINGS times, its first PAGE tokens, and ask it again.

    ``step`` is called READINGS + 2 times. Whether the model can go on is asked after the first sentence.
    """
    page, session, end = (await client.tokenize(text))[:PAGE], name_of("readme"), text.index(". ") + 1
    beginning = await client.tokenize(text[:end])
    answers = Answers(beginning=text[:end], truth=text[end : end + 4 * ANSWER])

    async def ask() -> None:
        answers.asked.append(await client.ask(QUESTION, ANSWER, session))
        answers.went_on.append(await client.go_on(beginning, ANSWER, session))
        step()

    await ask()
    for _ in range(READINGS):
        losses = await client.score(page, session)
        answers.losses.append(sum(losses) / len(losses))
        step()
    await ask()
    return answers


def agree(text: str, truth: str) -> int:
    """How many characters ``text`` begins with that ``truth`` begins with, too. Space before either does not count."""
    text, truth = text.lstrip(), truth.lstrip()
    return next((i for i, (a, b) in enumerate(zip(text, truth, strict=False)) if a != b), min(len(text), len(truth)))
