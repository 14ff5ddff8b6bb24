"""Sessions in the state dir of a server with several engines, each of which has a shelf there: `Offline` on all of them.

What a command changes need not be on the right shelf afterwards: the server's next start brings each session to its engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_ttt.engine.storage import records
from vllm_ttt.frontend import tenants
from vllm_ttt.sessions.offline import Offline, SessionsError, the_one
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import SessionKey, check_session_id


def opened(folder: str | Path, key_file: str | Path | None = None) -> Offline | Shelves:
    """The sessions of a state dir, whether it has shelves or is one. Raises SessionsError or ConfigError where it is none."""
    engines = StateDir(folder).shelves()
    return Offline(folder, key_file=key_file) if len(engines) == 1 else Shelves(folder, engines, key_file)


class Shelves:
    """The methods of `Offline`, on a whole state dir."""

    def __init__(self, folder: str | Path, engines: list[int], key_file: str | Path | None = None):
        self.folder = StateDir(folder)
        self.shelves = [Offline(self.folder.shelf(engine).root, key_file=key_file) for engine in engines]

    @property
    def tenant(self) -> str | None:
        return self.shelves[0].tenant

    @tenant.setter
    def tenant(self, tenant: str | None) -> None:
        for shelf in self.shelves:
            shelf.tenant = tenant

    def close(self) -> None:
        for shelf in self.shelves:
            shelf.close()

    def list(self, all_keys: bool = False) -> list[dict[str, Any]]:
        found = [session for shelf in self.shelves for session in shelf.list(all_keys)]
        return sorted(found, key=lambda session: session["last_used"], reverse=True)

    def show(self, name: str) -> dict[str, Any]:
        return self._of(name).show(name)

    def export(self, name: str, out: Path) -> dict[str, Any]:
        return self._of(name).export(name, out)

    def remove(self, name: str) -> dict[str, Any]:
        return self._of(name).remove(name)

    def bring_in(self, name: str, source: Path) -> dict[str, Any]:
        key = SessionKey(self.tenant or tenants.OPEN, check_session_id(name))
        if any(records.find(shelf.db, key) is not None for shelf in self.shelves):
            raise SessionsError(f"there is a session {name!r} already; vllm-ttt sessions rm removes it")
        return self.shelves[0].bring_in(name, source)

    def move(self, tenant: str, to: str) -> dict[str, Any]:
        names = [{row.key.name for shelf in self.shelves for row in records.listing(shelf.db, t)} for t in (tenant, to)]
        if tenant != to and (taken := sorted(names[0] & names[1])):
            raise SessionsError(f"both keys have sessions of the same name, nothing was moved: {', '.join(taken)}")
        done = [shelf.move(tenant, to) for shelf in self.shelves]
        return {**done[0], "moved": sum(found["moved"] for found in done)}

    def fsck(self, repair: bool = False) -> dict[str, Any]:
        """Files are named from the whole dir."""
        found = [(self._inside(shelf), shelf.fsck(repair)) for shelf in self.shelves]
        return {
            **{count: sum(one[count] for _, one in found) for count in ("sessions", "versions", "bytes")},
            "problems": [{**p, "file": inside + p["file"]} for inside, one in found for p in one["problems"]],
            "leftovers": [inside + file for inside, one in found for file in one["leftovers"]],
            "aside": [inside + "damaged/" + file if inside else file for inside, one in found for file in one["aside"]],
            "repaired": all(one["repaired"] for _, one in found),
        }

    def _of(self, name: str) -> Offline:
        """The shelf that has the session of that name. Raises SessionsError as `Offline.find`."""
        found = [(shelf, row) for shelf in self.shelves for row in shelf.named(name)]
        row = the_one([row for _, row in found], name, self.folder)
        return next(shelf for shelf, other in found if other is row)

    def _inside(self, shelf: Offline) -> str:
        inside = shelf.folder.root.relative_to(self.folder.root)
        return "" if inside == Path() else f"{inside}/"
