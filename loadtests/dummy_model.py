"""Write a model folder without weights, to be served with `--load-format dummy`: the shape of a model, for benchmarks.

python loadtests/dummy_model.py FOLDER [--shape qwen3-8b|qwen3-30b-a3b|llama-70b] [--layers N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

#: What shapes share, where they do not say otherwise.
_SHARED: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "num_attention_heads": 32,
    "head_dim": 128,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: By name: what is a model's own.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "llama-70b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
}


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a shape, with ``layers`` of its layers, or all of them."""
    own = SHAPES[shape]
    return {**_SHARED, **own, "num_hidden_layers": layers or own["num_hidden_layers"]}


def write(folder: Path, shape: str, layers: int | None = None) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    config = config_of(shape, layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w2"))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1", "unk_token": "w2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, so that it starts sooner")
    args = parser.parse_args()
    write(args.folder, args.shape, args.layers)


if __name__ == "__main__":
    main()
