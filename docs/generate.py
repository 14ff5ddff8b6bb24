"""Writes docs/reference.md from the code and from reference.template, which has what the code does not say, and README's table
of models: `make docs`."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vllm_ttt import families
from vllm_ttt.config import RANKS, TTTConfig, constants
from vllm_ttt.types import SESSION_ID_RULE

FOLDER = Path(__file__).parent


def render() -> str:
    """The whole page."""
    parts = {
        "settings": settings(), "constants": fixed(),
        "flags": flags(), "commands": commands(), "routes": routes(), "id": SESSION_ID_RULE,
        "session": fields("SessionDetail"), "chunk": fields("ChunkLoss"), "models": models(),
    }  # fmt: skip
    text = (FOLDER / "reference.template").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<{name}>", part)
    return text


def readme(text: str) -> str:
    """README with its table of models."""
    start, end = "<!-- models -->\n", "<!-- -->"
    before, found, rest = text.partition(start)
    assert found, "README has no place for it"
    return f"{before}{start}{kinds()}\n{end}{rest.partition(end)[2]}"


def kinds() -> str:
    """Models by the presets that serve them."""
    together: dict[tuple[bool, ...], list[str]] = {}
    for what, _, served, _ in families.table():
        if not any(served) or what == families.INT8_ON_CPU:
            continue  # the reference has them
        together.setdefault(served, []).append(what)
    presets = ("`deep`", "`last`", "`head`")
    named = {served: [name for name, ok in zip(presets, served, strict=True) if ok] for served in together}
    rows = [(", ".join(what), ", ".join(named[served])) for served, what in together.items()]
    return table(("models ([names](docs/reference.md#models)), quantised or not", "`--ttt-preset`"), *rows)


def models() -> str:
    """The same with every name, and why not."""
    rows = []
    for what, names, served, why in families.table():
        rows.append((what, ", ".join(f"`{name}`" for name in names), *map(_yes, served), why))
    return table(("models", "`architectures` in config.json", "`deep`", "`last`", "`head`", "why not"), *rows)


def _yes(served: bool) -> str:
    return "yes" if served else "no"


def table(*rows: tuple[str, ...]) -> str:
    """Markdown; the first row is the heading."""
    lines = ["| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def settings() -> str:
    rows = [(key, _default(field), _allowed(name, field), field.description or "") for key, name, field in _fields(False)]
    return table(("key", "default", "allowed", "meaning"), *rows)


def fixed() -> str:
    rows = [(key, _default(field), field.description or "") for key, _, field in _fields(True)]
    return table(("key", "value", "meaning"), *rows)


def _fields(constant: bool) -> Iterator[tuple[str, str, FieldInfo]]:
    """Those that a config file may not name, or the others: how the page calls each, its name, and the field."""
    for section, outer in TTTConfig.model_fields.items():
        for name, field in type(outer.default).model_fields.items():
            if (f"{section}.{name}" in constants()) == constant:
                yield f"`{section}.{name}`", name, field


def _default(field: FieldInfo) -> str:
    default: Any = field.default
    if isinstance(default, tuple):
        return ", ".join(default) or "[]"
    return json.dumps(default) if default is None or isinstance(default, bool) else str(default)


def _allowed(name: str, field: FieldInfo) -> str:
    """What the field may be, in words."""
    kind, words = field.annotation, {"rank": ", ".join(map(str, RANKS)), "layers": "1 to 1024, or `all`"}
    words["orders"] = "0 to 8, or `auto`"
    words["filter"] = "up to 64 regular expressions"
    words["ttl"] = "a number and `s`, `m`, `h` or `d`; `never`"
    if name in words:
        return words[name]
    if get_origin(kind) is tuple:
        return "some of " + ", ".join(f"`{v}`" for v in get_args(get_args(kind)[0]))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{v}`" for v in get_args(kind))
    if kind == str | None:
        return "a path"
    if kind is bool:
        return "`true`, `false`"
    bounds = {b: getattr(m, b) for m in field.metadata for b in ("ge", "gt", "le", "lt") if hasattr(m, b)}
    if set(bounds) == {"ge", "le"}:
        text = str(bounds["ge"]) if bounds["ge"] == bounds["le"] else f"{bounds['ge']} to {bounds['le']}"
        return f"{text}, or null" if type(None) in get_args(kind) else text
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(f"{signs[b]} {'2^63' if value == 2**63 else value}" for b, value in bounds.items())


def flags() -> str:
    from vllm_ttt.patches.engine_args import add_flags

    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    shown = [a for a in parser._actions if a.option_strings]
    rows = [(f"`{a.option_strings[0]} {a.metavar}`", (a.help or "").replace("|", "\\|")) for a in shown]
    return table(("flag", "meaning"), *rows)


def commands() -> str:
    from vllm_ttt.cli import app

    rows = [("command", "what it does")]
    for command, info in _walk(typer.main.get_command(app), "vllm-ttt"):
        rows.append((f"`{command}`", info))
    return table(*rows)


def _walk(command: Any, name: str) -> Iterator[tuple[str, str]]:
    if not hasattr(command, "commands"):
        yield name, (command.short_help or command.help or "").split("\n\n")[0]
        return
    for inner, found in command.commands.items():
        yield from _walk(found, f"{name} {inner}")


def routes() -> str:
    from vllm_ttt.frontend.routes import router

    rows = [("route", "what it does", "refused with")]
    for route in router.routes:
        path = route.path.replace(":path}", "}").replace("{session_id}", "{id}")  # pyright: ignore
        status = ", ".join(str(s) for s in sorted(route.responses) if int(s) != 200)  # pyright: ignore
        said = inspect.getdoc(route.endpoint) or ""  # pyright: ignore
        rows += [(f"`{method} {path}`", said, status) for method in route.methods]  # pyright: ignore
    rows.append(("`GET /ttt`", "The [live page](usage.md#watch-it-learn).", ""))
    return table(*rows)


def fields(name: str) -> str:
    from vllm_ttt.frontend import models

    model: type[BaseModel] = getattr(models, name)
    return table(("field", "meaning"), *((f"`{n}`", field.description or "") for n, field in model.model_fields.items()))


if __name__ == "__main__":
    (FOLDER / "reference.md").write_text(render(), encoding="utf-8")
    page = FOLDER.parent / "README.md"
    page.write_text(readme(page.read_text(encoding="utf-8")), encoding="utf-8")
