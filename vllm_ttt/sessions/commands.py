"""The commands of `vllm-ttt sessions`. TARGET is a state dir, or the URL of a server that runs."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ttt.errors import TTTError

app = typer.Typer(help="Look at sessions, take them out, bring them in, check them.", no_args_is_help=True)

#: Names the key file where no option does.
KEY_FILE = "TTT_KEY_FILE"

Target = Annotated[str, typer.Argument(help="A state dir, or the URL of a server.")]
Folder = Annotated[str, typer.Argument(help="A state dir.")]
Name = Annotated[str, typer.Argument(help="The session id.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="VLLM_API_KEY", help="Whose sessions.")]
Tenant = Annotated[str | None, typer.Option(help="State dir: whose session, as `list` shows it.")]
KeyFile = Annotated[Path | None, typer.Option(envvar=KEY_FILE, help="State dir: what it is encrypted with.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(
    target: Target,
    api_key: Key = None,
    all_keys: Annotated[bool, typer.Option("--all", help="Of every key; a server asks for its admin key.")] = False,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """The sessions, most recently used first. A state dir shows those of every API key, unless one is given."""
    with _sessions(target, api_key, None, key_file) as sessions:
        found = sessions.list(all_keys)
    _print(found, as_json, lambda: _table(found))


@app.command()
def show(
    target: Target, name: Name, api_key: Key = None, tenant: Tenant = None, key_file: KeyFile = None, as_json: Json = False
) -> None:
    """One session: how far it has come, and what is kept of it."""
    with _sessions(target, api_key, tenant, key_file) as sessions:
        found = sessions.show(name)
    _print(found, as_json, lambda: _pairs(found))


@app.command()
def export(
    target: Target,
    name: Name,
    out: Annotated[Path, typer.Argument(help="Folder for adapter_config.json and adapter_model.safetensors.")],
    api_key: Key = None,
    tenant: Tenant = None,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Write a session as a PEFT adapter, which peft and stock vLLM load."""
    with _sessions(target, api_key, tenant, key_file) as sessions:
        done = sessions.export(name, out)
    _print(done, as_json, lambda: _pairs(done))


@app.command("import")
def import_(
    target: Folder,
    name: Name,
    source: Annotated[Path, typer.Argument(help="An adapter's folder, or a .safetensors of GET .../adapter.")],
    api_key: Key = None,
    tenant: Tenant = None,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Make a session of an exported adapter, in a state dir that no server uses. (No server takes tensors.)"""
    if _is_url(target):
        raise TTTError("no server takes tensors: stop it, import into its state dir, and start it again")
    with _sessions(target, api_key, tenant, key_file) as sessions:
        done = sessions.bring_in(name, source)
    _print(done, as_json, lambda: _pairs(done))


@app.command()
def rm(
    target: Target, name: Name, api_key: Key = None, tenant: Tenant = None, key_file: KeyFile = None, as_json: Json = False
) -> None:
    """Remove a session, with its files."""
    with _sessions(target, api_key, tenant, key_file) as sessions:
        done = sessions.remove(name)
    _print(done, as_json, lambda: _pairs(done))


@app.command()
def move(
    target: Folder,
    to: Annotated[str, typer.Option(envvar="TTT_TO_KEY", help="The API key whose they are from now on.")],
    from_: Annotated[str, typer.Option("--from", envvar="TTT_FROM_KEY", help="The one whose they were; none: nobody's.")] = "",
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Make all sessions of an API key another key's, in a state dir that no server uses: a key that is replaced loses none."""
    if _is_url(target):
        raise TTTError("no server does that: stop it, move them in its state dir, and start it again")
    from vllm_ttt.sessions.offline import tenant_of

    with _sessions(target, key_file=key_file) as sessions:
        done = sessions.move(tenant_of(sessions.folder, from_), tenant_of(sessions.folder, to))
    _print(done, as_json, lambda: _pairs(done))


@app.command()
def fsck(
    target: Folder,
    repair: Annotated[bool, typer.Option("--repair", help="Set damaged files aside, remove leftovers.")] = False,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Check every file of a state dir. Exit code 1: something is damaged."""
    if _is_url(target):
        raise TTTError("fsck reads a state dir, not a server")
    with _sessions(target, key_file=key_file) as sessions:
        found = sessions.fsck(repair)
    _print(found, as_json, lambda: _pairs({k: v for k, v in found.items() if k != "problems"}, found["problems"]))
    if found["problems"] and not found["repaired"]:
        raise typer.Exit(1)


def _is_url(target: str) -> bool:
    return bool(re.match(r"https?://", target))


@contextmanager
def _sessions(
    target: str, api_key: str | None = None, tenant: str | None = None, key_file: Path | None = None
) -> Iterator[Any]:
    """The sessions of a server or of a state dir: Online and Offline have the same methods, as far as a server may do it."""
    if _is_url(target):
        from vllm_ttt.sessions.online import Online

        if tenant is not None:
            raise TTTError("--tenant is for a state dir: of a server's sessions those of --api-key can be named, and no others")
        if key_file not in (None, Path(os.environ.get(KEY_FILE, ""))):  # which is for all state dirs of a machine
            raise TTTError("--key-file is for a state dir: a server has its own (sessions.key_file); leave it out")
        yield Online(target, api_key)
        return
    from vllm_ttt.sessions.offline import tenant_of
    from vllm_ttt.sessions.shelves import opened

    offline = opened(target, key_file)
    try:
        offline.tenant = tenant or (tenant_of(offline.folder, api_key) if api_key else None)
        yield offline
    finally:
        offline.close()


def _print(value: Any, as_json: bool, draw: Any) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(json.dumps(value, indent=1))
    else:
        Console().print(draw())


def _table(sessions: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("session", "tenant", "version", "tokens learned", "tier", "MB", "last used", "")
    for s in sessions:
        notes = ", ".join(filter(None, ["frozen" if s.get("frozen") else "", s.get("error") or ""]))
        size, used = f"{s['bytes'] / 1e6:.1f}", _time(s["last_used"])
        values = (s["session_id"], s.get("tenant") or "", s["version"], s["tokens_learned"], s.get("tier", "disk"), size, used)
        table.add_row(*map(str, values), notes)
    return table


def _pairs(values: dict[str, Any], problems: list[dict[str, str]] | None = None) -> Any:
    from rich.console import Group
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in values.items():
        shown = _time(value) if key in ("created", "last_used", "saved") and value else value
        if isinstance(shown, list):
            shown = f"{len(shown)}" + "".join(f"\n{json.dumps(x)}" for x in shown[-8:])
        table.add_row(key, str(shown))
    if not problems:
        return table
    wrong = Table("file", "session", "what is wrong")
    for p in problems:
        wrong.add_row(p["file"], p["session_id"], p["problem"])
    return Group(table, wrong)


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
