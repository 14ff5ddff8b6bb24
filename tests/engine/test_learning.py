"""The engine beside the oracle: the same text leaves the same delta and the same losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from served import Documents, Served, assert_same, relative_error
from torch import nn

from vllm_ttt.config import TTTConfig
from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.worker.tail import step_dtype

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


def test_the_scale_is_the_oracles(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    """Five documents of one subject, then two of another: what is measured, chosen and served, request by request."""
    name, reference, frozen = exact.fresh(), oracle(), oracle()
    requests = [*documents["kjv"][:5], *documents["py_dns"][:2]]
    lengths = [1025, 1025, 900, 1029, 1025, 1025, 1025]
    scales, session = [], {}
    for text, length in zip(requests, lengths, strict=True):
        prompt = text[:length]
        served, pairs = reference.scale.served(prompt), length - 1
        start = (pairs - 8) // 256 * 256  # the last chunk of 8 or more
        rows = slice(start, min(start + 256, pairs), 2)
        expected = [o.score(prompt)[rows].mean().item() for o in (frozen, reference)]
        exact.complete(prompt, name)
        reference.learn(prompt)
        exact.settle()
        session = exact.session(name)
        chunk = session["losses"][-1]
        assert [chunk["frozen_loss"], chunk["served_loss"]] == pytest.approx(expected, abs=0.01)
        assert chunk["scale"] == pytest.approx(served, abs=0.02)
        assert session["scale"] == pytest.approx(reference.scale.chosen, abs=0.02)
        assert session["scale_served"] == min(session["scale"], session["scale_served"])
        assert exact.rpc("test_slot_is_master") == {"held": True, "equal": True}, "the slot holds that much of the master"
        scales.append(chunk["scale"])
    assert scales[4] > 0.8, "a subject of which it has learned is served with its delta"
    assert scales[5] < 0.3, "the first document of another subject is not"
    assert sum(c["frozen_loss"] is not None for c in session["losses"]) == 7, "once a request"
    assert [s["scale"] for s in session["scale_losses"]] == list(TTTConfig().learn.scales)


def test_a_scale_does_not_outlive_its_session(exact: Served, documents: Documents) -> None:
    name = exact.fresh()
    for text in documents["kjv"][:3]:
        exact.complete(text[:1025], name)
    exact.settle()
    assert exact.session(name)["scale"] != pytest.approx(0.625, abs=0.02)
    exact.http.post(f"/v1/ttt/sessions/{name}/reset").raise_for_status()
    session = exact.session(name)
    assert (session["scale"], {s["loss"] for s in session["scale_losses"]}) == (pytest.approx(0.625), {0.0})


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
    losses = [reference._step(h[rows], a[rows], targets[rows]) for rows in learned]
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
def test_bfloat16(server: Served, models: dict[torch.dtype, nn.Module], documents: Documents, domain: str) -> None:
    """In bfloat16 two implementations of the same forward differ by rounding, which the orthogonalised step magnifies. So
    the activations are held to float32 ones, and the step to the oracle's step on the activations that were served.
    """
    name, prompt = server.fresh(domain), documents[domain][0][:1025]
    server.rpc("test_watch", 1)
    server.complete(prompt, name)
    delta = server.delta(name)
    served = server.learned_rows(name)
    server.rpc("test_watch", 0)

    reference, plain = Oracle(models[torch.bfloat16], TTTConfig()), Oracle(models[torch.float32], TTTConfig())
    for mine, true in zip(served, plain.activations(prompt), strict=True):
        assert relative_error(mine, true[:-1]) < ROUNDINGS
        assert relative_error(mine[1:], true[:-2]) > 10 * ROUNDINGS, "one row too early is told from rounding"

    targets = torch.tensor(prompt[1:])
    losses = [reference._step(*(x[i : i + 256] for x in (*served, targets))) for i in range(0, 1024, 256)]
    assert_same(delta, reference)
    assert [c["loss"] for c in server.session(name)["losses"]] == pytest.approx(losses, abs=0.01)
