"""Sessions in a state dir, without a server: to look at, to take out, to bring in, and to check.

Reading works beside a server that runs; what changes something takes the lock, and says who has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from vllm_ttt.config import LETTERS
from vllm_ttt.engine.ledger import cache_summary
from vllm_ttt.engine.storage import database, erase, records, reserve
from vllm_ttt.engine.storage.provenance import provenance
from vllm_ttt.engine.storage.records import Row, Version
from vllm_ttt.errors import TTTError
from vllm_ttt.frontend import tenants
from vllm_ttt.geometry import Geometry
from vllm_ttt.sessions.audit import noting
from vllm_ttt.state_dir import MARKER, StateDir
from vllm_ttt.types import SessionKey, check_session_id
from vllm_ttt.vault import Vault
from vllm_ttt.worker.deltas import delta_file, peft
from vllm_ttt.worker.deltas.delta_file import MAX_HEADER, UPDATE, FileError
from vllm_ttt.worker.deltas.masters import WorkerSession

T = TypeVar("T")


class SessionsError(TTTError):
    """What was asked for cannot be done; the message says why."""


class Offline:
    """Raises SessionsError or ConfigError where ``folder`` is not a state dir."""

    def __init__(self, folder: str | Path, tenant: str | None = None, key_file: str | Path | None = None):
        """``tenant``: whose sessions are meant; None: everybody's. ``key_file``: of what it is sealed with."""
        self.folder, self.tenant, self.vault = StateDir(folder), tenant, Vault.of(key_file)
        if not self.folder.exists():
            raise SessionsError(f"{folder} is not a state dir: it has no sessions.db")
        self.folder.check_format()
        if not self.folder.owned():
            raise SessionsError(f"{folder} is not a state dir: it has a sessions.db, and not the marker {MARKER}")
        self.db = database.connect(self.folder.database, vault=self.vault)
        self.identity = database.read_identity(self.db)
        database.check_vault(self.db, self.folder.root, record=False)
        if self.vault.on and not database.sealed(self.db):
            raise SessionsError(f"{folder} is not encrypted; leave the key out")
        self.geometry = Geometry.from_json(self.identity["geometry"])

    def close(self) -> None:
        """Nothing will be asked any more."""
        self.db.close()
        reserve.keep(self.folder.root)

    def list(self, all_keys: bool = False) -> list[dict[str, Any]]:
        return [self._describe(row) for row in records.listing(self.db, None if all_keys else self.tenant)]

    def show(self, name: str) -> dict[str, Any]:
        """As `GET /v1/ttt/sessions/{id}` has it of a session that is on disk; and ``files``, which no route shows."""
        row = self.find(name)
        versions = [v for v in records.versions(self.db, row.uid) if not v.problem]
        files = [
            {"version": v.version, "saved": v.saved, "bytes": v.bytes, "file": v.file, "checksum": v.checksum} for v in versions
        ]
        shown = {"losses": _state(row).get("losses", []), "versions": [v.version for v in versions], "files": files}
        return {**self._describe(row), **shown}

    def find(self, name: str) -> Row:
        """The session of that name. Raises SessionsError where there is none, or where several tenants have one."""
        return the_one(self.named(name), name, self.folder)

    def named(self, name: str) -> list[Row]:
        """The sessions of that name; several, where several tenants have one."""
        check_session_id(name)
        return [row for row in records.named(self.db, name) if self.tenant in (None, row.key.tenant)]

    def export(self, name: str, out: Path) -> dict[str, Any]:
        """Write the newest version that is whole as a PEFT adapter: the folder ``out``, as peft and vLLM load it."""
        if self.geometry.head:
            raise SessionsError(
                "an adapter of the preset head holds lm_head times the delta, and a state dir has no weights of the model: "
                "serve it, and ask GET /v1/ttt/sessions/{id}/adapter"
            )
        saved, tensors = self._newest(name)
        version = saved.version
        dtype = getattr(torch, self.identity["dtype"])
        tensors = {module: tensors[module] for module in self.geometry.shapes}
        told = provenance(self.identity, name, saved.state, None, delta_file.digest(tensors))
        metadata = {"session_id": name, "version": str(version), "provenance": json.dumps(told)}
        base = self.identity["model"].get("served") or self.identity["model"]["name"]
        data = peft.adapter(tensors, peft.projections(self.geometry, dtype), self.geometry, base, metadata)
        with noting(self.db, self.folder.root) as note:
            row = self.find(name)
            note("export", row.key, row.uid, version=version, bytes=len(data), digest=told["digest_sha256"])
        out.mkdir(parents=True, exist_ok=True)
        delta_file.write(out / "adapter_model.safetensors", data)
        (out / "adapter_config.json").write_text(json.dumps(peft.config(self.geometry, base), indent=2) + "\n")
        (out / "provenance.json").write_text(json.dumps(told, indent=2) + "\n")
        return {"session_id": name, "version": version, "bytes": len(data), "folder": str(out)}

    def bring_in(self, name: str, source: Path) -> dict[str, Any]:
        """Make a session from a PEFT adapter: a folder, or one .safetensors whose metadata has the configuration. Without a
        tenant it is one that no key owns, as on a server without keys.

        Raises SessionsError where the adapter is not one of this model's and these settings', or the name is taken.
        """
        check_session_id(name)
        tenant = self.tenant or tenants.OPEN
        with self._locked(), noting(self.db, self.folder.root) as note:
            if records.find(self.db, SessionKey(tenant, name)) is not None:
                raise SessionsError(f"there is a session {name!r} already; vllm-ttt sessions rm removes it")
            tensors, version = self._read_adapter(source)
            # Its rate begins anew, as the server that opens it has it. Relative norms are known after the next step.
            letters = "".join(LETTERS[module] for module in self.geometry.modules)
            state = {**WorkerSession(version=version, norms=[0.0] * len(letters)).to_state(), "rate": None}
            tensors |= {name + UPDATE: torch.zeros_like(b, dtype=torch.bfloat16) for name, b in tensors.items()}
            uid, now = secrets.token_hex(16), time.time()
            file = self.folder.new_file(uid)
            metadata = {"uid": uid, "tenant": tenant, "session_id": name, "state": json.dumps(state)}
            path = self.folder.path(file)
            data = self.vault.seal(delta_file.encode(tensors, metadata), path.name)
            checksum = delta_file.write(path, data)
            digest = delta_file.digest({module: tensors[module] for module in self.geometry.shapes})
            saved = Version(version, file, len(data), checksum, now, {"version": version, "digest": digest})
            with database.transaction(self.db):
                records.put(self.db, Row(uid, SessionKey(tenant, name), now, now, saved.state, saved), keep=1)
            note("import", SessionKey(tenant, name), uid, version=version, bytes=len(data), checksum=checksum)
        return {"session_id": name, "tenant": tenant, "version": version, "bytes": len(data)}

    def remove(self, name: str) -> dict[str, Any]:
        with self._locked(), noting(self.db, self.folder.root) as note:
            row = self.find(name)
            files, stored = erase.listed(self.db, row.uid), records.name_of(self.db, row.uid)
            database.create(self.db, self.identity)  # the tables of this release
            gone = self._written(lambda: (records.remove(self.db, row.uid), erase.owe(self.db, row.uid))[0])
            for file in gone:
                self.folder.path(file).unlink(missing_ok=True)
            state = _state(row)
            receipt = {
                "version": state.get("version", 0), "tokens_learned": state.get("tokens_learned", 0),
                "digest": files[-1]["digest"] if files else None, "bytes": sum(file["bytes"] for file in files),
                "files": files, "files_left": [], "database_wiped": erase.wipe(self.db, self.folder, row.uid, stored),
            }  # fmt: skip
            note("delete", row.key, row.uid, **receipt)
        return {"session_id": name, "tenant": row.key.tenant, "deleted": True, **receipt, "time": time.time()}

    def move(self, tenant: str, to: str) -> dict[str, Any]:
        """Make all sessions of a tenant another's, all or none: whose API key is replaced keeps what it has."""
        if tenant == to:
            raise SessionsError("both keys are the same")
        with self._locked(), noting(self.db, self.folder.root) as note:
            try:
                moved = self._written(lambda: records.move(self.db, tenant, to))
            except ValueError as error:
                raise SessionsError(f"both keys have sessions of the same name, nothing was moved: {error}") from None
            for row in moved:
                note("move", row.key, row.uid, to_tenant=to)
        return {"from": tenant, "to": to, "moved": len(moved)}

    def fsck(self, repair: bool = False) -> dict[str, Any]:
        """Check the database, and every file that it names.

        Returns:
            ``sessions``, ``versions`` and ``bytes``; ``problems``, each with its file and what is wrong; ``leftovers``, files
            of saves that were cut off, which do no harm; ``aside``, damaged files that were set aside earlier.
            With ``repair``, leftovers are removed, and damaged files set aside, so that their sessions fall back. What cannot
            be read now may be whole: it stays.
        """
        if repair:
            with self._locked():
                return self._check(repair=True)
        return self._check(repair=False)

    def _check(self, repair: bool) -> dict[str, Any]:
        try:
            verdict = self.db.execute("PRAGMA integrity_check").fetchone()[0]
        except sqlite3.Error as error:
            verdict = str(error)
        problems = [] if verdict == "ok" else [{"file": "sessions.db", "session_id": "", "problem": verdict}]
        recorded, present, unread = records.files(self.db), self.folder.files(), False
        rows = {row.uid: row for row in records.listing(self.db, None)}
        for uid, row in rows.items():
            if (found := records.find(self.db, row.key)) is not None and found.problem:
                problems.append({"file": "sessions.db", "session_id": row.key.name, "problem": found.problem})
                if repair:
                    self._written(partial(records.mend, self.db, found))
                    for file in found.damaged:
                        self.folder.set_aside(file)
            for version in records.versions(self.db, uid):
                if (problem := self._problem(version)) is None:
                    continue
                if not repair and version.file not in records.files(self.db):
                    continue  # a server that runs has replaced it meanwhile
                damaged = not isinstance(problem, OSError)
                unread |= not damaged
                text = str(problem) if damaged else f"it cannot be read: {problem.strerror or problem}"
                problems.append({"file": version.file, "session_id": row.key.name, "problem": text})
                if repair and damaged:
                    self._written(partial(records.without, self.db, uid, version.file))
                    self.folder.set_aside(version.file)
        leftovers = sorted(file for file in present if file not in recorded)
        if repair:
            for file in leftovers:
                (self.folder.root / file).unlink(missing_ok=True)
        return {
            "sessions": len(rows),
            "versions": len(recorded),
            "bytes": sum(size for _, _, size in recorded.values()),
            "problems": problems,
            "leftovers": leftovers,
            "aside": sorted(path.name for path in self.folder.damaged.glob("*")),
            "repaired": repair and not unread,
        }

    def _written(self, change: Callable[[], T]) -> T:
        """In one transaction, for which a full disk has room. Raises SessionsError."""

        def write() -> T:
            with database.transaction(self.db):
                return change()

        try:
            return reserve.using(self.folder.root, write)
        except sqlite3.Error as error:
            raise SessionsError(f"the state dir {self.folder.root} cannot be written: {error}") from None

    def _problem(self, version: Version) -> str | OSError | None:
        """What is wrong with a version, or None; OSError: nobody knows, since its file cannot be read."""
        if version.problem:
            return version.problem
        try:
            path = self.folder.path(version.file)
            _, metadata = delta_file.load(path, version.checksum, self.geometry, self.vault)
            found = json.loads(metadata["state"])["version"]
        except FileNotFoundError:
            return "it is gone"
        except OSError as error:
            return error
        except (FileError, ValueError, KeyError, TypeError) as error:
            return str(error)
        if not found == version.version == version.state.get("version"):
            ledger = version.state.get("version")
            return f"it holds version {found}; recorded are version {version.version} and the ledger of version {ledger}"
        return None

    def _newest(self, name: str) -> tuple[Version, dict[str, torch.Tensor]]:
        """The newest version that is what was saved, as a server that brings the session back finds it."""
        problems = []
        for version in reversed([v for v in records.versions(self.db, self.find(name).uid) if not v.problem]):
            path = self.folder.path(version.file)
            try:
                return version, delta_file.load(path, version.checksum, self.geometry, self.vault)[0]
            except (FileError, OSError) as error:
                problems.append(f"{path} cannot be used: {error}")
        if not problems:
            raise SessionsError(f"session {name!r} has learned nothing that was saved")
        raise SessionsError(f"{'; '.join(problems)}. vllm-ttt sessions fsck says more")

    def _read_adapter(self, source: Path) -> tuple[dict[str, torch.Tensor], int]:
        inputs = 2 * self.geometry.hidden + self.geometry.feed_forward + self.geometry.attention
        limit = 4 * self.geometry.rank * self.geometry.layers * inputs + self.geometry.bytes + MAX_HEADER
        try:
            file = source / "adapter_model.safetensors" if source.is_dir() else source
            data = delta_file.read(file, limit)
            metadata = delta_file.read_header(data).get("__metadata__", {})
            if source.is_dir():
                settings = json.loads(delta_file.read(source / "adapter_config.json", 2**20))
            else:
                settings = json.loads(metadata.get("adapter_config", "null"))
            if not isinstance(settings, dict):
                raise FileError("it has no adapter_config: name the folder that holds both files")
            tensors = peft.read_adapter(data, settings, self.geometry)
        except (FileError, OSError, ValueError, RecursionError) as error:
            raise SessionsError(f"{source} cannot be imported: {getattr(error, 'strerror', None) or error}") from None
        text = str(metadata.get("version", "1"))
        version = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1
        return tensors, max(1, version)

    @staticmethod
    def _describe(row: Row) -> dict[str, Any]:
        """As the server's lists have a session that is on disk (frontend/models.py, SessionSummary)."""
        newest, state = row.newest, _state(row)
        problem = f"what was recorded of it is damaged ({row.problem}); this is what can be read" if row.problem else None
        return {
            "session_id": row.key.name,
            "version": state.get("version", 0),
            "tokens_seen": state.get("tokens_seen", 0),
            "tokens_learned": state.get("tokens_learned", 0),
            "tokens_skipped": state.get("tokens_skipped", {}),
            **cache_summary(state.get("cache", {})),
            "frozen": state.get("frozen") is not None,
            "frozen_reason": state.get("frozen"),
            "probe_regression": state.get("probe_regression"),
            "requests_open": 0,
            "created": row.created,
            "last_used": row.last_used,
            "saved_version": newest.version if newest else None,
            "saved": newest.saved if newest else None,
            "error": problem,
            "tier": "disk" if newest else "new",
            "bytes": newest.bytes if newest else 0,
            "tokens_pending": 0,
            "norm": {},
            "tenant": row.key.tenant,
        }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.lock()
        try:
            yield
            reserve.keep(self.folder.root)
        finally:
            self.folder.unlock()


def the_one(found: list[Row], name: str, folder: StateDir) -> Row:
    """The only one of them. Raises SessionsError where there is none, or are several."""
    if not found:
        raise SessionsError(f"there is no session {name!r} in {folder.root}")
    if len(found) > 1:
        tenants = ", ".join(row.key.tenant for row in found)
        raise SessionsError(f"{len(found)} tenants have a session {name!r}; say which with --tenant: {tenants}")
    return found[0]


def _state(row: Row) -> dict[str, Any]:
    """The session's state as a server takes it up: what was counted beyond the newest version did not happen."""
    newest = row.newest.state if row.newest else {}
    state = row.state if row.state.get("version", 0) == newest.get("version", 0) else newest
    return state | {key: row.state[key] for key in ("frozen",) if key in row.state}


def tenant_of(folder: StateDir, api_key: str | None) -> str:
    """The tenant of an API key in a state dir; `-` without one. As for the server, TTT_SECRET goes before the dir's secret.

    Raises ConfigError where that is not the secret that the dir's sessions were made under.
    """
    if not api_key:
        return tenants.OPEN
    secret = os.environ.get(tenants.SECRET_VARIABLE)
    if folder.exists():
        with contextlib.closing(database.connect(folder.database)) as db:
            if not secret and (folder.has_secret() or not database.has_secret(db)):
                secret = folder.secret()
            database.check_secret(db, secret or "", folder.root, record=False)
    secret = secret or folder.secret()
    return tenants.derive(secret, api_key.encode())
