"""The shapes that benchmarks start without weights are models that vLLM and a preset can serve."""

from __future__ import annotations

import json
from pathlib import Path

import dummy_model
import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_ttt import engine_args, plugin

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("shape", "preset", "says"),
    [
        ("qwen3-8b", "deep", "Qwen3ForCausalLM, 36 layers, hidden 4096, vocabulary 151936"),
        ("qwen3-30b-a3b", "head", "Qwen3MoeForCausalLM, 48 layers, hidden 2048, vocabulary 151936"),
        ("llama-70b", "deep", "LlamaForCausalLM, 80 layers, hidden 8192, vocabulary 128256"),
    ],
)
def test_a_shape_is_served(shape: str, preset: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dummy_model.config_of(shape)))
    row = plugin.check(str(tmp_path), preset)[-1]
    assert (row.ok, row.why) == (True, says)
    plugin.register()
    options = {"max_model_len": 2048, "skip_tokenizer_init": True, "quantization": "fp8_per_channel", "load_format": "dummy"}
    made = EngineArgs(model=str(tmp_path), enforce_eager=True, **options, **engine_args(preset)).create_engine_config()
    assert made.model_config.is_moe == (shape == "qwen3-30b-a3b")
    assert made.quant_config is not None


def test_fewer_layers() -> None:
    assert dummy_model.config_of("qwen3-30b-a3b", 3)["num_hidden_layers"] == 3
    assert dummy_model.config_of("qwen3-30b-a3b")["num_hidden_layers"] == 48
