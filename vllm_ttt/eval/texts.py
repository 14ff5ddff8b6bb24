"""Texts as the protocols send them: documents by domain, cut into windows of tokens.

The selection is part of the published figures (docs/algorithm.md), so its seeds are fixed.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_ttt.errors import ConfigError

#: Scored positions of a window; it holds one token more.
LENGTH = 1024

Documents = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Sessions:
    """What each session of a protocol sends: ``windows[s][i]`` is the i-th request of session s, LENGTH + 1 ids."""

    domains: list[str]
    windows: list[list[list[int]]]


def read_texts(root: str | Path) -> dict[str, list[str]]:
    """Texts of ``root/<domain>/*.txt`` by domain, both in name order. Raises ConfigError where there are none."""
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; it must hold one folder of .txt files for each domain")
    found = {
        folder.name: [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }
    found = {domain: texts for domain, texts in found.items() if texts}
    if not found:
        raise ConfigError(f"{root} holds no <domain>/*.txt: put the texts of each domain into a folder of its own")
    return found


async def encode(texts: dict[str, list[str]], tokenize: Callable[[str], Awaitable[list[int]]]) -> Documents:
    """Token ids of every document, by domain."""
    return {domain: [await tokenize(text) for text in domain_texts] for domain, domain_texts in texts.items()}


def interactions(docs: Documents, sessions: int = 2, count: int = 10) -> Sessions:
    """P2: each session sends ``count`` different windows of one domain: the beginnings of its documents.

    Where a domain has too few documents, further segments of the same ones follow; where these do not suffice either,
    a session repeats its last window. Raises ConfigError where a session has none at all.
    """
    domains, windows = [], []
    for domain, documents in docs.items():
        pool = [ids[: LENGTH + 1] for ids in documents if len(ids) > LENGTH + 1]
        missing = count * sessions - len(pool)
        if missing > 0:
            further = [
                ids[start : start + LENGTH + 1] for ids in documents for start in range(LENGTH, len(ids) - LENGTH - 1, LENGTH)
            ]
            random.Random(5).shuffle(further)
            pool += further[:missing]
        random.Random(4).shuffle(pool)
        if len(pool) < sessions:
            raise ConfigError(
                f"domain {domain!r} has {len(pool)} documents of more than {LENGTH + 1} tokens; "
                f"{sessions} sessions need one each (--sessions-per-domain)"
            )
        for first in range(sessions):
            mine = pool[first::sessions][:count]
            windows.append(mine + [mine[-1]] * (count - len(mine)))
            domains.append(domain)
    return Sessions(domains, windows)


def repeats(docs: Documents, sessions: int = 2, passes: int = 4) -> Sessions:
    """P3: each session sends one window ``passes`` times."""
    once = interactions(docs, sessions, 1)
    return Sessions(once.domains, [mine * passes for mine in once.windows])


def long(docs: Documents, sessions: int = 1, count: int = 40) -> Sessions:
    """P2 for long sessions. Raises ConfigError where a domain has too few documents, instead of sending one again."""
    work = interactions(docs, sessions, count)
    for domain, windows in zip(work.domains, work.windows, strict=True):
        different = len({tuple(window) for window in windows})
        if different < count:
            raise ConfigError(
                f"domain {domain!r} has {different} different windows of {LENGTH + 1} tokens for a session, and `long` needs "
                f"{count}: add documents, or ask for fewer (--documents {different})"
            )
    return work
