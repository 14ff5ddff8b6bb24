"""The preset `head` on models that no other preset serves: tiny random ones, over HTTP, beside stock vLLM and a plain loop."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import quantised
import torch
from conftest import MODEL, NO_CACHE, Stage, at_rest, running, running_ttt
from served import SCORED, Documents, Served, assert_same, logprobs, relative_error

from vllm_ttt.config import parse_config
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.oracle import load_model

pytestmark = pytest.mark.engine

#: Their first losses are those of noise.
LEARN: dict[str, Any] = {"chunk": 64, "max_loss": 2}
CONFIG: dict[str, Any] = {
    "adapt": {"preset": "head"}, "learn": LEARN, "sessions": {"resident": 2}, "guard": {"every": 4, "max_regression": 100},
    "schedule": {"tokens_per_step": 64}, **NO_CACHE,
}  # fmt: skip
FLAGS = ["--dtype", "float32"]
READ: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0}}
#: Nats per token, float32 on either side.
TOLERANCE = 0.002


def prompts(documents: Documents) -> list[list[int]]:
    return [documents[domain][0][:200] for domain in ("kjv", "py_dns", "man_fr")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE."""
    return families.write("moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def stocks(model: Path, documents: Documents, stage: Stage) -> list[list[float]]:
    """What stock vLLM answers: log-probabilities, each prompt alone."""
    stage.stop()
    with running(stage.folder / "stock-moe.log", "vllm.entrypoints.cli.main", FLAGS, {"VLLM_PLUGINS": ""}, model) as served:
        return [logprobs(served.complete(prompt, **SCORED)) for prompt in prompts(documents)]


@pytest.fixture(scope="module")
def serving(model: Path, stocks: Any, stage: Stage) -> Iterator[Served]:
    stage.stop()  # what starts another server stops this one, too
    stage.name, served = "moe", stage.running.enter_context(running_ttt(stage.folder / "moe", CONFIG, FLAGS, model))
    yield served
    stage.stop()


@pytest.fixture
def moe(serving: Served) -> Iterator[Served]:
    yield from at_rest(serving)


def loop(model: Any) -> HeadOracle:
    return HeadOracle(model, parse_config(CONFIG))


@pytest.fixture(scope="module")
def weights(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_model(model)


def test_same_text_same_delta_and_losses(moe: Served, weights: Any, documents: Documents) -> None:
    """Requests one after another: what is served, lost and learned."""
    reference, name, expected = loop(weights), moe.fresh(), []
    for text, length in zip(documents["kjv"], (300, 129, 40), strict=False):
        prompt = text[:length]
        scores = -torch.tensor(logprobs(moe.complete(prompt, name, prompt_logprobs=0)))
        assert (scores - reference.score(prompt)).abs().max() < TOLERANCE
        expected += reference.learn(prompt)
    assert_same(moe.delta(name), reference)
    session = moe.session(name)
    assert [c["loss"] for c in session["losses"]] == pytest.approx(expected, abs=TOLERANCE)
    assert session["version"] == reference.version == len(expected) == 8
    assert session["rate"] == pytest.approx(reference.rate, rel=1e-3)
    assert moe.rpc("test_slot_is_master") == {"held": True, "equal": True}
    again = documents["kjv"][0][:300]
    served, frozen = (-torch.tensor(logprobs(moe.complete(again, s, prompt_logprobs=0, **READ))) for s in (name, None))
    assert (served - reference.score(again)).abs().max() < TOLERANCE
    assert served.mean() < frozen.mean() - 0.1, "it has learned"


def test_base_requests_are_stocks(moe: Served, stocks: list[list[float]], documents: Documents) -> None:
    """Bit for bit: alone, when sessions have learned, and in one batch with rows of sessions."""
    found = [logprobs(moe.complete(prompt, **SCORED)) for prompt in prompts(documents)]
    assert found == stocks
    name, text = moe.fresh(), documents["man2"][0]
    moe.complete(text[:200], name)
    moe.settle()
    body: dict[str, Any] = {"model": "demo", "temperature": 0, **SCORED}
    for prompt, expected in zip(prompts(documents), stocks, strict=True):
        base, mine = moe.together({**body, "prompt": prompt}, {**body, "prompt": prompt, "session_id": name, **READ})
        assert max(abs(a - b) for a, b in zip(logprobs(mine.json()), expected, strict=True)) > 0.01, "the session has its own"
        assert logprobs(base.json()) == pytest.approx(expected, abs=1e-4)


def test_more_sessions_than_slots_at_once(moe: Served, weights: Any, documents: Documents) -> None:
    """Chunks of several sessions in one step, rows of several in one batch; each is its own."""
    names, texts = [moe.fresh("many") for _ in range(4)], [documents[d][1] for d in ("kjv", "man_fr", "py_dns", "man2")]
    bodies = [
        {"model": "demo", "prompt": text[:n], "max_tokens": 4, "temperature": 0, "session_id": name}
        for name, text, n in zip(names, texts, (200, 70, 129, 300), strict=True)
    ]
    assert [a.status_code for a in moe.together(*bodies)] == [200] * 4
    loops = []
    for name, body in zip(names, bodies, strict=True):
        loops.append(loop(weights))
        loops[-1].learn(body["prompt"])
        assert_same(moe.delta(name), loops[-1])
    probe = documents["legal_a"][0][:100]
    read = [{**body, "prompt": probe, "prompt_logprobs": 0, "max_tokens": 1, **READ} for body in bodies]
    for answer, reference in zip(moe.together(*read), loops, strict=True):
        scores = -torch.tensor(logprobs(answer.json()))
        assert (scores - reference.score(probe)).abs().max() < TOLERANCE
    assert moe.settle()["errors"] == 0


def test_a_session_reads_the_base_models_blocks(moe: Served, documents: Documents) -> None:
    """No key or value depends on the delta: what is read from the cache answers as what is computed."""
    name, prompt = moe.fresh(), documents["kjv"][5][:600]
    moe.complete(documents["kjv"][0][:300], name)
    moe.settle()
    moe.complete(prompt)
    warm = moe.complete(prompt, name, logprobs=5, **READ)
    cold = moe.complete(prompt, name, logprobs=5, prompt_logprobs=0, **READ)  # then vLLM reads nothing from the cache
    base = moe.complete(prompt, logprobs=5)
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == 512
    first, again, plain = (x["choices"][0]["logprobs"]["token_logprobs"][0] for x in (warm, cold, base))
    assert first == pytest.approx(again, abs=TOLERANCE)
    assert abs(first - plain) > 0.01


def test_the_guard_tries_what_is_served(moe: Served, weights: Any, documents: Documents) -> None:
    reference, frozen, name = loop(weights), loop(weights), moe.fresh()
    text = documents["man_fr"][3][:257]
    moe.complete(text, name)
    reference.learn(text)
    session = moe.tried(name)
    losses = [torch.cat([one.score(piece) for piece in moe.probe()]).mean() for one in (reference, frozen)]
    assert abs(losses[0] - losses[1]) > 0.002, "the delta does nothing: the comparison would prove nothing"
    assert session["probe_regression"] == pytest.approx((losses[0] - losses[1]).item(), abs=0.001)


def test_peft_loads_it(moe: Served, weights: Any, documents: Documents, tmp_path: Path) -> None:
    """A LoRA adapter of lm_head, of the newest version; and what a rollback leaves is what it was."""
    from peft import PeftModel

    name, probe = moe.fresh(), documents["man2"][3][:100]
    moe.complete(documents["man2"][0][:300], name)
    moe.settle()
    served = -torch.tensor(logprobs(moe.complete(probe, name, prompt_logprobs=0, **READ)))
    answer = moe.http.get(f"/v1/ttt/sessions/{name}/adapter", params={"format": "tar"})
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    adapted, ids = PeftModel.from_pretrained(weights, str(tmp_path)), torch.tensor([probe])
    try:
        with torch.no_grad():
            scores = adapted(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    finally:
        adapted.unload()
    assert (scores + served).abs().max() < TOLERANCE
    assert (loop(weights).score(probe) - served).abs().max() > 0.1, (
        "the delta changes nothing: the comparison would prove nothing"
    )
    assert moe.http.post(f"/v1/ttt/sessions/{name}/rollback", json={"version": 0}).status_code == 200
    back = -torch.tensor(logprobs(moe.complete(probe, name, prompt_logprobs=0, **READ)))
    assert (loop(weights).score(probe) - back).abs().max() < TOLERANCE


#: Name: the family, further flags, and how far what is served may be from transformers' own; None: it is in few bits.
OTHERS = {
    "gemma": ("gemma", FLAGS, TOLERANCE),
    "gpt_oss": ("gpt_oss", FLAGS, TOLERANCE),
    "glm4": ("glm4", FLAGS, TOLERANCE),
    "transformers": ("phi", FLAGS, TOLERANCE),
    "fp8": (None, ["--quantization", "fp8_per_channel", "--dtype", "bfloat16"], None),
    "int8": ("llama", FLAGS, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_family_learns(name: str, documents: Documents, stage: Stage, tmp_path: Path) -> None:
    """It answers, its loss falls, and its delta is the loop's: in INT8, of the states that were served; in FP8, which is not
    served in float32, it is compared with itself alone."""
    family, flags, tolerance = OTHERS[name]
    stage.stop()
    model, text = MODEL if family is None else families.write(family, tmp_path / "model"), documents["man_fr"][0][:257]
    if name == "int8":
        quantised.quantise(model, name, tmp_path / "dense")
    with running_ttt(tmp_path / "served", CONFIG, flags, model) as served:
        base = -torch.tensor(logprobs(served.complete(text, prompt_logprobs=0)))
        served.rpc("test_watch", 1)
        first = -torch.tensor(logprobs(served.complete(text, "s", prompt_logprobs=0)))
        delta, states = served.delta("s"), served.learned_states("s")
        second = -torch.tensor(logprobs(served.complete(text, "s", prompt_logprobs=0)))
        state = served.settle()
        assert torch.equal(base, first), "a fresh session is the base model"
        assert second.mean() < first.mean() - 0.02, "it has learned"
        assert torch.equal(-torch.tensor(logprobs(served.complete(text, prompt_logprobs=0))), base), "and nobody else has"
        assert (state["errors"], served.session("s")["version"]) == (0, 8)
    if name == "int8":
        reference, targets = loop(load_model(tmp_path / "dense")), torch.tensor(text[1:])
        # Without VNNI a CPU adds pairs of products in 16 bits, and what is larger is cut off: vLLM's own are off by 2 % there.
        exact = torch.cpu._is_vnni_supported()
        off = relative_error(states, reference.states(text)[:-1])
        assert off < 0.1 or not exact, "they are those of the model that was quantised"
        for y, t in zip(states.view(len(targets), -1).split(64), targets.split(64), strict=True):
            reference.step(y, t)
        assert_same(delta, reference)
    if tolerance is not None:
        reference = loop(load_model(model))
        assert (first - reference.score(text)).abs().max() < tolerance
        reference.learn(text)
        assert_same(delta, reference)
        assert (second - reference.score(text)).abs().max() < tolerance
