"""The real model and its texts: what `make real` writes is whole, and is the model that the published figures are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from vllm_ttt.errors import ConfigError
from vllm_ttt.eval import real
from vllm_ttt.eval.demo import demo
from vllm_ttt.eval.texts import interactions, read_texts


@pytest.mark.unit
def test_texts_are_long_files_of_two_domains_cut_to_one_length(tmp_path: Path):
    vllm, out = tmp_path / "vllm", tmp_path / "real" / "texts"
    for folder, name, size in (("v1/worker", "a", 4501), ("v1", "b", 12_000), ("v1", "short", 4500), ("other", "c", 9000)):
        (vllm / folder).mkdir(parents=True, exist_ok=True)
        (vllm / folder / f"{name}.py").write_text(name * size if len(name) == 1 else "s" * size)
    (vllm / "model_executor" / "models").mkdir(parents=True)
    (vllm / "model_executor" / "models" / "m.py").write_text("m" * 5000)
    real.build_texts(vllm, out)
    found = read_texts(out)
    assert sorted(len(text) for text in found["vllm_v1"]) == [4501, 9000]
    assert found["vllm_models"] == ["m" * 5000]
    (vllm / "v1" / "b.py").unlink()
    real.build_texts(vllm, out)
    assert read_texts(out) == found, "a folder that exists is complete, and stays"


@pytest.mark.unit
def test_an_interrupted_folder_does_not_exist(tmp_path: Path):
    vllm = tmp_path / "vllm"
    (vllm / "v1").mkdir(parents=True)
    (vllm / "v1" / "a.py").write_text("a" * 5000)
    (vllm / "v1" / "b.py").mkdir()  # cannot be read: half of the work is done by then
    with pytest.raises(IsADirectoryError):
        real.build_texts(vllm, tmp_path / "texts")
    with pytest.raises(ConfigError, match="run `make real`"):
        real.build_model(tmp_path, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["vllm"]


@pytest.mark.unit
def test_a_demo_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(real, "MODEL", tmp_path / "absent")
    with pytest.raises(ConfigError, match="`make demo` in a checkout fetches it first"):
        demo(None, tmp_path / "out", None, keep=False, quick=True, console=Console(quiet=True))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        demo(str(tmp_path), tmp_path / "out", None, keep=False, quick=True, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_the_model_is_the_one_that_figures_are_of(real_model: Path, real_texts: Path):
    """Its loss on the first request of each domain, as an independent conversion of the same file measured it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(real_model, local_files_only=True, dtype=torch.float32)
    read = lambda text: tokenizer(text, verbose=False)["input_ids"]  # noqa: E731
    docs = {domain: [read(text) for text in found] for domain, found in read_texts(real_texts).items()}
    work, losses = interactions(docs, 1, 10), []
    for windows in work.windows:
        ids = torch.tensor(windows[0])
        with torch.no_grad():
            scores = model(ids[None, :-1]).logits[0].log_softmax(-1)
        losses.append(-scores[torch.arange(len(ids) - 1), ids[1:]][-768:].mean().item())
    assert dict(zip(work.domains, losses, strict=True)) == pytest.approx({"vllm_models": 2.394, "vllm_v1": 1.9425}, abs=0.002)


@pytest.mark.real
def test_the_model_chats(real_model: Path):
    """Template, tokenizer and weights fit together: a question has its answer, which ends by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(real_model, local_files_only=True, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
