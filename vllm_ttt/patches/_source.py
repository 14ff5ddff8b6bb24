"""Python source read with `ast`: what a package defines that is not installed, without importing or running any of it."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vllm_ttt.errors import ConfigError

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Imported:
    """A name that a module takes from another: the module, and what of it (None: the module itself)."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Definition:
    """Where a name was found in the end: the module, and the statement that defines it there (None: the name is a module)."""

    module: str
    node: ast.AST | None

    @property
    def where(self) -> str:
        return f"{self.module}.{self.node.name}" if isinstance(self.node, ast.ClassDef | Function) else self.module


@dataclass
class Module:
    name: str
    tree: ast.Module
    is_package: bool
    #: modules all of whose names it takes
    stars: list[str] = field(default_factory=list)

    @cached_property
    def names(self) -> dict[str, ast.AST | Imported]:
        """What is defined at its top level, in any branch."""
        return self._names(self.tree.body)

    def _names(self, body: list[ast.stmt]) -> dict[str, ast.AST | Imported]:
        found: dict[str, ast.AST | Imported] = {}
        for node in body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    found[alias.asname or top] = Imported(alias.name if alias.asname else top, None)
            elif isinstance(node, ast.ImportFrom):
                origin = self.origin(node)
                self.stars += [origin for alias in node.names if alias.name == "*"]
                found |= {alias.asname or alias.name: Imported(origin, alias.name) for alias in node.names if alias.name != "*"}
            elif branches := list(_branches(node)):
                for branch in reversed(branches):  # of a name that several define, the first branch is what counts
                    found |= self._names(branch)
            else:
                found |= dict.fromkeys(_defined(node), node)
        return found

    def origin(self, node: ast.ImportFrom) -> str:
        """The module that a ``from`` names, whether by dots or in full."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*parts, node.module] if node.module else parts)


class Source:
    """A package as a folder or a wheel has it."""

    def __init__(self, path: Path, package: str = "vllm"):
        """``path``: the folder of the package, one that has it, or a wheel. Raises ConfigError where it is none of these."""
        self.path, self.package = path, package
        #: the modules that were looked at; None: there is none of that name
        self.modules: dict[str, Module | None] = {}
        self._wheel: zipfile.ZipFile | None = None
        self._root = path
        if path.is_file():
            try:
                self._wheel = zipfile.ZipFile(path)
            except zipfile.BadZipFile:
                raise ConfigError(f"{path} is neither a folder nor a wheel") from None
            self._files = set(self._wheel.namelist())
        elif path.name == package and (path / "__init__.py").is_file():
            self._root = path.parent
        if self.module(package) is None:
            raise ConfigError(f"{path} has no Python package {package}")

    @cached_property
    def version(self) -> str:
        """What ``_version.py`` says, or the name of the wheel; empty: neither does."""
        text = self._read(f"{self.package}/_version.py") or ""
        found = re.search(r"^(?:__version__ = )?version = ['\"]([^'\"]+)", text, re.MULTILINE)
        if found is None and self._wheel is not None:
            found = re.match(rf"{self.package}-([^-]+)-", self.path.name)
        return found[1] if found else ""

    def file(self, module: str) -> str | None:
        """Where a module is, below the root."""
        base = module.replace(".", "/")
        return next((name for name in (f"{base}/__init__.py", f"{base}.py") if self._has(name)), None)

    def all_modules(self) -> Iterator[Module]:
        """Those of a folder."""
        for path in sorted((self._root / self.package).rglob("*.py")):
            parts = path.relative_to(self._root).with_suffix("").parts
            module = self.module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            assert module is not None
            yield module

    def module(self, name: str) -> Module | None:
        if name not in self.modules:
            file = self.file(name)
            text = None if file is None else self._read(file)
            if file is None or text is None:
                self.modules[name] = None
            else:
                self.modules[name] = Module(name, ast.parse(text, file), file.endswith("/__init__.py"))
        return self.modules[name]

    def find(self, module: str, name: str) -> Definition | None:
        """What a module has under a name, as far as imports within the package lead; None: nothing.

        The definition of what comes from another package, or from a module that is compiled or generated, is the import of it.
        """
        looked: set[tuple[str, str]] = set()
        while (module, name) not in looked:
            looked.add((module, name))
            if (home := self.module(module)) is None:
                return None
            found = home.names.get(name)
            if found is None:
                for star in home.stars:
                    if (there := self.find(star, name) if self._mine(star) else None) is not None:
                        return there
                inner = f"{module}.{name}"
                return Definition(inner, None) if self.module(inner) is not None else None
            if not isinstance(found, Imported):
                return Definition(module, found)
            if not self._mine(found.module) or self.module(found.module) is None:
                return Definition(module, home.tree)
            if found.name is None:
                return Definition(found.module, None)
            module, name = found.module, found.name
        return None

    def function(self, module: str, owner: str, name: str) -> str | None:
        """The parameter names of a function of a module, or of the class ``owner`` in it (not of its bases); None: it has none.

        What is there and is no function takes nothing: it gives an empty text.
        """
        if owner:
            definition = self.find(module, owner)
            node = _members(definition.node).get(name) if definition and isinstance(definition.node, ast.ClassDef) else None
        else:
            definition = self.find(module, name)
            node = definition.node if definition else None
        if node is None:
            return None
        return parameters(node) if isinstance(node, Function) else ""

    def lineage(self, definition: Definition) -> Iterator[Definition]:
        """A class, and the classes of the package that it extends."""
        yield definition
        home = self.module(definition.module)
        assert home is not None
        assert isinstance(definition.node, ast.ClassDef)
        for base in definition.node.bases:
            found = self._class(definition.module, base)
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self.lineage(found)

    def method(self, definition: Definition, name: str) -> tuple[Definition, str] | None:
        """The class that a class has a method from, and its parameter names."""
        for cls in self.lineage(definition):
            if isinstance(node := _members(cls.node).get(name), Function):
                return cls, parameters(node)
        return None

    def _class(self, module: str, expression: ast.expr) -> Definition | None:
        """What a base class is."""
        while isinstance(expression, ast.Subscript):
            expression = expression.value
        if isinstance(expression, ast.Name):
            return self.find(module, expression.id)
        if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            home = self.find(module, expression.value.id)
            return self.find(home.module, expression.attr) if home is not None and home.node is None else None
        return None

    def _mine(self, module: str) -> bool:
        return module.partition(".")[0] == self.package

    def _has(self, name: str) -> bool:
        return name in self._files if self._wheel is not None else (self._root / name).is_file()

    def _read(self, name: str) -> str | None:
        if not self._has(name):
            return None
        if self._wheel is not None:
            return self._wheel.read(name).decode()
        return (self._root / name).read_text(encoding="utf-8")


def parameters(node: Function) -> str:
    """The names of a function's parameters, as `_contract.signature` has those of a live one."""
    args = node.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [f"**{args.kwarg.arg}"] if args.kwarg else []
    return " ".join(names)


def _members(node: ast.AST | None) -> dict[str, ast.AST | Imported]:
    """What a class defines itself."""
    assert isinstance(node, ast.ClassDef)
    return Module("", ast.Module(node.body, []), False).names


def _branches(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of a statement that runs at most some of them, at the level at which it stands."""
    if isinstance(node, ast.ClassDef | Function):
        return
    blocks = [getattr(node, "body", []), *(h.body for h in getattr(node, "handlers", [])), getattr(node, "orelse", [])]
    yield from (block for block in [*blocks, getattr(node, "finalbody", [])] if block)


def _defined(node: ast.stmt) -> Iterator[str]:
    """Names that a statement gives a value, or declares."""
    if isinstance(node, Function):
        if not any(getattr(d, "id", getattr(d, "attr", "")) == "overload" for d in node.decorator_list):
            yield node.name
    elif isinstance(node, ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))
