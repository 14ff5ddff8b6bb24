"""vllm.engine.arg_utils.EngineArgs: the flags, and the engine defaults that ttt needs.

``add_cli_args`` gets ``--plugin`` and ``--ttt-*``; ``from_cli_args`` keeps dataclass fields only, so it moves ours into
``additional_config``; ``create_engine_config`` fills in what ttt needs and refuses what it cannot serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_ttt.errors import ConfigError
from vllm_ttt.patches import _contract

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

_PARAMETERS = {
    "add_cli_args": "parser",
    "from_cli_args": "cls args",
    "create_engine_config": "self usage_context headless",
}


def install() -> None:
    from vllm.engine.arg_utils import EngineArgs

    _contract.wrap(EngineArgs, "add_cli_args", _PARAMETERS["add_cli_args"], _add_cli_args)
    _contract.wrap(EngineArgs, "from_cli_args", _PARAMETERS["from_cli_args"], _from_cli_args)
    _contract.wrap(EngineArgs, "create_engine_config", _PARAMETERS["create_engine_config"], _create_engine_config)


def check() -> None:
    from vllm.engine.arg_utils import EngineArgs

    for name, parameters in _PARAMETERS.items():
        _contract.check(EngineArgs, name, parameters)


def _add_cli_args(original: Callable) -> Callable:
    def add_cli_args(parser: ArgumentParser) -> ArgumentParser:
        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def add_flags(parser: ArgumentParser) -> None:
    """The flags that `vllm serve` gains."""
    group = parser.add_argument_group(
        title="vllm-ttt", description="Test-time training: sessions that keep learning while they are served."
    )
    group.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="Use the installed vLLM plugin NAME; can be repeated. `--plugin ttt` switches test-time training on.",
    )
    group.add_argument("--ttt-config", metavar="FILE", help="YAML file with vllm-ttt's settings.")
    group.add_argument(
        "--ttt-preset",
        metavar="PRESET",
        help="What is adapted: `deep` (default), every layer; `last`, the last; `head`, the last hidden state, of any model.",
    )
    group.add_argument("--ttt-state-dir", metavar="DIR", help="Folder in which sessions outlive the server.")


def _from_cli_args(original: Callable) -> Callable:
    def from_cli_args(cls: type, args: Namespace) -> Any:
        engine_args = original(cls, args)
        names = list(dict.fromkeys(getattr(args, "plugin", None) or []))
        _check_flags(args, names)
        if names:
            from vllm_ttt.patches import endpoint_plugins

            endpoint_plugins.install(names)
        if "ttt" in names:
            from vllm_ttt import patches, plugin
            from vllm_ttt.frontend import tenants
            from vllm_ttt.patches import frontend

            config = plugin.config_from_flags(args)
            settings = plugin.settings(config, http=True, keys=len(tenants.known_keys(args)))
            engine_args.additional_config = {**(engine_args.additional_config or {}), plugin.NAME: settings}
            patches.check_all()
            frontend.install()
            tenants.ensure_secret(config.sessions.state_dir)
            tenants.admit_admin(args, config.sessions.admin_key_file)
        return engine_args

    return from_cli_args


def _check_flags(args: Namespace, names: list[str]) -> None:
    from vllm_ttt.plugin import installed_plugins

    installed = installed_plugins()
    for name in names:
        if name not in installed:
            raise ConfigError(f"--plugin {name}: no such vLLM plugin is installed; installed: {', '.join(sorted(installed))}")
    given = [f for f in ("config", "preset", "state_dir") if getattr(args, f"ttt_{f}", None) is not None]
    if given and "ttt" not in names:
        raise ConfigError(f"--ttt-{given[0].replace('_', '-')} needs --plugin ttt")
    if "ttt" in names and getattr(args, "grpc", False):
        raise ConfigError("--grpc cannot be combined with --plugin ttt, whose sessions come over HTTP; leave it out")


def _create_engine_config(original: Callable) -> Callable:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_ttt import plugin

        config = plugin.config_of(self)
        if config is None:
            return original(self, *args, **kwargs)
        from vllm_ttt import patches, support
        from vllm_ttt.patches import offline, samples

        patches.check_all()
        offline.install()
        samples.install()
        support.prepare_engine_args(self, config)
        config = plugin.config_of(self) or config
        vllm_config = original(self, *args, **kwargs)
        support.finish_vllm_config(vllm_config, config)
        another = self._api_process_count > 1 and self._api_process_rank >= 0  # one of several: by now the dir is in use
        if not another:
            from vllm_ttt.engine.storage.checks import check_dir

            check_dir(vllm_config, config)
        return vllm_config

    return create_engine_config
