"""Where a session is, of several engines of one server (--data-parallel-size): every process says the same.

Each session has one engine, which its name alone decides: rendezvous hashing, so that of N + 1 engines the new one takes a
share of each other's sessions, and no session moves between two that were there before.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.log import logger_of
from vllm_ttt.state_dir import StateDir

logger = logger_of(__name__)


def owner(wire: str, engines: int) -> int:
    """The engine of the session that ``SessionKey.wire()`` calls so."""
    if engines == 1:
        return 0
    return max(range(engines), key=lambda i: blake2b(f"{i}/{wire}".encode(), digest_size=8).digest())


def share(limit: int, engine: int, engines: int) -> int:
    """The part of a server's limit that is one engine's; all together are the limit."""
    return limit // engines + (engine < limit % engines)


def config_of_engine(config: TTTConfig, engine: int, engines: int) -> TTTConfig:
    """What holds for one of several engines: its shelf of the state dir, its audit log, its part of what is the server's."""
    if engines == 1:
        return config
    sessions, guard = config.sessions, config.guard
    own = {
        "state_dir": None if sessions.state_dir is None else str(StateDir(sessions.state_dir).shelf(engine).root),
        "audit_log": _log(sessions.audit_log, engine),
        "disk_gib": sessions.disk_gib / engines,
        "per_key": None if sessions.per_key is None else share(sessions.per_key, engine, engines),
    }
    hourly = share(guard.hourly_tokens_per_key, engine, engines)
    return config.model_copy(
        update={
            "sessions": sessions.model_copy(update=own),
            "guard": guard.model_copy(update={"hourly_tokens_per_key": hourly}),
        }
    )


def check_engines(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where vLLM would run several engines in a way in which a session has no one place; else note their
    number for the engine cores, each of which vLLM tells that it is alone."""
    parallel, settings = vllm_config.parallel_config, vllm_config.additional_config["ttt"]
    engines = parallel.data_parallel_size
    if config.sessions.shared:
        _check_shared(config, engines, settings["http"])
    if engines == 1:
        return
    hourly = config.guard.hourly_tokens_per_key
    refusals = {
        "a script: it needs vllm serve, whose front end knows where a session is": not settings["http"],
        "--data-parallel-external-lb, --data-parallel-hybrid-lb or engines on other machines: sessions are placed among all "
        "engines, on one machine": parallel.local_engines_only or parallel.data_parallel_size_local != engines,
        "--data-parallel-backend ray": parallel.data_parallel_backend != "mp",
        "a mixture of experts, whose engines make their steps together": vllm_config.model_config.is_moe,
        f"sessions.per_key {config.sessions.per_key}: each engine has its part of it, so it must be {engines} at least": (
            config.sessions.per_key is not None and config.sessions.per_key < engines
        ),
        f"guard.hourly_tokens_per_key {hourly}: each engine has its part of it, so it must be {engines} at least, or 0 for no "
        "limit": 0 < hourly < engines,
    }
    for why, refused in refusals.items():
        if refused:
            raise ConfigError(
                f"--data-parallel-size {engines} is not supported with --plugin ttt and {why}; "
                "leave --data-parallel-size out, or change the other"
            )
    settings["engines"] = engines
    cores = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    if vllm_config.device_config.device_type == "cpu" and cores == "auto":
        logger.warning(
            "vllm-ttt: vLLM gives all engines the same cores; VLLM_CPU_OMP_THREADS_BIND='0-7|8-15' gives each its own"
        )


def _check_shared(config: TTTConfig, engines: int, http: bool) -> None:
    """Raise ConfigError where a state dir cannot be shared with other servers."""
    refusals = {
        "no state dir, which is what is shared (--ttt-state-dir)": config.sessions.state_dir is None,
        f"--data-parallel-size {engines}: start so many servers instead": engines > 1,
        "a script: it needs vllm serve, whose front end asks for a session before it is used": not http,
        "sessions.audit_log: a log has one writer": config.sessions.audit_log is not None,
    }
    for why, refused in refusals.items():
        if refused:
            raise ConfigError(f"sessions.shared is not supported with {why}; leave sessions.shared out, or change the other")


def _log(path: str | None, engine: int) -> str | None:
    """A name without a folder is in the engine's shelf."""
    if path is None or engine == 0 or not Path(path).is_absolute():
        return path
    return f"{path}.engine-{engine}"
