"""What vLLM calls: ``register`` in every process, before flags are parsed; and what users call: ``engine_args``, ``check``.

``register`` only wraps three methods of EngineArgs. Everything else is imported and patched once a config asks for ttt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_ttt.config import PRESETS, TTTConfig, load_config, parse_config
from vllm_ttt.errors import ConfigError, TTTError

if TYPE_CHECKING:
    from argparse import Namespace

#: The key of our settings in VllmConfig.additional_config, and the plugin's name everywhere.
NAME = "ttt"


def register() -> None:
    """Entry point of ``vllm.general_plugins``. Idempotent; imports nothing heavy."""
    from vllm_ttt.patches import engine_args as patch

    patch.install()


def engine_args(preset: str | None = None, config: str | dict[str, Any] | TTTConfig | None = None) -> dict[str, Any]:
    """Arguments for ``vllm.LLM`` that switch test-time training on: ``LLM(model=..., **engine_args())``.

    Args:
        preset: `deep`, `last` or `head`.
        config: a path to a YAML file, the same as a dict, or a TTTConfig.
    Raises:
        ConfigError: the config is not valid.
    """
    if isinstance(config, TTTConfig):
        parsed = config
    elif isinstance(config, str):
        parsed = load_config(config, preset)
    else:
        parsed = parse_config(config, preset)
    return {"additional_config": {NAME: settings(parsed, http=False)}}


def settings(config: TTTConfig, http: bool, keys: int = 0) -> dict[str, Any]:
    """What travels in additional_config: the config, whether a front end checks and scopes session names, and for how many
    API keys."""
    return {"config": config.model_dump(mode="json"), "http": http, "keys": keys}


def config_of(vllm_config: Any) -> TTTConfig | None:
    """The TTTConfig of a VllmConfig or of EngineArgs, or None where ttt was not asked for."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or NAME not in additional:
        return None
    return TTTConfig.model_validate(additional[NAME]["config"])


def engines_of(vllm_config: Any) -> int:
    """How many engines the server has. vLLM tells an engine of several that it is alone (parallel_config)."""
    return vllm_config.additional_config[NAME].get("engines", 1)


def config_of_engine(vllm_config: Any) -> TTTConfig:
    """The TTTConfig as it holds for the engine core that asks, which may be one of several."""
    from vllm_ttt import placement

    config = config_of(vllm_config)
    assert config is not None, "ttt was not asked for"
    return placement.config_of_engine(config, vllm_config.parallel_config.data_parallel_index, engines_of(vllm_config))


def config_from_flags(args: Namespace) -> TTTConfig:
    """The TTTConfig that ``vllm serve``'s flags describe. Raises ConfigError."""
    config = load_config(args.ttt_config, args.ttt_preset) if args.ttt_config else parse_config(None, args.ttt_preset)
    if args.ttt_state_dir is None:
        return config
    if not args.ttt_state_dir:
        raise ConfigError("--ttt-state-dir needs the name of a folder")
    return config.model_copy(update={"sessions": config.sessions.model_copy(update={"state_dir": args.ttt_state_dir})})


def installed_plugins() -> dict[str, str]:
    """Names that ``--plugin`` takes, each with the distribution that provides it."""
    from importlib.metadata import entry_points

    found: dict[str, str] = {}
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        for point in entry_points(group=group):
            found[point.name] = point.dist.name if point.dist else "?"
    return found


class Checked(NamedTuple):
    """One line of `check`."""

    what: str
    ok: bool
    why: str
    #: whether the installation cannot serve without it
    needed: bool = True


def check(model: str | None = None, preset: str | None = None) -> list[Checked]:
    """Can this installation serve? The vLLM release, each patch, and ``model`` where given: with ``preset``, or with any, and
    then each preset by itself, too."""
    from vllm_ttt import patches, support

    rows = [Checked(*support.vllm_release())]
    if not rows[0].ok:
        return rows
    for name, verify in patches.contracts().items():
        try:
            verify()
            rows.append(Checked(f"patch {name}", True, "signature as expected"))
        except TTTError as error:
            rows.append(Checked(f"patch {name}", False, str(error)))
    if model is None:
        return rows
    if (why := support.unreadable(model)) is not None:
        return [*rows, Checked(f"model {model}", False, why)]
    found = [_with_preset(model, name) for name in ((preset,) if preset else PRESETS)]
    if preset is None:
        served = next((row for row in found if row.ok), None)
        rows.append(Checked(f"model {model}", served is not None, found[0].why if served is None else served.why))
        return rows + found
    return [*rows, Checked(f"model {model}", found[0].ok, found[0].why)]


def _with_preset(model: str, preset: str) -> Checked:
    from vllm_ttt import support

    try:
        return Checked(f"--ttt-preset {preset}", True, support.describe_model(model, preset), False)
    except (ConfigError, OSError, ValueError) as error:
        return Checked(f"--ttt-preset {preset}", False, str(error), False)
