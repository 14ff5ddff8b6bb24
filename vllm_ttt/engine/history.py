"""Which part of a prompt a session has learned before: its earlier requests, as hashes of what they sent.

A chat client sends the whole conversation again with every turn. Where a prompt goes on from an earlier request of the session,
what the two share is history, and is not learned again. The same prompt sent again does not go on from itself: it is learned.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

#: An answer that was learned is known in steps of so many tokens, and whole: a client may send it back cut short.
BLOCK = 64
#: Prefixes kept of a session; the least recently met goes first. A prefix takes some 150 bytes.
LIMIT = 128


@dataclass(slots=True)
class Prefix:
    """The first ``length`` tokens of a request; pairs 0 to ``learned`` of them have been learned.

    Pair i is the state at position i and the token at i + 1.
    """

    length: int
    learned: int
    #: the session's version when that was done; None: it is not yet
    version: int | None = None


class History:
    def __init__(self) -> None:
        self.prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        #: grows whenever `known` could say something else than before
        self.changes = 0

    def known(self, tokens: Sequence[int]) -> int:
        """How many of the first pairs of a prompt are history. Hashes the prompt once: some 40 ns a token."""
        lengths = {p.length for p in self.prefixes.values() if p.length < len(tokens)}
        learned = 0
        for digest in _digests(tokens, lengths):
            if (prefix := self.prefixes.get(digest)) is not None:
                learned = max(learned, prefix.learned)
                self.prefixes.move_to_end(digest)
        return learned

    def add(self, tokens: Sequence[int], lengths: Iterable[int], learned: int) -> list[bytes]:
        """Remember the prefixes of a request with those lengths, of which all but the last pairs will have been learned.

        Args:
            learned: pairs that are going to be learned, from the first on; a prefix of n tokens has n - 1.
        Returns:
            what `settle` takes.
        """
        self.changes += 1
        lengths = sorted(lengths)
        digests = list(_digests(tokens, lengths))
        for digest, length in zip(digests, lengths, strict=True):
            self.prefixes[digest] = Prefix(length, min(learned, length - 1))
            self.prefixes.move_to_end(digest)
        while len(self.prefixes) > LIMIT:
            self.prefixes.popitem(last=False)
        return digests

    def settle(self, digests: Iterable[bytes], learned: int, version: int) -> None:
        """So many pairs have in fact been learned: a request may be cut off, and a short rest is left to the next turn."""
        self.changes += 1
        for digest in digests:
            if (prefix := self.prefixes.get(digest)) is not None:
                prefix.learned, prefix.version = min(learned, prefix.length - 1), version

    def back_to(self, version: int) -> None:
        """Forget what was learned after ``version``."""
        self.changes += 1
        later = [d for d, p in self.prefixes.items() if p.version is None or p.version > version]
        for digest in later:
            del self.prefixes[digest]

    def to_state(self, open_: dict[bytes, int] | None = None) -> list[tuple[str, int, int, int | None]]:
        """(hash, length, learned, version), least recently met first: plain data, to be kept with the session.

        Args:
            open_: pairs learned so far of prefixes whose request is not settled.
        """
        learned = open_ or {}
        return [(d.hex(), p.length, min(p.learned, learned.get(d, p.learned)), p.version) for d, p in self.prefixes.items()]

    @classmethod
    def from_state(cls, state: Iterable[tuple[str, int, int, int | None]], version: int = 0) -> History:
        """``version``: of the session that it is; what was being learned then has been, as far as that version has it."""
        history = cls()
        for digest, length, learned, since in state:
            history.prefixes[bytes.fromhex(digest)] = Prefix(length, learned, version if since is None else since)
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
