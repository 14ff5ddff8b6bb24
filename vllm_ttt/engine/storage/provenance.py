"""Where an exported delta comes from: the model that it is for, and how it was learned. No content, and no tenant."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any


def provenance(identity: dict[str, Any], name: str, state: dict[str, Any], rate: float | None, digest: str) -> dict[str, Any]:
    """For JSON, in the metadata of an adapter and as provenance.json beside it.

    Args:
        identity: of the model and the settings (identity.py).
        name: the session's.
        state: the ledger's, as of the version that is exported.
        rate: of the next step; None: not known.
        digest: of the delta.
    """
    model = identity["model"]
    return {
        "vllm_ttt": version("vllm-ttt"),
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base_model": {
            "name": model.get("served") or model["name"],
            "config_sha256": model["config"],
            "weights_sample_sha256": model["weights"],
            "dtype": identity["dtype"],
        },
        "adapt": identity["adapt"],
        "session_id": name,
        "version": state.get("version", 0),
        "digest_sha256": digest,
        "tokens_learned": state.get("tokens_learned", 0),
        "tokens_seen": state.get("tokens_seen", 0),
        "requests": state.get("requests", 0),
        "rate": rate,
    }
