"""What all kinds of users have in common."""

from __future__ import annotations

import itertools
import random
from typing import Any

from locust import User, between

from load.books import Book
from load.client import Client
from load.world import World

_NUMBERS = itertools.count()


class Person(User):
    """``world``: what all users share; made before the first of them."""

    abstract = True
    wait_time = between(0.2, 0.8)
    kind = ""

    def on_start(self) -> None:
        self.world: World = self.environment.world  # type: ignore[attr-defined]
        self.number = next(_NUMBERS)
        self.rng = random.Random(f"{self.kind} {self.number}")
        self.client = Client(self.environment, self.world.url, self.world.model, self.world.key)
        self.book: Book | None = None
        self.left = 0

    def session(self, requests: int) -> Book:
        """The session of this user, a new one where the last had its requests."""
        if self.book is None or self.left == 0:
            self.book, self.left = self.world.open(f"{self.kind}-{self.number}-{self.rng.randrange(10**6)}"), requests
            self.begin()
        self.left -= 1
        return self.book

    def begin(self) -> None:
        """A new session begins."""

    def body(self, **body: Any) -> dict[str, Any]:
        if self.book is not None:
            body["session_id"] = self.book.name
            if not self.world.learn:
                body["vllm_xargs"] = {"ttt_learn": 0}
        return {"temperature": 0, **body}
