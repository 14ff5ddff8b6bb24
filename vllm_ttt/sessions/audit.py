"""The commands of `vllm-ttt audit`; and the audit log of a state dir, where a command changes or takes out a session."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vllm_ttt import audit_log

app = typer.Typer(help="Check the log of what became of sessions.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Without it `verify`, the only command, would be `vllm-ttt audit` itself."""


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="The file that sessions.audit_log names.")],
    head: Annotated[str | None, typer.Option(help="SEQ:HASH of an earlier check: it must be a line of this log.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every line of an audit log, full files included. Exit code 1: a line was changed, removed, added or swapped."""
    from rich.console import Console
    from rich.markup import escape

    found = audit_log.verify(path, head)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    elif found.problem is None:
        events = ", ".join(f"{count} {event}" for event, count in sorted(found.events.items()))
        lines = f"ok: lines {found.first} to {found.last} in {found.files} files: {events}" if found.lines else "ok: no line"
        torn = f"\n{found.torn} bytes behind the last line are of a write that was cut off; the next start removes them"
        Console(soft_wrap=True).print(f"[green]{escape(lines)}[/]\nhead {found.last}:{found.head}{torn if found.torn else ''}")
    else:
        wrong = found.problem
        where = f"{wrong['file']}, line {wrong['line']}" if wrong["line"] else wrong["file"]
        Console(soft_wrap=True).print(f"[red]wrong:[/] {escape(where)}: {escape(wrong['problem'])}")
    if found.problem is not None:
        raise typer.Exit(1)


Note = Callable[..., None]


@contextmanager
def noting(db: sqlite3.Connection, root: Path) -> Iterator[Note]:
    """Yields what writes a line to the audit log of the state dir ``root``, where it has one: it is on the disk then.

    Raises ConfigError where that cannot be written: before anything is done that it could not tell of.
    """
    found = db.execute("SELECT value FROM meta WHERE key = 'audit'").fetchone()
    if found is None:
        yield lambda *_, **__: None
        return
    log = audit_log.Log(root / found[0])
    try:
        yield lambda *args, **fields: log.append([audit_log.entry(*args, by="command", **fields)], sync=True)
    finally:
        log.close()
