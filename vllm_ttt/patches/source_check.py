"""Whether a vLLM that is not installed has what vllm-ttt asks of it: its source is read, and nothing of it runs.

Three things are looked up in it: every function that a contract names (`_contract`), the methods of vLLM's classes that ours
override, beside the same methods of the vLLM that is installed, and every name that vllm-ttt imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vllm_ttt import patches, support
from vllm_ttt.errors import ConfigError
from vllm_ttt.patches import _contract
from vllm_ttt.patches._source import Definition, Module, Source
from vllm_ttt.plugin import Checked


def check_source(path: Path) -> list[Checked]:
    """As `plugin.check` has it, for the vLLM in a folder or wheel.

    Raises ConfigError where there is none, or where none is installed to compare it with."""
    source, installed, ours = Source(path), installed_source(), _ours()
    rows, named = [support.release(source.version or "of an unknown release")], set[str]()
    for name, verify in {**patches.contracts(), **patches.worker_contracts()}.items():
        with _contract.recorded() as asked:
            verify()
        named |= {each.where for each in asked}
        problems = [found for each in asked if (found := each.problem(look_up(source, each)))]
        rows.append((f"patch {name}", not problems, "; ".join(problems) or f"{_many(len(asked), 'signature')} as expected"))
    changed, count = overridden(source, installed, ours, named)
    rows.append(("overridden methods", not changed, "; ".join(changed) or f"{count} as in vLLM {installed.version}"))
    missing, count = imported(source, ours)
    rows.append(("imported names", not missing, "; ".join(missing) or f"all {count} are there"))
    return [Checked(*row) for row in rows]


@cache
def installed_source() -> Source:
    """The vLLM of this environment, as a source. Raises ConfigError where there is none."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("vLLM is not installed here; what another is compared with is the one that is")
    return Source(Path(spec.submodule_search_locations[0]))


@cache
def _ours() -> Source:
    return Source(Path(__file__).parents[1], "vllm_ttt")


def look_up(source: Source, asked: _contract.Asked) -> str | None:
    """The parameter names of what a contract asks for, in a source; None: it is not there."""
    if asked.parameters:
        return source.function(asked.module, asked.owner, asked.name)
    owner = _class(source, asked.module, asked.owner)
    inherited = source.method(owner, asked.name) if owner is not None else None
    return None if inherited is None else inherited[1]


def overridden(source: Source, installed: Source, ours: Source, named: set[str]) -> tuple[list[str], int]:
    """What has changed of the methods that our classes override, but for those that a contract names; how many there are."""
    problems, seen = dict[str, None](), set[str]()
    for cls, methods, module, base in _subclasses(ours):
        old, new = _class(installed, module, base), _class(source, module, base)
        for name in methods:
            before = installed.method(old, name) if old is not None else None
            if before is None or f"{before[0].where}.{name}" in named:
                continue
            after = source.method(new, name) if new is not None else None
            where = f"{module}.{base}.{name}"
            seen.add(where)
            if after is None:
                problems[f"{where}, which {cls} overrides, does not exist in this vLLM"] = None
            elif after[1] != before[1]:
                what = f"takes ({after[1]}) in this vLLM, and ({before[1]}) in vLLM {installed.version}"
                problems[f"{where}, which {cls} overrides, {what}"] = None
    return list(problems), len(seen)


def _class(source: Source, module: str, name: str) -> Definition | None:
    found = source.find(module, name)
    return found if found is not None and isinstance(found.node, ast.ClassDef) else None


def _subclasses(ours: Source) -> Iterator[tuple[str, list[str], str, str]]:
    """Our classes that extend one of vLLM's: name, methods (its own, and those of our classes that it extends), and where it
    imports that class from, and its name there."""
    for module in list(ours.all_modules()):
        for node in module.names.values():
            if not isinstance(node, ast.ClassDef):
                continue
            methods, bases = dict[str, None](), dict[tuple[str, str], None]()
            for cls in ours.lineage(Definition(module.name, node)):
                assert isinstance(cls.node, ast.ClassDef)
                methods |= {m.name: None for m in cls.node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)}
                bases |= {base: None for expression in cls.node.bases if (base := _base(ours, cls.module, expression))}
            for base in bases:
                yield node.name, list(methods), *base


def _base(ours: Source, module: str, expression: ast.expr) -> tuple[str, str] | None:
    """(module, name) of the class of vLLM that an expression in a module of ours names."""
    home = ours.module(module)
    assert home is not None
    for node in _imports(home):
        if isinstance(expression, ast.Name) and isinstance(node, ast.ImportFrom) and node.module and _vllm(node.module):
            for alias in node.names:
                if expression.id == (alias.asname or alias.name):
                    return node.module, alias.name
    return None


def imported(source: Source, ours: Source) -> tuple[list[str], int]:
    """Names that our modules import from vLLM, or use of a module of it, and that are not there; how many they are in all."""
    wanted: dict[tuple[str, str], str] = {}
    for module in list(ours.all_modules()):
        for name, attribute in _wanted(module, source):
            wanted.setdefault((name, attribute), module.name)
    problems = []
    for (name, attribute), user in wanted.items():
        if (source.find(name, attribute) if attribute else source.module(name)) is None:
            what = f"{name}.{attribute}" if attribute else name
            problems.append(f"{what}, which {user} imports, does not exist in this vLLM")
    return problems, len(wanted)


def _wanted(module: Module, source: Source) -> Iterator[tuple[str, str]]:
    """(module of vLLM, name in it or nothing) for each that a module of ours asks for."""
    modules: dict[str, str] = {}
    for node in _imports(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _vllm(alias.name):
                    yield alias.name, ""
                    modules[alias.asname or alias.name] = alias.name
        elif _vllm(node.module) and node.module is not None:
            for alias in node.names:
                yield node.module, alias.name
                if source.module(inner := f"{node.module}.{alias.name}") is not None:
                    modules[alias.asname or alias.name] = inner
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and (name := ast.unparse(node.value)) in modules:
            yield modules[name], node.attr


def _imports(module: Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports of a module, those within functions too."""
    yield from (node for node in ast.walk(module.tree) if isinstance(node, ast.Import | ast.ImportFrom))


def _vllm(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "vllm"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
