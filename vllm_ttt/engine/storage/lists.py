"""Lists of sessions, in pages, most recently used first: from memory and from the state dir, as one.

The rows are read on a thread and a connection of their own: who saves does not wait for who lists. One list is made at a time,
and not more than one in a step: however many are asked for, a step costs a page at most.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import sqlite3
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.storage import database, records
from vllm_ttt.engine.storage.failures import StoreError, unreadable
from vllm_ttt.engine.storage.records import Row
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import ConfigError, RequestError
from vllm_ttt.log import logger_of
from vllm_ttt.types import SessionKey, shown
from vllm_ttt.vault import PLAIN

logger = logger_of(__name__)

#: Sessions of one page.
DEFAULT, MOST = 1000, 10_000
#: Lists that one tenant may wait for.
PER_TENANT = 16
#: Where a session is in a list: last_used, tenant, name as the state dir has it.
Place = tuple[float, str, str]
#: What is said of sessions in memory, and of one that is not.
Here = Callable[[list[Session]], list[dict[str, Any]]]
Away = Callable[[Session], dict[str, Any]]


@dataclass(slots=True)
class _Asked:
    #: None: of all
    tenant: str | None
    limit: int
    after: Place | None
    here: Here
    away: Away
    #: whether the answer says where each session is in the list
    places: bool
    answer: Future = field(default_factory=Future)
    #: what was in memory, or about to be recorded, when the rows began to be read
    before: list[SessionKey] = field(default_factory=list)
    noted: list[Row] = field(default_factory=list)
    rows: Future = field(default_factory=Future)


class Lists:
    def __init__(self, ledger: Ledger, store: Store | None):
        self.ledger, self.store = ledger, store
        self.waiting: deque[_Asked] = deque()
        #: whose rows are being read
        self.current: _Asked | None = None
        self.counts: Counter[str | None] = Counter()
        self.thread = ThreadPoolExecutor(1, "ttt-list")

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or self.current is not None

    def ask(self, tenant: str | None, limit: int, after: str | None, here: Here, away: Away, places: bool = False) -> Future:
        """Resolves to ``{"sessions": [...], "next": what to ask for the next page with, or None}``; with ``places``, also to
        what `next` would be after each of the sessions.

        Args:
            tenant: whose sessions; None: everybody's.
            after: the ``next`` of the page before.
        Raises:
            RequestError: 400, ``after`` is none; 429, the tenant waits for as many lists as it may.
        """
        asked = _Asked(tenant, min(limit, MOST), None if after is None else _place(after, tenant), here, away, places)
        if self.counts[tenant] >= PER_TENANT:
            raise RequestError(f"a key may wait for {PER_TENANT} lists at once; ask again when one of them has come", 429)
        self.counts[tenant] += 1
        self.waiting.append(asked)
        return asked.answer

    def step(self) -> None:
        """Begin to read for the one whose turn it is, or answer it."""
        if self.current is None and self.waiting:
            self.current = self.waiting.popleft()
            self._read(self.current)
        if self.current is None or not self.current.rows.done():
            return
        asked, self.current = self.current, None
        self.counts[asked.tenant] -= 1
        try:
            answer = self._page(asked)
        except Exception as error:
            asked.answer.set_exception(error)
            if not isinstance(error, RequestError):
                raise
        else:
            asked.answer.set_result(answer)

    def _read(self, asked: _Asked) -> None:
        if self.store is None:
            asked.rows.set_result([])
            return
        asked.before = [session.key for session in self.ledger.of_tenant(asked.tenant)]
        asked.noted = self.store.noted(asked.tenant)
        # So many rows may be of sessions that are in memory, where they are used more recently.
        limit = asked.limit + 1 + len(asked.before) + len(asked.noted)
        asked.rows = self.thread.submit(self._rows, self.store.folder.database, asked, limit)

    def _rows(self, path: Any, asked: _Asked, limit: int) -> list[dict[str, Any]]:
        """In the thread."""
        try:
            vault = self.store.vault if self.store is not None else PLAIN
            with contextlib.closing(database.connect(path, readonly=True, vault=vault)) as db:
                rows = records.listing(db, asked.tenant, limit, asked.after)
        except ConfigError as error:  # it says where the state dir is, and is the operator's
            logger.error("vllm-ttt: a list of sessions could not be read: %s", error)
            raise StoreError("the state dir cannot be read; try again, or look at its disk", 503) from None
        except sqlite3.Error as error:
            raise unreadable(error) from None
        return [asked.away(self.ledger.from_row(row)) for row in rows]

    def _page(self, asked: _Asked) -> dict[str, Any]:
        found: dict[SessionKey, dict[str, Any] | Session] = {
            SessionKey(d["tenant"], d["session_id"]): d for d in asked.rows.result()
        }
        if self.store is not None:
            for row in (*asked.noted, *self.store.noted(asked.tenant)):
                found[row.key] = self.ledger.from_row(row)
            for key in asked.before:  # recorded and put away while the rows were read
                if key not in found and key not in self.ledger.sessions and (session := self.ledger.peek(key)) is not None:
                    found[key] = session
        found |= {session.key: session for session in self.ledger.of_tenant(asked.tenant)}
        stored = self.store.vault.name if self.store is not None else PLAIN.name
        places: dict[SessionKey, Place] = {
            key: (x.last_used if isinstance(x, Session) else x["last_used"], key.tenant, stored(key.name))
            for key, x in found.items()
        }
        keys = sorted((k for k, p in places.items() if asked.after is None or p < asked.after), key=places.get, reverse=True)  # type: ignore[arg-type]
        page = keys[: asked.limit]
        sessions = [x for key in page if isinstance(x := found[key], Session) and self.ledger.sessions.get(key) is x]
        described = dict(zip((s.key for s in sessions), asked.here(sessions), strict=True))
        details = [described.get(key) or (asked.away(x) if isinstance(x := found[key], Session) else x) for key in page]
        if asked.tenant is not None:
            details = [{**d, "tenant": None} for d in details]
        answer: dict[str, Any] = {"sessions": details, "next": None}
        if len(keys) > len(page):
            answer["next"] = _text(places[page[-1]], asked.tenant)
        if asked.places:
            answer["places"] = [_text(places[key], asked.tenant) for key in page]
        return answer


def _text(place: Place, tenant: str | None) -> str:
    """A place as the client gets it. Of its own list it learns no tenant."""
    at = place if tenant is None else (place[0], place[2])
    return base64.urlsafe_b64encode(json.dumps(at).encode()).decode().rstrip("=")


def _place(text: str, tenant: str | None) -> Place:
    try:
        last_used, *rest = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        found = [last_used, *rest] if tenant is None else [last_used, tenant, *rest]
        if [type(x) for x in found] == [float, str, str]:
            "".join(found[1:]).encode()  # raises ValueError where it is no text
            return found[0], found[1], found[2]
    except (binascii.Error, ValueError, TypeError, RecursionError):
        pass
    raise RequestError(f"after must be the `next` of the page before; got {shown(text)}", param="after")
