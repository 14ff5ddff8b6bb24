"""From vLLM's own modules to the weights of a step over several layers, and what it refuses; no engine is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from test_gradient import ROWS, SUBSETS, Kept, autograd, batch_of, config_of, of_session, random_deltas, relative
from torch import nn

from vllm_ttt import support
from vllm_ttt.config import LETTERS, parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.geometry import PATHS, Geometry
from vllm_ttt.worker.deltas import peft
from vllm_ttt.worker.step import tail as tail_module
from vllm_ttt.worker.step import weights
from vllm_ttt.worker.step.micro_step import accumulate
from vllm_ttt.worker.step.tail import LayerModules, TailModules, build_tail, check_attention, find_modules, step_dtype

pytestmark = pytest.mark.unit

CONFIG = config_of(2)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one, without which vLLM builds no model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel, init_distributed_environment
    from vllm.distributed.parallel_state import initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('world') / 'one'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()


def loaded(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", **options: Any) -> nn.Module:
    """As a CPU worker loads it, with its weights packed; transformers' classes stay as they are for other tests.

    Args:
        options: of vLLM's, further ones.
    """
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.models.transformers.base import Base

    own: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": dtype, "max_model_len": 1024, **options}
    args = EngineArgs(model=str(folder), **own)
    config = args.create_engine_config()
    # vLLM's Transformers backend has its way with the class itself, for good, which no one else in the process can use then.
    with set_current_vllm_config(config), patch.object(Base, "_decorate_cls_for_torch_compile"):
        return get_model(vllm_config=config)


def as_with_lora(modules: TailModules) -> TailModules:
    """The adapted linear layers inside wrappers, as vLLM's LoRA has them."""
    wrap = lambda layer: {n: SimpleNamespace(base_layer=getattr(layer, n)) for n in ("o_proj", "gate_up_proj", "down_proj")}  # noqa: E731
    return replace(modules, layers=tuple(replace(layer, **wrap(layer)) for layer in modules.layers))


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_the_tail_of_vllms_model_has_the_models_gradient(
    distributed: None, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases (Qwen2), norms of heads (Qwen3), packed weights, the rotary table: all are found, and in the right order."""
    shape: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 1024}
    shape |= {"sliding_window": 1024} if architecture == "mistral" else {}  # no narrower than the context: nothing is cut
    folder = tiny_model(architecture, tmp_path, **shape)
    model = loaded(folder)
    for layers in (2, 3):  # with all of them it begins at the embedding
        config = config_of(layers)
        tail = build_tail(model, as_with_lora(find_modules(model, layers)), config.adapt, 1024)
        assert (tail.embedding_VD is None) == (layers == 2)
        oracle = Oracle(folder, config, dtype=torch.float64, compute_dtype=torch.float64)
        batch = batch_of(oracle)
        delta, grad = random_deltas(tail, 0.05), tail.zeros(len(ROWS))
        tokens = torch.tensor([[5, 319, 0]])
        entering = tail.entering(torch.zeros(1, 3, 64), torch.zeros(1, 3, 128), tokens)[0]
        assert torch.equal(entering, oracle.model.model.embed_tokens(tokens).float()) == (layers == 3)
        losses = accumulate(tail, delta, *batch.rows(), grad, batch.past)
        for s in range(len(ROWS)):
            loss, expected = autograd(oracle, delta, batch, s)
            assert losses[s].item() == pytest.approx(loss, abs=1e-5)
            for one, other in zip([x for b in of_session(grad, s) for x in b.values()], expected, strict=True):
                assert relative(one, other) < 1e-4

        modules = as_with_lora(find_modules(model, layers))
        parts = [part.base_layer for layer in modules.layers for part in (layer.o_proj, layer.down_proj)]
        for part in parts:  # as on CUDA: a CPU keeps a weight in an order of its kernels'
            part.weight.data = weights.dense(part, torch.float32)
        before = [part.weight.clone() for part in parts]
        with monkeypatch.context() as patched:
            patched.setattr(weights, "joins", lambda *_: True)
            tail = build_tail(model, modules, config.adapt, 1024)
        assert all(torch.equal(part.weight, x) for part, x in zip(parts, before, strict=True)), "what is served stays"
        pieces = [block.joined[key] for block in tail.blocks for key in "od"]
        assert [x.weight.data_ptr() for x in parts] == [x.data_ptr() for x in pieces], "and lies where the step reads it"
        again = tail.zeros(len(ROWS))
        torch.testing.assert_close(accumulate(tail, delta, *batch.rows(), again, batch.past), losses)
        for one, other in zip(again.tensors(), grad.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    if architecture == "mistral":
        with pytest.raises(ConfigError, match=r"layers\.2\.self_attn has a sliding window"):
            build_tail(model, as_with_lora(find_modules(model, 2)), CONFIG.adapt, 1025)


def test_a_step_in_float32_of_a_model_in_bfloat16(distributed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU has no 16-bit products: the weights are the model's own, and what was captured counts as it is."""
    folder = tiny_model("qwen3", tmp_path, num_hidden_layers=3, max_position_embeddings=1024)
    model, tails = loaded(folder, "bfloat16"), {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(tail_module, "step_dtype", lambda *_, dtype=dtype: dtype)
        tails[dtype] = build_tail(model, as_with_lora(find_modules(model, 2)), CONFIG.adapt, 1024)
    narrow, wide = tails.values()
    for one, other in ((narrow, wide), (narrow.lower[0], wide.lower[0]), (narrow.attentions[0], wide.attentions[0])):
        weights = {k: v for k, v in vars(one).items() if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16}
        weights.pop("logits", None)  # a workspace
        weights.pop("cos_sin_PI", None)  # read as float32 by either
        assert weights
        for name, weight in weights.items():
            assert torch.equal(getattr(other, name), weight.float()), name
            assert getattr(other, name).dtype == torch.float32, name

    batch = batch_of(Oracle(folder, CONFIG, dtype=torch.float32, compute_dtype=torch.float32), torch.bfloat16)
    h, a, t, w = batch.rows()
    assert isinstance(batch.past.cache, Kept)
    assert a is not None
    widened = replace(batch.past, cache=batch.past.cache.map(torch.Tensor.float))
    delta, results = random_deltas(wide, 0.05), []
    for rows, past in (((h, a), batch.past), ((h.float(), a.float()), widened)):
        grad = wide.zeros(len(ROWS))
        results.append((accumulate(wide, delta, *rows, t, w, grad, past), *grad.tensors()))
    for one, other in zip(*results, strict=True):
        assert one.any()
        assert torch.equal(one, other)


def test_the_dtype_of_the_step() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert step_dtype(torch.float32, cpu) == torch.float32
    assert step_dtype(torch.bfloat16, cuda) == torch.bfloat16
    on_x86 = {"AVX2": torch.float32, "AVX512": torch.bfloat16}
    capability = torch.backends.cpu.get_cpu_capability()
    assert step_dtype(torch.bfloat16, cpu) == on_x86.get(capability, step_dtype(torch.bfloat16, cpu))


class Attention:
    """What `check_attention` looks at in vLLM's class of that name."""

    attn_type, sliding_window, use_mla = "decoder", None, False

    def __init__(self, **change: Any):
        self.impl = SimpleNamespace(alibi_slopes=None, logits_soft_cap=0, sinks=None)
        for key, value in change.items():
            setattr(self.impl if hasattr(self.impl, key) else self, key, value)


class OtherAttention(Attention):
    pass


class RotaryEmbedding(SimpleNamespace):
    pass


class MRotaryEmbedding(SimpleNamespace):
    pass


@pytest.mark.parametrize(
    ("attn", "rotary", "says"),
    [
        (Attention(use_mla=True), RotaryEmbedding(is_neox_style=True), "multi-head latent attention"),
        (Attention(alibi_slopes=[1.0]), RotaryEmbedding(is_neox_style=True), "ALiBi"),
        (Attention(sliding_window=63), RotaryEmbedding(is_neox_style=True), "a sliding window"),
        (Attention(logits_soft_cap=30.0), RotaryEmbedding(is_neox_style=True), "a soft cap"),
        (Attention(sinks=[1.0]), RotaryEmbedding(is_neox_style=True), "attention sinks"),
        (Attention(attn_type="encoder_only"), RotaryEmbedding(is_neox_style=True), "of the type encoder_only"),
        (OtherAttention(), RotaryEmbedding(is_neox_style=True), "a kind of its own"),
        (Attention(), RotaryEmbedding(is_neox_style=False), "the rotary embedding RotaryEmbedding"),
        (Attention(), MRotaryEmbedding(is_neox_style=True), "the rotary embedding MRotaryEmbedding"),
    ],
)
def test_attention_that_cannot_be_learned_through(attn: Any, rotary: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"layer 3 has .*{says}.*; serve with adapt.preset last"):
        check_attention(SimpleNamespace(attn=attn, rotary_emb=rotary), "layer 3", 64)
    plain = SimpleNamespace(attn=Attention(sliding_window=64), rotary_emb=RotaryEmbedding(is_neox_style=True))
    check_attention(plain, "layer 3", 64)


@pytest.mark.parametrize(
    ("layers", "hf", "says"),
    [
        (9, {}, r"adapt.layers is 9, and the model has 8 layers; allowed: 1 to 8"),
        (3, {"sliding_window": 100}, "a sliding window of 100 tokens.*may be at most 1 here"),
        (8, {"layer_types": ["full_attention"] * 5 + ["sliding_attention"] + ["full_attention"] * 2, "sliding_window": 100},
         "sliding_attention in layer 5.*may be at most 3 here"),
    ],
)  # fmt: skip
def test_refused_before_the_model_is_loaded(layers: int, hf: dict[str, Any], says: str) -> None:
    config = parse_config({"adapt": {"layers": layers}}, "deep")
    with pytest.raises(ConfigError, match=says):
        support.check_layers(SimpleNamespace(num_hidden_layers=8, **hf), config, 1000)
    fits = parse_config({"adapt": {"layers": min(layers, 3) if hf.get("layer_types") else 1}}, "deep")
    support.check_layers(SimpleNamespace(num_hidden_layers=8, **hf), fits, 1000)
    if layers <= 8:
        support.check_layers(SimpleNamespace(num_hidden_layers=8, **hf), config, 100)


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_modules_that_are_not_adapted_have_no_slots(modules: tuple[str, ...]) -> None:
    """All layers are the default; what the names say is what the geometry, the tail and vLLM's LoRA agree on."""
    whole = parse_config({"adapt": {"modules": modules}}, "deep")
    expected = [f"model.layers.{i}.{PATHS[m]}.{m}" for i in range(8) for m in modules]
    assert support.adapted_modules(8, whole) == expected
    assert support.adapted_modules(1, whole) == expected[: len(modules)]
    half = parse_config({"adapt": {"modules": modules, "layers": 4}}, "deep")
    assert support.adapted_modules(8, half) == expected[4 * len(modules) :]
    named = SimpleNamespace(**dict.fromkeys(("o_proj", "gate_up_proj", "down_proj"), SimpleNamespace(punica_wrapper="p")))
    layer = LayerModules(
        None, None, named.o_proj, None, named.gate_up_proj, named.down_proj, {"o": "x.o", "gu": "x.gu", "d": "x.d"}
    )
    found = TailModules((layer,), None, None, whole.adapt.letters)
    assert found.names == [f"x.{LETTERS[m]}" for m in modules]
    assert found.punica == "p"


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_an_exported_adapter_is_what_is_served(tmp_path: Path, modules: tuple[str, ...]) -> None:
    """peft, with the adapter of a delta over two layers, says what the oracle says; and the adapter can be read back."""
    from peft import PeftModel

    folder = tiny_model("qwen3", tmp_path / "model", num_hidden_layers=3)
    config = config_of(2, modules, rate=0.03, chunk=256)
    oracle = Oracle(folder, config)
    ids = torch.randint(320, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    before = oracle.score(ids)
    oracle.learn(ids)
    geometry = Geometry.of(oracle.model.config, config.adapt)
    parts = [torch.cat([b[k] for k in LETTERS[m]]) for b in oracle.B for m in modules]
    deltas = dict(zip(geometry.shapes, parts, strict=True))
    assert all(tuple(x.shape) == geometry.shapes[name] for name, x in deltas.items())
    data = peft.adapter(deltas, peft.projections(geometry, torch.float32), geometry, str(folder), {})
    settings = peft.config(geometry, str(folder))
    found = peft.read_adapter(data, settings, geometry)
    assert all(torch.equal(found[name], x) for name, x in deltas.items())

    exported = tmp_path / "adapter"
    exported.mkdir()
    (exported / "adapter_model.safetensors").write_bytes(data)
    (exported / "adapter_config.json").write_text(json.dumps(settings))
    expected = oracle.score(ids)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(oracle.model, str(exported))(torch.tensor([ids])).logits[0, :-1]
    served = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    assert (served - expected).abs().max() < 1e-3
    assert (before - expected).abs().mean() > 0.05
