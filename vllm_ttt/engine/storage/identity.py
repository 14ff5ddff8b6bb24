"""Whose deltas a state dir holds: a delta means nothing under another model, rank, seed or set of layers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.support import geometry_of, served_name

#: Keys of config.json that say nothing about what the model computes.
_IRRELEVANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
#: Of each file of weights: pieces that are hashed, spread evenly, and the bytes of each.
_PIECES, _PIECE = 16, 4096


def identity(vllm_config: Any, config: TTTConfig) -> dict[str, Any]:
    """``{"model": {"name", "served", "config", "weights"}, "adapt": {...}, "geometry": {...}, "dtype": str}``, for JSON.

    ``weights`` is None where the weights are not safetensors files on this machine; then the configuration must do.
    """
    model = vllm_config.model_config
    folder = _folder(model.model, model.revision)
    geometry = geometry_of(model, config)
    adapt = config.adapt.model_dump(mode="json", include={"rank", "seed", "layers", "modules"}) | {"layers": geometry.layers}
    return {
        "model": {
            "name": str(model.model),
            "served": served_name(model),
            "config": config_hash(folder) if folder else _hash(_widths(model.hf_text_config)),
            "weights": weights_hash(folder) if folder else None,
        },
        "adapt": adapt,
        "geometry": geometry.to_json(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where the state dir ``folder``, of identity ``found``, cannot serve ``wanted``."""
    where = f"the state dir {folder}"
    for key, value in wanted["adapt"].items():
        if found["adapt"].get(key) != value:
            raise ConfigError(
                f"{where} has sessions of adapt.{key} {found['adapt'].get(key)!r}, and this server has {value!r}; "
                "serve with that setting, or name another state dir"
            )
    ours, theirs = wanted["model"], found["model"]
    same = ours["config"] == theirs["config"] and (
        ours["weights"] == theirs["weights"] or None in (ours["weights"], theirs["weights"])
    )
    if not same:
        raise ConfigError(
            f"{where} has sessions of the model {theirs['name']}, and this server serves another: {ours['name']} "
            "(their configurations or weights differ); serve that model, or name another state dir"
        )


def config_hash(folder: Path) -> str:
    """Of config.json, without what does not change the model."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return _hash({k: v for k, v in content.items() if k not in _IRRELEVANT})


def weights_hash(folder: Path) -> str | None:
    """Of every safetensors file: size, header, and pieces of the weights. None where there is no such file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, 2**26)))
            for i in range(_PIECES):
                stream.seek(max(0, (size - _PIECE) * (i + 1) // _PIECES))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def _folder(model: str, revision: str | None) -> Path | None:
    """Where the model's files are: the folder that is named, or its snapshot in the hub's cache."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:
        return None  # not in the cache, or not on the hub: an object store, a remote loader
    return folder if (folder / "config.json").is_file() else None


def _widths(hf: Any) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(hf, name, None) for name in names}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
