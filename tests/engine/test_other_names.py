"""Names that are special for the engine, over HTTP, beside a plain loop: one slice of a slot for gate and up; a language model
inside another, which sees images; layers in few bits."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from conftest import MODEL, NO_CACHE, Stage, running_ttt
from served import Documents, Served, assert_same, logprobs

from vllm_ttt.config import parse_config

pytestmark = pytest.mark.engine

LEARN: dict[str, Any] = {"chunk": 256, "max_loss": 2}
SESSIONS: dict[str, Any] = {"sessions": {"resident": 2}, "guard": {"every": 0}, "learn": LEARN, **NO_CACHE}
READ: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0}}
SHAPE: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 2048}
#: What stands for an image, four times each.
IMAGE = 8192


def test_phi_3_has_one_slice_for_gate_and_up(documents: Documents, stage: Stage, tmp_path: Path) -> None:
    """It answers from what it has learned, in several chunks, and its delta is the loop's."""
    stage.stop()
    shape = {**SHAPE, "head_dim": 32, "rope_parameters": twins.long_rope(32)}
    folder = twins.write("Phi3ForCausalLM", tmp_path / "model", **shape)
    for file in MODEL.glob("*token*.json"):
        shutil.copy(file, folder)
    config = {"adapt": {"preset": "last"}, **SESSIONS}
    reference, text = (
        twins.TwinLoop(twins.Theirs("Phi3ForCausalLM", folder), parse_config(config)),
        documents["man_fr"][0][:400],
    )
    with running_ttt(tmp_path / "served", config, ["--dtype", "float32"], folder) as served:
        base = logprobs(served.complete(text, prompt_logprobs=0))
        assert logprobs(served.complete(text, "s", prompt_logprobs=0)) == base, "a fresh session is the base model"
        delta = served.delta("s")
        second = logprobs(served.complete(text, "s", prompt_logprobs=0, **READ))
        assert logprobs(served.complete(text, prompt_logprobs=0)) == base
        assert served.rpc("test_slot_is_master") == {"held": True, "equal": True}
        assert served.settle()["errors"] == 0
    before, _ = reference.theirs.loss(reference.slot(), reference.A, text)
    reference.learn(text)
    assert_same(delta, reference)
    after, _ = reference.theirs.loss(reference.slot(), reference.A, text)
    assert before - after > 0.02, "it has learned"
    assert -torch.tensor(second).mean().item() == pytest.approx(after.item(), abs=0.002)


def llava(folder: Path) -> Any:
    """Write a tiny model that sees images of 28 x 28, and return its processor."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    twins.write("LlavaForConditionalGeneration", folder, {"image_token_index": IMAGE}, **{**SHAPE, "vocab_size": 8256})
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return processor


def picture(seed: int) -> Any:
    from PIL import Image

    pixels = torch.randint(256, (28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def look(served: Served, image: Any, text: str, session: str | None = None) -> dict[str, Any]:
    """The answer to a picture and a text."""
    data = io.BytesIO()
    image.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    body |= {"temperature": 0, "logprobs": True, "return_token_ids": True}
    answer = served.http.post("/v1/chat/completions", json=body | ({"session_id": session} if session else {}))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_language_model_that_sees_images(documents: Documents, stage: Stage, tmp_path: Path) -> None:
    """With `deep`, from the first layer on. What stands for an image is not learned, but what is said of it is; and the same
    words of another image are no history."""
    stage.stop()
    folder = tmp_path / "model"
    processor = llava(folder)
    text = processor.tokenizer.decode(documents["man_fr"][0][:120])
    config = parse_config(SESSIONS)
    reference = twins.TwinLoop(twins.Theirs("LlavaForConditionalGeneration", folder), config)
    with running_ttt(tmp_path / "served", SESSIONS, ["--dtype", "float32"], folder) as served:
        base = look(served, picture(0), text)
        for seed in (0, 1):
            answer = look(served, picture(seed), text, "s")
            ids = answer["prompt_token_ids"]
            assert ids.count(IMAGE) == 4
            pixels = processor.image_processor(picture(seed), return_tensors="pt")["pixel_values"].double()
            reference.learn(ids, [i for i, token in enumerate(ids) if token == IMAGE], pixel_values=pixels)
            assert_same(served.delta("s"), reference)
            session = served.session("s")
            assert session["version"] == seed + 1
            assert "history" not in session["tokens_skipped"]
        again = look(served, picture(0), text)
        assert again["choices"][0]["logprobs"] == base["choices"][0]["logprobs"], "nobody else has learned"
        assert look(served, picture(0), text, "s")["choices"][0]["logprobs"] != base["choices"][0]["logprobs"]
        assert served.settle()["errors"] == 0


def test_layers_in_eight_bits(documents: Documents, stage: Stage, tmp_path: Path) -> None:
    """The demo model in FP8 with `deep`: it learns, the log says how well its weights could be read, others do not change."""
    stage.stop()
    text = documents["man_fr"][0][:400]
    with running_ttt(
        tmp_path / "served", {**SESSIONS, "learn": {"chunk": 256}}, ["--quantization", "fp8_per_channel", "--dtype", "bfloat16"]
    ) as served:
        base = -torch.tensor(logprobs(served.complete(text, prompt_logprobs=0)))
        first = -torch.tensor(logprobs(served.complete(text, "s", prompt_logprobs=0)))
        state = served.settle()
        losses = [chunk["loss"] for chunk in served.session("s")["losses"]]
        second = -torch.tensor(logprobs(served.complete(text, "s", prompt_logprobs=0, **READ)))
        assert torch.equal(base, first), "a fresh session is the base model"
        assert losses[0] == pytest.approx(first[:256].mean().item(), abs=0.02), "the step's loss is that of what is served"
        assert second.mean() < first.mean() - 0.05, "it has learned"
        assert torch.equal(-torch.tensor(logprobs(served.complete(text, prompt_logprobs=0))), base)
        assert (state["errors"], served.session("s")["version"]) == (0, 2)
        assert "read the weights of 32 quantised layers through their products" in served.logged()
