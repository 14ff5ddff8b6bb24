"""Which part of a prompt a session has learned before: its earlier requests, as hashes of what they sent.

A chat client sends the whole conversation again with every turn. Where a prompt goes on from an earlier request of the session,
what the two share is history, and is not learned again. Templates may change the end of a prompt when the conversation goes on
(an empty thinking block goes, tools move to the last message): so a prompt is known at a few places before its end, too. The
same prompt sent again does not go on from itself: it is learned. But where its client had given it up, it is the same request.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: An answer that was learned is known in steps of so many tokens, and whole: a client may send it back cut short.
BLOCK = 64
#: Prefixes kept of a session, and places before the ends of prompts; the least recently met goes first. Each takes some 150
#: bytes, and 50 in a file.
LIMIT, PLACES = 128, 96
#: How far before its end a prompt is known, in tokens; and an answer, of which a client may send back all but a stop string.
BEFORE = tuple(2**i for i in range(2, 14))
BEFORE_ANSWER = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(slots=True)
class Prefix:
    """The first ``length`` tokens of a request; pairs 0 to ``learned`` of them have been learned.

    Pair i is the state at position i and the token at i + 1.
    """

    length: int
    learned: int
    #: the session's version when that was done; None: it is not yet
    version: int | None = None
    #: the request's length, where a longer prompt alone goes on from it; 0: any that is longer than this prefix does
    whole: int = 0
    #: its client did not wait for the answer: the same prompt is the same request
    given_up: bool = False

    def holds(self, length: int) -> bool:
        """Whether a prompt of that length, which begins with it, goes on from it."""
        return max(self.length, self.whole) < length or (self.given_up and self.length == length)


class History:
    def __init__(self) -> None:
        self.prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        #: those that end before the end of their prompt
        self.places: OrderedDict[bytes, Prefix] = OrderedDict()
        #: grows whenever `known` could say something else than before
        self.changes = 0

    def known(self, tokens: Sequence[int]) -> int:
        """How many of the first pairs of a prompt are history. Hashes the prompt once: some 40 ns a token."""
        held = {id(p): p for kept in (self.prefixes, self.places) for p in kept.values() if p.holds(len(tokens))}
        learned = 0
        for digest in _digests(tokens, {p.length for p in held.values()}):
            for kept in (self.prefixes, self.places):
                if (prefix := kept.get(digest)) is not None and id(prefix) in held:
                    learned = max(learned, prefix.learned)
                    kept.move_to_end(digest)
        return learned

    def add(self, tokens: Sequence[int], lengths: Iterable[int], learned: int) -> list[bytes]:
        """Remember the prefixes of a request with those lengths, of which all but the last pairs will have been learned.

        Args:
            learned: pairs that are going to be learned, from the first on; a prefix of n tokens has n - 1.
        Returns:
            what `settle` takes.
        """
        return self._add(self.prefixes, LIMIT, tokens, lengths, learned, 0)

    def add_prompt(self, tokens: Sequence[int], start: int, learned: int) -> list[bytes]:
        """The same for a whole prompt, and for places before its end, of what is new in it: pairs from ``start`` on."""
        places = [len(tokens) - before for before in BEFORE if len(tokens) - before > start + 1]
        digests = self._add(self.places, PLACES, tokens, places, learned, len(tokens))
        return digests + self.add(tokens, [len(tokens)], learned)

    def add_answer(self, tokens: Sequence[int], prompt: int) -> list[bytes]:
        """The same for an answer that is learned: ``tokens`` are the prompt's, so many, and the answer's."""
        end = len(tokens)
        lengths = {*range(prompt + BLOCK, end, BLOCK), *(end - before for before in BEFORE_ANSWER)}
        return self.add(tokens, [n for n in lengths if n > prompt], end - 1)

    def give_up(self, digests: Iterable[bytes]) -> None:
        """The client of the request with those prefixes has left before its answer was complete."""
        self.changes += 1
        for digest in digests:
            if (prefix := self.prefixes.get(digest)) is not None:
                prefix.given_up = True

    def _add(
        self,
        kept: OrderedDict[bytes, Prefix],
        limit: int,
        tokens: Sequence[int],
        lengths: Iterable[int],
        learned: int,
        whole: int,
    ) -> list[bytes]:
        self.changes += 1
        lengths = sorted(lengths)
        digests = list(_digests(tokens, lengths))
        for digest, length in zip(digests, lengths, strict=True):
            kept[digest] = Prefix(length, min(learned, length - 1), whole=whole)
            kept.move_to_end(digest)
        while len(kept) > limit:
            kept.popitem(last=False)
        return digests

    def settle(self, digests: Iterable[bytes], learned: int, version: int) -> None:
        """So many pairs have in fact been learned: a request may be cut off, and a short rest is left to the next turn."""
        self.changes += 1
        for digest in digests:
            for kept in (self.prefixes, self.places):
                if (prefix := kept.get(digest)) is not None:
                    prefix.learned, prefix.version = min(learned, prefix.length - 1), version

    def back_to(self, version: int) -> None:
        """Forget what was learned after ``version``."""
        self.changes += 1
        for kept in (self.prefixes, self.places):
            for digest in [d for d, p in kept.items() if p.version is None or p.version > version]:
                del kept[digest]

    def to_state(self, open_: dict[bytes, int] | None = None) -> list[tuple[str, int, int, int | None, int, bool]]:
        """(hash, length, learned, version, whole, given up), least recently met first: plain data, to be kept with the session.

        Args:
            open_: pairs learned so far of prefixes whose request is not settled.
        """
        learned = open_ or {}
        return [
            (d.hex(), p.length, min(p.learned, learned.get(d, p.learned)), p.version, p.whole, p.given_up)
            for kept in (self.places, self.prefixes)
            for d, p in kept.items()
        ]

    @classmethod
    def from_state(cls, state: Iterable[Sequence[Any]], version: int = 0) -> History:
        """``version``: of the session that it is; what was being learned then has been, as far as that version has it."""
        history = cls()
        for digest, length, learned, since, *rest in state:
            prefix = Prefix(length, learned, version if since is None else since, *rest)
            (history.places if prefix.whole else history.prefixes)[bytes.fromhex(digest)] = prefix
        return history


def _digests(tokens: Sequence[int], lengths: Iterable[int]) -> Iterator[bytes]:
    """The hash of the first n tokens, for each n in ascending order."""
    lengths = sorted(lengths)
    if not lengths:
        return
    data = memoryview(array("q", tokens[: lengths[-1]]).tobytes())
    running, done = hashlib.blake2b(digest_size=16), 0
    for length in lengths:
        running.update(data[8 * done : 8 * length])
        done = length
        yield running.copy().digest()
