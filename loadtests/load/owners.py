"""Users who manage what they made: they save, fork, roll back, reset, freeze and delete, and know each session's version."""

from __future__ import annotations

import time
from typing import Any

from locust import task

from load.person import Person

#: Tokens of a request.
REQUEST = (300, 1200)
#: What a problem says of a session.
_SHOWN = (
    "version", "saved_version", "versions", "tokens_seen", "tokens_learned", "tokens_skipped", "tokens_pending",
    "requests_open", "frozen_reason",
)  # fmt: skip
#: Seconds for which a session may be under way.
LONGEST = 600
#: Requests and operations, in turns, after which a session is deleted.
TURNS = 12


class OwnerUser(Person):
    """A request, then an operation, until the session is deleted. After each, its version is exactly what it must be.

    Unlike a `Book`, which adds up, this user looks at the session whenever nothing of it is under way.
    """

    weight = 1
    kind = "owner"

    def on_start(self) -> None:
        super().on_start()
        self.name: str | None = None
        #: tokens that were under way when the version was saved to which the session has returned
        self.given_up = 0
        self.state: dict[str, Any] = {}

    def on_stop(self) -> None:
        if self.name is not None:
            self.client.ask("owner: delete", "DELETE", f"/v1/ttt/sessions/{self.name}", (200, 404))

    @task
    def act(self) -> None:
        if self.name is None:
            self.name, self.left, self.state = self.fresh(), TURNS, {"version": 0, "losses": []}
            self.given_up = 0
        self.left -= 1
        prompt = self.world.texts.window(self.rng, self.rng.randrange(*REQUEST))
        body = {"session_id": self.name, "prompt": prompt, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        if not self.world.learn:  # there is nothing to manage
            self.client.complete(self.kind, {**body, "vllm_xargs": {"ttt_learn": 0}})
            return
        self.send(body)
        operations = [self.save, self.fork, self.roll_back, self.reset, self.freeze, self.look]
        (self.delete if self.left <= 0 else self.rng.choice(operations))()

    def fresh(self) -> str:
        """A name that no session has."""
        return self.world.own(f"{self.kind}-{self.number}-{self.rng.randrange(10**9)}")

    def send(self, body: dict[str, Any]) -> None:
        """One request; each of its chunks is a version, but for those that the session says were not learned."""
        before = self.state
        answer = self.client.complete(self.kind, body)
        if answer.error is not None:
            return
        after = self.at_rest()
        if after.get("frozen_reason") and "back at version" in after["frozen_reason"]:
            if not before.get("frozen_reason"):
                self.world.guarded += 1
            if after["version"] > before["version"] + self.world.rule.chunks(len(body["prompt"]) - 1):
                self.wrong("a request after which the guard stepped in", f"at most {before['version']} and its chunks", after)
            self.state = after
            return
        given = (answer.ttt or {}).get("tokens_learned", 0)
        chunks = -(-given // self.world.rule.chunk)
        unlearned = sum(1 for chunk in after["losses"][len(before["losses"]) :] if chunk["skipped"] is not None)
        if after["version"] + unlearned != before["version"] + chunks:
            self.wrong(f"{given} tokens in {chunks} chunks, {unlearned} skipped", before["version"] + chunks - unlearned, after)
        self.state = after

    def save(self) -> None:
        self.operate("save", self.state["version"])
        if self.state.get("saved_version") != self.state["version"]:
            self.wrong("save", f"saved_version {self.state['version']}", self.state)

    def fork(self) -> None:
        to = self.fresh()
        made = self.ask("fork", json={"to": to})
        if made is None:
            return
        if made["version"] != self.state["version"] or made["session_id"] != to:
            self.wrong("fork", self.state["version"], made)
        if self.rng.random() < 0.5:  # go on as the copy, and the other one goes
            self.name, other = to, self.name
        else:
            other = to
        self.gone(other)
        self.state = self.at_rest()
        if self.state["version"] != made["version"]:
            self.wrong("fork", made["version"], self.state)

    def roll_back(self) -> None:
        versions = [v for v in self.state.get("versions", ()) if v <= self.state["version"]]
        if not versions:
            return
        version, before = self.rng.choice(versions), self.state
        answer = self.ask("rollback", (200, 409), json={"version": version})
        if answer is None:
            return
        self.state = self.world.get(f"/v1/ttt/sessions/{self.name}")  # nothing can be under way
        self.given_up = self.state["tokens_seen"] - self.state["tokens_learned"] - sum(self.state["tokens_skipped"].values())
        if "error" in answer:
            # A save that has come meanwhile may have taken its place: then it is not there any more, and nothing has changed.
            if version in self.state["versions"] or self.state["version"] != before["version"]:
                self.wrong(f"a rollback to {version}, refused: {answer['error']['message']}", before["version"], self.state)
            return
        self.agree("rollback", version, answer)

    def reset(self) -> None:
        self.given_up = 0
        self.operate("reset", 0)

    def freeze(self) -> None:
        self.operate("freeze", self.state["version"])
        self.operate("unfreeze", self.state["version"])

    def look(self) -> None:
        found = self.at_rest()
        if found["version"] != self.state["version"]:
            self.wrong("nothing", self.state["version"], found)

    def delete(self) -> None:
        self.gone(self.name)
        self.name = None

    def operate(self, what: str, version: int, **options: Any) -> None:
        """Ask for it; both its answer and a look at the session afterwards must have that version."""
        answer = self.ask(what, **options)
        if answer is None:
            return
        self.state = self.at_rest()
        self.agree(what, version, answer)

    def agree(self, what: str, version: int, answer: dict[str, Any]) -> None:
        for found in (answer, self.state):
            if found["version"] != version:
                self.wrong(what, version, found)

    def ask(self, what: str, expected: tuple[int, ...] = (200,), **options: Any) -> Any:
        return self.client.ask(f"owner: {what}", "POST", f"/v1/ttt/sessions/{self.name}/{what}", expected, **options)

    def gone(self, name: str | None) -> None:
        """Delete a session; it is not there any more."""
        self.client.ask("owner: delete", "DELETE", f"/v1/ttt/sessions/{name}", (200,))
        self.client.ask("owner: deleted", "GET", f"/v1/ttt/sessions/{name}", (404,))

    def at_rest(self) -> dict[str, Any]:
        """The session, once nothing of it is under way."""
        deadline = time.monotonic() + LONGEST
        while True:
            found = self.world.get(f"/v1/ttt/sessions/{self.name}")
            settled = found["tokens_learned"] + sum(found["tokens_skipped"].values()) + self.given_up >= found["tokens_seen"]
            if settled and not found["tokens_pending"] and not found["requests_open"]:
                return found
            if time.monotonic() > deadline:
                self.wrong(f"{LONGEST} s of waiting", "nothing under way", found)
                return found
            time.sleep(0.05)

    def wrong(self, after: str, expected: Any, found: dict[str, Any]) -> None:
        shown = {key: found.get(key) for key in _SHOWN}
        self.world.problems.append(f"{self.name}: after {after}: expected {expected}, found {shown}")
