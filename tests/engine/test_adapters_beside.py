"""The preset `head` beside adapters of a user's own: a session learns on top of one, and is served with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL, NO_CACHE, Stage, running_ttt
from served import Documents, assert_same, logprobs
from transformers import AutoTokenizer

from vllm_ttt.config import parse_config
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.oracle import load_model
from vllm_ttt.eval.texts import read_texts

pytestmark = pytest.mark.engine

CONFIG: dict[str, Any] = {
    "adapt": {"preset": "head"}, "learn": {"chunk": 256}, "sessions": {"resident": 2}, "guard": {"every": 0}, **NO_CACHE,
}  # fmt: skip
READ: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0}}
#: Nats per token, float32 on either side.
TOLERANCE = 0.002


def merged(model: Path, folder: Path, name: str, seed: int) -> Any:
    """Save a random adapter of a model, and return the model with it."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(load_model(model, torch.float32), settings)  # type: ignore[arg-type]
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data.mul_(0.3)
    adapted.save_pretrained(folder / name)
    return adapted.merge_and_unload().requires_grad_(False)


def test_sessions_on_top_of_adapters(documents: Documents, stage: Stage, tmp_path: Path) -> None:
    on_top_of_adapters(MODEL, stage, tmp_path, documents["man_fr"][0][:300], documents["man_fr"][1][:120])


@pytest.mark.real
def test_the_same_with_the_real_model(real_model: Path, real_texts: Path, stage: Stage, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model, local_files_only=True)
    text, probe = (tokenizer.encode(document) for document in read_texts(real_texts)["vllm_models"][:2])
    on_top_of_adapters(real_model, stage, tmp_path, text[:300], probe[:120])


def on_top_of_adapters(model: Path, stage: Stage, folder: Path, text: list[int], probe: list[int]) -> None:
    """Two adapters with a session each, and one of the base model: each is served with its adapter and its delta, in one batch
    with the others, and nobody else is moved. Another model under the same session is refused."""
    stage.stop()
    models = {name: merged(model, folder, name, seed) for seed, name in enumerate(("style", "other"))}
    models["demo"] = load_model(model, torch.float32)
    loops = {name: HeadOracle(found, parse_config(CONFIG)) for name, found in models.items()}
    flags = ["--dtype", "float32", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"]
    flags += [f"{name}={folder / name}" for name in ("style", "other")]
    with running_ttt(folder / "served", CONFIG, flags, model) as served:

        def scores(name: str, session: str | None) -> torch.Tensor:
            return -torch.tensor(logprobs(served.complete(probe, session, model=name, prompt_logprobs=0, **READ)))

        before = {name: scores(name, None) for name in models}
        for name, reference in loops.items():
            assert (before[name] - reference.score(probe)).abs().max() < TOLERANCE
        bodies = [{"model": name, "prompt": text, "session_id": name, "max_tokens": 4, "temperature": 0} for name in models]
        assert [answer.status_code for answer in served.together(*bodies)] == [200] * 3
        for name, reference in loops.items():
            reference.learn(text)
            assert_same(served.delta(name), reference)
        together = [{**body, "prompt": probe, "prompt_logprobs": 0, "max_tokens": 1, **READ} for body in bodies]
        for name, answer in zip(loops, served.together(*together), strict=True):
            found = -torch.tensor(logprobs(answer.json()))
            assert (found - loops[name].score(probe)).abs().max() < TOLERANCE
            assert (found - before[name]).abs().max() > 0.01, "the delta does nothing: the comparison would prove nothing"
        for name in models:
            assert torch.equal(scores(name, None), before[name]), "who has no session is not moved"
        answer = served.post(probe, "style", model="other")
        assert answer.status_code == 409
        assert "session style has learned with the adapter style" in answer.text
        assert served.post(probe, "style").status_code == 409, "the base model is another, too"
        assert served.settle()["errors"] == 0
