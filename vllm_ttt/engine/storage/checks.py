"""Whether the state dir and the audit log can be used: asked before a model is loaded."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vllm_ttt import placement, plugin
from vllm_ttt.audit_log import Log
from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.storage import database, places, reserve
from vllm_ttt.engine.storage.identity import compare, identity
from vllm_ttt.engine.storage.shelves import settle
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import ConfigError
from vllm_ttt.state_dir import SECRET_VARIABLE, StateDir
from vllm_ttt.vault import Vault


def check_dir(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where `open_store` would: before anything is loaded. Changes nothing in a dir that is in use.

    Where there are several engines, or were, each session is moved to the shelf of its engine.
    """
    engines = plugin.engines_of(vllm_config)
    if config.sessions.state_dir is not None:
        root = StateDir(config.sessions.state_dir)
        settled = _check_state_dir(root, vllm_config, config)
        if config.sessions.shared and not settled:
            raise ConfigError(
                f"the state dir {root.root} has shelves of several engines, and sessions.shared is for servers of one: start "
                "once with --data-parallel-size 1 and without sessions.shared, which brings all sessions together"
            )
        if engines > 1 or not settled:
            whose, secret = identity(vllm_config, config), os.environ.get(SECRET_VARIABLE)
            vault = Vault.of(config.sessions.key_file)
            settle(root, engines, lambda shelf: Store(shelf, whose, config.sessions.keep_versions, 0, secret, vault))
    for engine in range(engines):
        own = placement.config_of_engine(config, engine, engines).sessions
        if engine and own.state_dir is not None:
            StateDir(own.state_dir).create()
        if (path := own.audit_path) is not None:
            Log(path).close()


def _check_state_dir(folder: StateDir, vllm_config: Any, config: TTTConfig) -> bool:
    """Returns whether its sessions are those of one engine, and nothing is left of others."""
    vault, settled = Vault.of(config.sessions.key_file), len(folder.shelves()) == 1
    folder.create()
    alone = folder.lock(config.sessions.shared)
    folder.unlock()
    if folder.exists():
        root = folder.root
        with database.readable(root), contextlib.closing(database.connect(folder.database, vault=vault)) as db:
            compare(database.read_identity(db), identity(vllm_config, config), root)
            reserve.using(root, lambda: database.check_vault(db, root, record=alone))
            if secret := os.environ.get(SECRET_VARIABLE):
                reserve.using(root, lambda: database.check_secret(db, secret, root, record=alone))
            settled = settled and places.settled(db, 1)
        reserve.keep(root)
    return settled
