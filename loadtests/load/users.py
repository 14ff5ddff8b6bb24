"""The kinds of users. Each names its requests after itself in the statistics, and keeps a book of each session it makes."""

from __future__ import annotations

from locust import task

from load.person import Person

#: Of a session of each kind: requests, and tokens or characters of one.
DOCUMENTS, REPEATS, TURNS = 3, 6, 8
DOCUMENT, REPEATED, MESSAGE = (300, 1000), 600, (150, 500)


class BaseUser(Person):
    """Somebody who never heard of sessions: a prompt of a few hundred tokens, an answer of 24, streamed."""

    weight = 3
    kind = "base"

    @task
    def ask(self) -> None:
        prompt = self.world.texts.window(self.rng, self.rng.randrange(100, 400))
        answer = self.client.complete(self.kind, self.body(prompt=prompt, max_tokens=24, ignore_eos=True))
        if answer.ttt is not None:
            self.world.problems.append(f"a base answer has a ttt object: {answer.ttt}")


class DocumentUser(Person):
    """A few different documents in a session, each once."""

    weight = 2
    kind = "documents"

    @task
    def send(self) -> None:
        book = self.session(DOCUMENTS)
        prompt = self.world.texts.window(self.rng, self.rng.randrange(*DOCUMENT))
        answer = self.client.complete(self.kind, self.body(prompt=prompt, max_tokens=4, ignore_eos=True))
        if answer.error is None:
            book.answered(prompt, answer.prompt_tokens, answer.ttt)


class RepeatingUser(Person):
    """One document again and again."""

    weight = 1
    kind = "repeated"

    def begin(self) -> None:
        self.document = self.world.texts.window(self.rng, REPEATED)

    @task
    def send(self) -> None:
        book = self.session(REPEATS)
        prompt = self.document
        answer = self.client.complete(self.kind, self.body(prompt=prompt, max_tokens=4, ignore_eos=True))
        if answer.error is None:
            book.answered(prompt, answer.prompt_tokens, answer.ttt)


class ChatUser(Person):
    """A conversation that is sent whole with every turn, so that all but what is new is history."""

    weight = 1
    kind = "chat"

    def begin(self) -> None:
        self.messages: list[dict[str, str]] = []

    @task
    def say(self) -> None:
        book = self.session(TURNS)
        said = self.world.texts.passage(self.rng, self.rng.randrange(*MESSAGE))
        messages = [*self.messages, {"role": "user", "content": said}]
        answer = self.client.complete(self.kind, self.body(messages=messages, max_tokens=16), "/v1/chat/completions")
        if answer.error is None:
            book.answered(self.world.tokens(messages), answer.prompt_tokens, answer.ttt)
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]


class HostileUser(Person):
    """Bad ids, bad values, bodies that are too large, streams that are left, other people's sessions."""

    weight = 1
    kind = "hostile"

    @task(3)
    def leaves(self) -> None:
        book = self.session(4)
        prompt = self.world.texts.window(self.rng, self.rng.randrange(*DOCUMENT))
        if self.world.learn:
            book.left(len(prompt))
        after = self.rng.choice((0, 1, 5))
        self.client.leave(self.kind, self.body(prompt=prompt, max_tokens=400, ignore_eos=True), after)

    @task(2)
    def names_badly(self) -> None:
        name = self.rng.choice(["", "x" * 129, "two words", "a/b", "é", "nul\0", 7, ["a"], {"a": 1}, "x" * 100_000])
        body = {"model": self.world.model, "prompt": "x", "session_id": name, "stream": self.rng.random() < 0.5}
        self.client.ask("hostile: bad id", "POST", "/v1/completions", (400,), json=body)

    @task(2)
    def asks_badly(self) -> None:
        value = self.rng.choice([2, -1, 0.5, "yes", [1], {"a": 1}, 10**30])
        key = self.rng.choice(["ttt_learn", "ttt_learn_output", "ttt_interleave", "ttt_lern"])
        body = {"model": self.world.model, "prompt": "x", "session_id": "bad-knobs", "vllm_xargs": {key: value}}
        self.client.ask("hostile: bad value", "POST", "/v1/completions", (400,), json=body)

    @task
    def sends_too_much(self) -> None:
        body = {"model": self.world.model, "prompt": [5] * 50_000, "session_id": "oversized"}
        self.client.ask("hostile: oversized", "POST", "/v1/completions", (400,), json=body)
        self.client.ask("hostile: oversized", "POST", "/v1/ttt/sessions/x/fork", (400, 404), json={"to": "x" * 500_000})

    @task
    def sends_no_json(self) -> None:
        options = {"data": b'{"session_id": "x', "headers": {"Content-Type": "application/json"}}
        self.client.ask("hostile: no JSON", "POST", "/v1/completions", (400, 422), **options)
        self.client.ask("hostile: no JSON", "POST", "/v1/ttt/sessions/x/rollback", (400, 422), **options)

    @task(2)
    def meddles(self) -> None:
        """With a session of another key where there is one, else with one that there is not."""
        others = [name for name in list(self.world.books) if not name.startswith(f"{self.world.name}-hostile")]
        foreign = bool(self.world.hostile_key and others)
        name = self.rng.choice(others) if foreign else "nobodys"
        headers = {"Authorization": f"Bearer {self.world.hostile_key}"} if foreign else {}
        method, rest, body = self.rng.choice(
            [
                *(("GET", "", None), ("DELETE", "", None), ("GET", "/adapter", None)),
                *(("POST", f"/{what}", None) for what in ("reset", "freeze", "unfreeze", "save")),
                *(("POST", "/rollback", {"version": 1}), ("POST", "/fork", {"to": "stolen"})),
            ]
        )
        # Without a state dir, save and rollback are refused before anybody looks for the session.
        refusals = (404, 409) if rest in ("/save", "/rollback") else (404,)
        self.client.ask("hostile: not its own", method, f"/v1/ttt/sessions/{name}{rest}", refusals, json=body, headers=headers)
