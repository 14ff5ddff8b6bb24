"""A drafter that reads the model's last hidden state, beside the preset `head`: it never sees a delta."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import MODEL, Stage, at_rest, running_ttt
from safetensors.torch import save_file
from served import Documents, Served, assert_same
from test_drafts import FLAGS, HEAD, LEARN_ALL, READ, TOLERANCE, accepted, answered, pairs_of
from torch import nn

from vllm_ttt.config import parse_config
from vllm_ttt.eval.head_oracle import HeadOracle

pytestmark = pytest.mark.engine

PROBE = 300


def write_drafter(folder: Path) -> Path:
    """An EAGLE head of the demo model: it says what the model said last, moved a little by attention of its own."""
    config = json.loads((MODEL / "config.json").read_text()) | {"num_hidden_layers": 1, "model_type": "llama"}
    D, F, heads, groups, width = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (heads * width, D), "self_attn.k_proj": (groups * width, D),
        "self_attn.v_proj": (groups * width, D),
        "self_attn.o_proj": (D, heads * width), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
    }  # fmt: skip
    tensors = {f"layers.0.{k}.weight": 0.02 * torch.randn(shape, generator=draw) for k, shape in shapes.items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(D)
    tensors["fc.weight"] = torch.cat((torch.zeros(D, D), torch.eye(D)), 1)  # of the embedding, and the state
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    for file in MODEL.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    drafter = write_drafter(tmp_path_factory.mktemp("drafter") / "eagle")
    return [*FLAGS, json.dumps({"method": "eagle", "model": str(drafter), "num_speculative_tokens": 3})]


@pytest.fixture(scope="module")
def prompts(documents: Documents) -> list[list[int]]:
    """The model goes on as they end, and the drafter guesses that."""
    return [documents[domain][0][:100] + [token] * (PROBE - 100) for domain, token in (("man_fr", 130), ("py_dns", 105))]


def rounds(served: Served, prompts: list[list[int]]) -> list[tuple[list[float], float]]:
    """Log-probabilities of each prompt's answer, read from the cache, and how many drafts were accepted for it."""
    found = []
    for prompt in prompts:
        served.complete(prompt)
        before, (_, scores) = accepted(served), answered(served, prompt, None, 60)
        found.append((scores, accepted(served) - before))
    return found


@pytest.fixture(scope="module")
def drafting(flags: list[str], stage: Stage) -> Iterator[Served]:
    stage.stop()
    stage.name = "eagle"
    yield stage.running.enter_context(running_ttt(stage.folder / "eagle", HEAD, flags))
    stage.stop()


@pytest.fixture
def eagle(drafting: Served) -> Iterator[Served]:
    yield from at_rest(drafting)


def test_the_drafters_keys_hold_no_delta(eagle: Served, prompts: list[list[int]], documents: Documents) -> None:
    """A session that has learned reads the prompts. Who has no session then gets the blocks that it filled, the drafter's among
    them: the bits, and as many accepted drafts, as from blocks of the base model's own."""
    own, name = rounds(eagle, prompts), eagle.fresh()
    assert sum(count for _, count in own) > 5, "no draft was accepted: nothing was proven"
    eagle.complete(documents["kjv"][0][:600], name)
    eagle.settle()
    assert eagle.http.post("/reset_prefix_cache").status_code == 200
    for prompt in prompts:
        read = eagle.complete(prompt, name, max_tokens=20, vllm_xargs=READ)
        assert not (read["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")
    assert rounds(eagle, prompts) == own


def test_it_learns_and_answers(
    eagle: Served, models: dict[torch.dtype, nn.Module], prompts: list[list[int]], documents: Documents
) -> None:
    """Prompt and answer; and each row that was drafted is served with the delta."""
    reference, name, count = HeadOracle(models[torch.float32], parse_config(HEAD)), eagle.fresh(), accepted(eagle)
    ids, _ = answered(eagle, documents["man_fr"][0][:300], name, 100, **LEARN_ALL)
    y, targets = reference.states(ids), torch.tensor(ids[1:])
    for rows in pairs_of(300, 100, 64):
        reference.step(y[rows], targets[rows])
    assert_same(eagle.delta(name), reference)
    base, moved = HeadOracle(models[torch.float32], parse_config(HEAD)), 0.0
    for prompt in (prompts[1], documents["man_fr"][1][:PROBE]):
        ids, scores = answered(eagle, prompt, name, 60, **READ)
        assert (reference.score(ids)[PROBE - 1 :] + torch.tensor(scores)).abs().max() < TOLERANCE
        moved = (base.score(ids)[PROBE - 1 :] + torch.tensor(scores)).abs().max()
    assert moved > 0.02, "the delta says nothing: nothing was proven"
    assert accepted(eagle) > count, "no draft was accepted: nothing was proven"
    assert eagle.settle()["errors"] == 0
