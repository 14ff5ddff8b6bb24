"""vllm.plugins.load_endpoint_plugins: ``--plugin NAME`` is permission enough to load an endpoint plugin.

vLLM loads endpoint plugins only if VLLM_PLUGINS names them, and naming them there would stop every other plugin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from vllm_ttt.errors import ConfigError
from vllm_ttt.patches import _contract

_PARAMETERS = {"load_endpoint_plugins": "supported_tasks"}
_GROUP = "vllm.endpoint_plugins"
#: names that were asked for
_asked: dict[str, None] = {}

logger = logging.getLogger(__name__)


def install(names: Iterable[str]) -> None:
    """From now on endpoint plugins of these entry point names are loaded, beside those that VLLM_PLUGINS names.

    Names without an endpoint plugin are fine: a plugin need not have one. A second call adds its names.
    """
    import vllm.plugins

    _asked.update(dict.fromkeys(names))
    name = "load_endpoint_plugins"
    _contract.wrap(vllm.plugins, name, _PARAMETERS[name], _load_endpoint_plugins)


def check() -> None:
    import vllm.plugins

    for name, parameters in _PARAMETERS.items():
        _contract.check(vllm.plugins, name, parameters)


def _load_endpoint_plugins(original: Callable) -> Callable:
    def load_endpoint_plugins(supported_tasks: Any = None) -> list[Any]:
        present = {point.name: point for point in entry_points(group=_GROUP)}
        wanted = [name for name in _asked if name in present]
        if not wanted:
            return original(supported_tasks)
        with _allowed(wanted, list(present)):
            loaded = original(supported_tasks)
        names = {plugin.name for plugin in loaded}
        for name in wanted:
            if name not in names:
                _explain_absence(present[name])
        return loaded

    return load_endpoint_plugins


@contextmanager
def _allowed(wanted: list[str], present: list[str]) -> Iterator[None]:
    """Let vLLM's loader see ``wanted`` in VLLM_PLUGINS, and nobody else: neither the environment nor another loader.

    ``vllm.envs`` computes its attributes on access; one that is set on the module comes first.
    """
    from vllm import envs

    stock = envs.VLLM_PLUGINS
    if stock is None and (others := [name for name in present if name not in wanted]):
        logger.warning("endpoint plugins %s are not loaded: neither VLLM_PLUGINS nor --plugin names them", others)
    was_set = "VLLM_PLUGINS" in vars(envs)
    envs.VLLM_PLUGINS = [*(stock or []), *wanted]
    try:
        yield
    finally:
        if was_set:
            envs.VLLM_PLUGINS = stock
        else:
            del envs.VLLM_PLUGINS


def _explain_absence(point: Any) -> None:
    """Raise ConfigError where a plugin that was asked for is broken: vLLM only logs that, and would serve without it.

    Returns where vLLM left the plugin out because the server has none of the tasks that it needs.
    """
    try:
        point.load()()
    except Exception as error:
        raise ConfigError(f"--plugin {point.name}: its endpoint plugin {point.value} does not load: {error}") from error
