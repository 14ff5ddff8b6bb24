"""Regular expressions in linear time: which characters of a text are part of any match.

Python's own backtrack: a pattern and a text that somebody chooses can keep them busy for hours. Here a pattern is an automaton
of so many states, and each character of a text is looked at twice, whatever it is. What no automaton can do (references to
groups, looking ahead or behind, atomic groups) is refused. Any match counts, not only the leftmost or the longest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from re import _constants, _parser  # type: ignore[attr-defined]  # what re.compile itself is made of
from typing import Any

#: States that all patterns together may have, and values that are remembered from text to text.
MOST_STATES, _REMEMBERED = 2000, 50_000

#: What a state takes: a character.
Takes = Callable[[str], bool]
#: What a place in a text may be, as bits: its beginning, its end, the same or before a last line feed, a word's border or none.
_BEGIN, _END, _LAST, _BORDER, _INSIDE = 1, 2, 4, 8, 16
#: Bits of which a place must have one, where a step is made without a character; None: any place will do.
When = int | None
_AT: dict[Any, int] = {
    _constants.AT_BEGINNING: _BEGIN,
    _constants.AT_BEGINNING_STRING: _BEGIN,
    _constants.AT_END: _LAST,
    _constants.AT_END_STRING: _END,
    _constants.AT_BOUNDARY: _BORDER,
    _constants.AT_NON_BOUNDARY: _INSIDE,
}
_CATEGORY: dict[Any, Takes] = {
    _constants.CATEGORY_DIGIT: lambda c: c.isdecimal(),
    _constants.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    _constants.CATEGORY_SPACE: lambda c: c.isspace(),
    _constants.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    _constants.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    _constants.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_WORD = _CATEGORY[_constants.CATEGORY_WORD]


class States:
    """Some states of an automaton, one object for each set; and where they lead, as far as that is known."""

    __slots__ = ("ahead", "behind", "numbers")

    def __init__(self, numbers: frozenset[int]):
        self.numbers = numbers
        self.ahead: dict[tuple[str, int], States] = {}
        self.behind: dict[tuple[str, int], States] = {}


class Automaton:
    """Of several patterns. Raises ValueError, which says how, where one is no pattern, cannot be done, or is too large."""

    def __init__(self, patterns: Iterable[str]):
        #: by state: what it takes and where that leads; and where it leads without a character, and when
        self.takes: list[tuple[Takes, int] | None] = []
        self.free: list[list[tuple[int, When | None]]] = []
        self.start, self.end = self._state(), self._state()
        for pattern in patterns:
            try:
                tree = _parser.parse(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            flags = tree.state.flags
            if flags & (re.MULTILINE | re.LOCALE):
                raise ValueError(f"{pattern!r}: the flags m and L are not supported")
            try:
                self._sequence(tree, self.start, self.end, flags)
            except ValueError as error:
                raise ValueError(f"{pattern!r}: {error}") from None
        #: the same steps backwards, without a character
        self.back: list[list[tuple[int, When | None]]] = [[] for _ in self.free]
        for state, steps in enumerate(self.free):
            for to, when in steps:
                self.back[to].append((state, when))
        self._forget()

    def covered(self, text: str) -> list[tuple[int, int]]:
        """Ranges of characters that are part of a match, in order."""
        if self._known > _REMEMBERED:
            self._forget()
        places = _places(text)
        ahead = [states := self._closed({self.start}, places[0])]
        for step in zip(text, places[1:], strict=True):
            states = states.ahead.get(step) or self._next(states, step)
            ahead.append(states)
        if not any(self.end in states.numbers for states in set(ahead)):
            return []
        ranges: list[tuple[int, int]] = []
        states = self._closed({self.end}, places[-1], back=True)
        for i in range(len(text) - 1, -1, -1):
            if self._meets(ahead[i], text[i], states):
                if ranges and ranges[-1][0] == i + 1:
                    ranges[-1] = i, ranges[-1][1]
                else:
                    ranges.append((i, i + 1))
            step = text[i], places[i]
            states = states.behind.get(step) or self._before(states, step)
        return ranges[::-1]

    # From left to right: the states that a match may be in. From right to left: those from which one may end.

    def _next(self, states: States, step: tuple[str, int]) -> States:
        char, place = step
        moved = {on[1] for s in states.numbers if (on := self.takes[s]) is not None and on[0](char)}
        found = states.ahead[step] = self._closed(moved | {self.start}, place)
        self._known += 1
        return found

    def _before(self, states: States, step: tuple[str, int]) -> States:
        char, place = step
        moved = {s for s, on in enumerate(self.takes) if on is not None and on[1] in states.numbers and on[0](char)}
        found = states.behind[step] = self._closed(moved | {self.end}, place, back=True)
        self._known += 1
        return found

    def _meets(self, ahead: States, char: str, behind: States) -> bool:
        """Whether a match goes over ``char``."""
        key = ahead, char, behind
        if (found := self._over.get(key)) is None:
            steps = (step for s in ahead.numbers if (step := self.takes[s]) is not None)
            found = self._over[key] = any(to in behind.numbers and takes(char) for takes, to in steps)
            self._known += 1
        return found

    def _closed(self, states: set[int], place: int, back: bool = False) -> States:
        """Those states, and all that can be reached from them without a character."""
        edges, todo, found = self.back if back else self.free, list(states), set(states)
        while todo:
            for to, when in edges[todo.pop()]:
                if to not in found and (when is None or when & place):
                    found.add(to)
                    todo.append(to)
        closed = frozenset(found)
        if closed not in self._sets:
            self._sets[closed] = States(closed)
            self._known += len(closed)
        return self._sets[closed]

    def _forget(self) -> None:
        self._known = 0
        self._sets: dict[frozenset[int], States] = {}
        self._over: dict[tuple[States, str, States], bool] = {}

    # The automaton of a pattern.

    def _state(self) -> int:
        if len(self.takes) == MOST_STATES:
            raise ValueError("the patterns together are too large: write them with fewer or smaller repetitions {n,m}")
        self.takes.append(None)
        self.free.append([])
        return len(self.takes) - 1

    def _sequence(self, tree: Any, start: int, end: int, flags: int) -> None:
        for op, argument in tree:
            after = self._state()
            self._part(op, argument, start, after, flags)
            start = after
        self.free[start].append((end, None))

    def _part(self, op: Any, argument: Any, start: int, end: int, flags: int) -> None:
        if op is _constants.BRANCH:
            for branch in argument[1]:
                self._sequence(branch, start, end, flags)
        elif op is _constants.SUBPATTERN:
            _, add, remove, tree = argument
            if add & (re.MULTILINE | re.LOCALE):
                raise ValueError("the flags m and L are not supported")
            self._sequence(tree, start, end, (flags | add) & ~remove)
        elif op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            least, most, tree = argument
            self._repeat(least, most, tree, start, end, flags)
        elif op is _constants.AT:
            self.free[start].append((end, _AT[argument]))
        elif op in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN):
            inner = self._state()
            self.free[start].append((inner, None))
            self.takes[inner] = _character(op, argument, flags), end
        else:
            raise ValueError(f"{str(op).lower()} is not supported: no group that is referred to, nothing ahead or behind")

    def _repeat(self, least: int, most: Any, tree: Any, start: int, end: int, flags: int) -> None:
        for _ in range(least):
            after = self._state()
            self._sequence(tree, start, after, flags)
            start = after
        if most is _constants.MAXREPEAT:
            loop = self._state()
            self.free[start].append((loop, None))
            self._sequence(tree, loop, loop, flags)
            self.free[loop].append((end, None))
            return
        for _ in range(most - least):
            after = self._state()
            self.free[start].append((end, None))
            self._sequence(tree, start, after, flags)
            start = after
        self.free[start].append((end, None))


def _character(op: Any, argument: Any, flags: int) -> Takes:
    """What one character must be."""
    if op is _constants.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if op is _constants.IN:
        negated = argument[0][0] is _constants.NEGATE
        parts = [_item(*item) for item in argument if item[0] is not _constants.NEGATE]
        inside: Takes = lambda c: any(part(c) for part in parts)  # noqa: E731
    else:
        negated, inside = op is _constants.NOT_LITERAL, _item(_constants.LITERAL, argument)
    if flags & re.IGNORECASE:
        exact = inside
        inside = lambda c: any(exact(x) for x in {c, *_other_cases(c)})  # noqa: E731
    return (lambda c: not inside(c)) if negated else inside


def _item(op: Any, argument: Any) -> Takes:
    if op is _constants.LITERAL:
        wanted = chr(argument)
        return lambda c: c == wanted
    if op is _constants.RANGE:
        low, high = argument
        return lambda c: low <= ord(c) <= high
    if op is _constants.CATEGORY:
        return _CATEGORY[argument]
    raise ValueError(f"{str(op).lower()} is not supported")


def _other_cases(char: str) -> tuple[str, ...]:
    return tuple(x for x in (char.lower(), char.upper()) if len(x) == 1)


def _places(text: str) -> list[int]:
    """One for each place between two characters, and for both ends."""
    words = [False, *map(_WORD, text), False]
    places = [_INSIDE if before == after else _BORDER for before, after in itertools.pairwise(words)]
    places[0] |= _BEGIN
    places[-1] |= _END | _LAST
    if text.endswith("\n"):
        places[-2] |= _LAST
    return places
