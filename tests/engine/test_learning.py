"""The engine beside the oracle: the same text leaves the same delta and the same losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import config_of
from served import Documents, Served, assert_same, relative_error
from torch import nn

from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.worker.step.tail import step_dtype

pytestmark = pytest.mark.engine

CASES = [
    ("kjv", [1025]),
    ("py_dns", [1025, 1025]),
    ("man_fr", [257, 513, 257]),
    ("legal_a", [300]),  # a remainder of 43: rate and decay * 43 / 256
    ("py_networkx", [262]),  # a remainder of 5: not learned
    ("man2", [100, 40]),
]


@pytest.mark.parametrize(("domain", "lengths"), CASES)
def test_same_text_same_delta_and_losses(
    exact: Served, oracle: Callable[[], Oracle], documents: Documents, domain: str, lengths: list[int]
) -> None:
    reference, name, expected = oracle(), exact.fresh(domain), []
    for i, length in enumerate(lengths):
        prompt = documents[domain][i][:length]
        answer = exact.complete(prompt, name)
        assert answer["ttt"]["version"] == len(expected), "it is served with all that was learned before"
        expected += reference.learn(prompt)
    assert_same(exact.delta(name), reference)
    session = exact.session(name)
    assert [c["loss"] for c in session["losses"]] == pytest.approx(expected, abs=0.01)
    assert session["rate"] == pytest.approx(reference.rate, rel=1e-3)
    assert session["version"] == reference.version == len(expected)
    assert session["tokens_seen"] == sum(n - 1 for n in lengths)
    assert session["tokens_learned"] == reference.tokens["learned"]
    assert session["tokens_skipped"] == {k: v for k, v in reference.tokens.items() if v and k != "learned"}
    assert exact.rpc("test_slot_is_master") == {"held": True, "equal": True}


def test_served_with_what_was_learned(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    """What a learned session answers is what the oracle's delta says, and not what the base model says."""
    reference, name, text = oracle(), exact.fresh(), documents["kjv"][1]
    before = reference.score(text[600:700])
    exact.complete(text[:513], name)
    reference.learn(text[:513])
    answer = exact.complete(text[600:700], name, prompt_logprobs=0, vllm_xargs={"ttt_learn": 0})
    served = -torch.tensor([next(iter(p.values()))["logprob"] for p in answer["choices"][0]["prompt_logprobs"][1:]])
    expected = reference.score(text[600:700])
    assert (served - expected).abs().max() < 0.01
    assert (before - expected).abs().max() > 0.1


def test_the_rate_is_the_oracles(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    """Documents of one subject, of another, and one of them again, chunk by chunk. Every fourth is measured under the base
    model, too."""
    name, reference, frozen, measured = exact.fresh(), oracle(), oracle(), {}
    texts = [*documents["kjv"][:2], documents["py_dns"][0], documents["py_dns"][0]]
    first = exact.session(exact_fresh(exact, documents))["rate"]
    assert first == reference.rate
    for i, text in enumerate(texts):
        prompt = text[:1025]
        measured[4 * i] = frozen.score(prompt)[:256].mean().item()
        exact.complete(prompt, name)
        reference.learn(prompt)
        exact.settle()
        assert exact.session(name)["rate"] == pytest.approx(reference.rate, rel=1e-3)
    session = exact.session(name)
    losses = session["losses"]
    assert losses[-1]["rate"] == pytest.approx(session["rate"], abs=1e-7)
    assert losses[0]["rate"] == first, "there was no update before the first chunk"
    rates = [chunk["rate"] for chunk in losses]
    assert max(rates) > 1.2 * first or min(rates) < 0.8 * first, "it hardly moved: the comparison would prove nothing"
    assert {i: c["frozen_loss"] for i, c in enumerate(losses) if c["frozen_loss"] is not None} == pytest.approx(
        measured, abs=0.01
    )
    assert losses[0]["frozen_loss"] == pytest.approx(losses[0]["loss"], abs=1e-4), "a fresh session is the base model"
    assert losses[12]["loss"] < losses[12]["frozen_loss"] - 0.1, "a text that it has learned"
    assert_same(exact.delta(name), reference)
    exact.http.post(f"/v1/ttt/sessions/{name}/reset").raise_for_status()
    assert exact.session(name)["rate"] == first


def exact_fresh(exact: Served, documents: Documents) -> str:
    """A session that has learned nothing."""
    name = exact.fresh()
    exact.complete(documents["kjv"][0][:5], name)
    exact.settle()
    return name


@pytest.mark.parametrize("outputs", [300, 20, 4])
def test_the_answer_is_learned_where_asked(
    exact: Served, oracle: Callable[[], Oracle], documents: Documents, outputs: int
) -> None:
    """Prompt chunks, then output chunks: the first pair of the answer is the prompt's last position."""
    name, prompt = exact.fresh(), documents["man_fr"][0][:300]
    xargs = {"ttt_learn_output": 1}
    answer = exact.complete(
        prompt, name, max_tokens=outputs, ignore_eos=True, return_token_ids=True, temperature=1, seed=7, vllm_xargs=xargs
    )
    ids = prompt + answer["choices"][0]["token_ids"]
    assert len(ids) == 300 + outputs
    reference = oracle()
    h, a = reference.activations(ids)
    targets = torch.tensor(ids[1:])
    sizes = [(0, 256), (256, 299), *((s, min(s + 256, len(targets))) for s in range(299, len(targets), 256))]
    learned = [slice(*size) for size in sizes if size[1] - size[0] >= 8]
    losses = [reference.step(h[rows], a[rows], targets[rows], reference.nothing()) for rows in learned]
    assert_same(exact.delta(name), reference)
    session = exact.session(name)
    assert [c["loss"] for c in session["losses"]] == pytest.approx(losses, abs=0.01)
    learned_tokens = sum(rows.stop - rows.start for rows in learned)
    assert session["tokens_learned"] == answer["ttt"]["tokens_learned"] == learned_tokens
    assert session["tokens_seen"] == 299 + outputs
    assert session["tokens_skipped"] == ({"short": 4} if outputs == 4 else {})


HALF_PRODUCTS = step_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
OVER = pytest.mark.xfail(
    HALF_PRODUCTS,
    strict=True,
    reason="logits are rounded to bfloat16 in the step: the delta is 2.0 % (o) and 2.2 % (d) off",
)

#: The forward of the demo model rounds to bfloat16 about ten times in each of its six layers, by 2^-8 at most. Adding up at
#: random that is 3 %. Which kernels vLLM takes, and so where below this it ends, depends on the CPU: 0.5 to 1.0 % were seen.
ROUNDINGS = (6 * 10) ** 0.5 * 2**-8


@pytest.mark.parametrize("domain", ["kjv", "man_fr", "legal_a", pytest.param("py_dns", marks=OVER)])
def test_bfloat16(half: Served, models: dict[torch.dtype, nn.Module], documents: Documents, domain: str) -> None:
    """In bfloat16 two implementations of the same forward differ by rounding, which the orthogonalised step magnifies. So
    the activations are held to float32 ones, and the step to the oracle's step on the activations that were served.
    """
    name, prompt = half.fresh(domain), documents[domain][0][:1025]
    half.rpc("test_watch", 1)
    half.complete(prompt, name)
    delta = half.delta(name)
    served = half.learned_rows(name)
    half.rpc("test_watch", 0)

    config = config_of("half")
    reference, plain = Oracle(models[torch.bfloat16], config), Oracle(models[torch.float32], config)
    for mine, true in zip(served, plain.activations(prompt), strict=True):
        assert relative_error(mine, true[:-1]) < ROUNDINGS
        assert relative_error(mine[1:], true[:-2]) > 10 * ROUNDINGS, "one row too early is told from rounding"

    targets = torch.tensor(prompt[1:])
    h, a = served
    parts = [slice(i, i + 256) for i in range(0, 1024, 256)]
    losses = [reference.step(h[rows], a[rows], targets[rows], reference.nothing()) for rows in parts]
    assert_same(delta, reference)
    assert [c["loss"] for c in half.session(name)["losses"]] == pytest.approx(losses, abs=0.01)
