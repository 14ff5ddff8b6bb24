"""What all users of a run share: where the server is, the texts, the books, and what did not agree."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import requests

from load.books import Book, Rule, rolled_back
from load.texts import Texts


@dataclass
class World:
    """``name``: begins every session's id. ``learn``: whether sessions learn, or only use what they have."""

    url: str
    name: str
    learn: bool
    key: str | None = None
    #: of a tenant that owns none of the sessions
    hostile_key: str | None = None
    books: dict[str, Book] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    #: sessions of users who manage them: checked as they go
    owned: list[str] = field(default_factory=list)
    #: of those, how many the guard has returned to an earlier version
    guarded: int = 0

    def __post_init__(self) -> None:
        self.headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.model: str = self.get("/v1/models")["data"][0]["id"]
        learn = self.get("/v1/ttt/config")["learn"]
        self.rule = Rule(learn["chunk"], learn["min_chunk"])
        self.texts = Texts(self.url, self.model, self.headers)

    def get(self, path: str) -> Any:
        answer = requests.get(self.url + path, headers=self.headers, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """A chat as the model gets it. A token may span a turn and the answer to it: then the turn does not begin this chat."""
        body = {"model": self.model, "messages": messages}
        answer = requests.post(f"{self.url}/tokenize", json=body, headers=self.headers, timeout=60)
        answer.raise_for_status()
        return answer.json()["tokens"]

    def open(self, what: str) -> Book:
        """The book of a new session."""
        book = Book(f"{self.name}-{what}", self.rule, self.learn)
        self.books[book.name] = book
        return book

    def own(self, what: str) -> str:
        """The name of a new session that its user manages, and deletes."""
        self.owned.append(f"{self.name}-{what}")
        return self.owned[-1]

    def audit(self, patience: float = 120) -> dict[str, Any]:
        """Compare every session with its book, once it has learned what it was sent; then delete it.

        Returns: how many were compared, at their version exactly or, where requests were given up, within bounds; versions
        and tokens in all; what does not agree.
        """
        found: dict[str, Any] = {
            "exact": 0,
            "bounded": 0,
            "rolled_back": self.guarded,
            "versions": 0,
            "tokens": 0,
            "skipped": {},
        }
        found["owned"] = len(self.owned)
        problems = list(self.problems)
        for name, book in self.books.items():
            session = self._settled(book, patience)
            if session is None:
                if book.chunks or book.sent:
                    problems.append(f"{name}: {book.chunks} chunks were sent, and there is no such session")
                continue
            problems += book.check(session)
            kind = "rolled_back" if rolled_back(session) else "bounded" if book.doubtful else "exact"
            found[kind] += 1
            found["versions"] += session["version"]
            found["tokens"] += session["tokens_learned"]
            for reason, tokens in session["tokens_skipped"].items():
                found["skipped"][reason] = found["skipped"].get(reason, 0) + tokens
            gone = requests.delete(f"{self.url}/v1/ttt/sessions/{name}", headers=self.headers, timeout=60)
            if gone.status_code != 200:
                problems.append(f"{name}: DELETE is {gone.status_code}: {gone.text[:200]}")
        left = [s["session_id"] for s in self.get("/v1/ttt/sessions")["sessions"] if s["session_id"].startswith(self.name)]
        problems += [f"{name}: nobody asked for this session" for name in left]
        return {**found, "problems": problems}

    def _settled(self, book: Book, patience: float) -> dict[str, Any] | None:
        deadline, before = time.monotonic() + patience, None
        while True:
            answer = requests.get(f"{self.url}/v1/ttt/sessions/{book.name}", headers=self.headers, timeout=60)
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            session = answer.json()
            if book.settled(session, before) or time.monotonic() > deadline:
                return session
            before = session
            time.sleep(0.05)
