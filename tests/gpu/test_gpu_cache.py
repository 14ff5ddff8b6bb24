"""The session's own cache on CUDA: the kernels compiled, and model runner V2 with asynchronous scheduling and CUDA graphs.

The engine runs in this process, so that requests that are handed over together are one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEMO = Path(__file__).parents[2] / "demo"
CONFIG: dict[str, Any] = {"guard": {"every": 0}, "sessions": {"resident": 4}}
#: Uses a session and leaves it as it is, with and without its cache.
LOOK, WITHOUT = {"ttt_learn": 0}, {"ttt_learn": 0, "ttt_cache": 0}


@pytest.mark.parametrize(("orders", "sharp"), [(1, 3), (2, 0.5), (3, 12), (6, 3), (6, 12), (8, 6)])
def test_the_mixture_is_the_hosts(orders: int, sharp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case of tests/unit/mixing_cases.py, compiled; so are the next ones."""
    import mixing_cases

    monkeypatch.setattr(mixing_cases, "DEVICE", "cuda")
    mixing_cases.test_the_mixture_is_the_hosts(orders, sharp)


def test_the_kernels_do_what_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixing_cases as cases

    monkeypatch.setattr(cases, "DEVICE", "cuda")
    cases.test_a_token_with_more_followers_than_one_program_takes()
    cases.test_a_token_that_the_model_rules_out()
    cases.test_the_plain_loop_says_the_same()
    cases.test_a_row_is_written_when_the_session_has_moved_and_given_back_when_it_is_needed()
    for dtype in (torch.bfloat16, torch.float16):
        cases.test_logits_stay_in_their_dtype(dtype)


def test_what_a_step_says_of_the_likeliest_tokens() -> None:
    """The cache's weights learn from it, also where the step is replayed from a graph."""
    from vllm_ttt.worker.step import pointwise

    logits, targets = 3 * torch.randn(70, 151936), torch.randint(0, 151936, (70,))
    low = logits.bfloat16()
    top, other = torch.empty(70, device="cuda"), torch.empty(70)
    found = pointwise.nll(low.cuda(), targets.cuda(), 1.0, None, False, top)
    expected = pointwise.nll(low.float(), targets, 1.0, None, False, other)
    assert torch.allclose(found.cpu(), expected, atol=1e-3)
    assert torch.allclose(top.cpu(), other, atol=1e-3)


class Engine:
    def __init__(self) -> None:
        from vllm import LLM

        import vllm_ttt
        from vllm_ttt.eval.texts import read_texts

        self.llm = LLM(
            model=str(DEMO / "model"), max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=512,
            kv_cache_memory_bytes=2**29, gpu_memory_utilization=0.15, enable_prefix_caching=False,
            **vllm_ttt.engine_args(config=CONFIG),
        )  # fmt: skip
        tokenizer, texts = self.llm.get_tokenizer(), read_texts(DEMO / "texts")
        self.texts = {name: [tokenizer.encode(x, add_special_tokens=False) for x in found[:4]] for name, found in texts.items()}

    def run(self, *requests: tuple[list[int], str | None, dict[str, int]], tokens: int = 1) -> list[Any]:
        """(prompt, session, knobs) of requests that are one batch, greedy; their outputs."""
        from vllm import SamplingParams

        prompts, params = [], []
        for prompt, session, knobs in requests:
            asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, prompt_logprobs=1)
            asked.extra_args, asked.detokenize = None if session is None else {"session_id": session, **knobs}, False
            prompts.append({"prompt_token_ids": prompt})
            params.append(asked)
        return self.llm.generate(prompts, params, use_tqdm=False)

    def read(self, prompt: list[int], session: str | None, knobs: dict[str, int]) -> tuple[list[float], list[float]]:
        """Losses of a prompt's tokens, and of the model's first choices."""
        return losses(self.run((prompt, session, knobs))[0])

    def errors(self) -> int:
        return self.llm.collective_rpc("ttt_status")[0]["errors"]


def losses(output: Any) -> tuple[list[float], list[float]]:
    pairs = list(zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))
    return [-said[token].logprob for token, said in pairs], [-max(x.logprob for x in said.values()) for _, said in pairs]


def sampled(output: Any) -> list[float]:
    """Losses of the tokens of an answer."""
    answer = output.outputs[0]
    return [-said[token].logprob for token, said in zip(answer.token_ids, answer.logprobs, strict=True)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        made = Engine()
        assert made.llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        yield made
        assert made.errors() == 0


@pytest.fixture(scope="module")
def told(engine: Engine) -> tuple[str, list[int]]:
    """A session that was sent a text, read in two steps, and the text."""
    text = engine.texts["legal_a"][3][:700]
    engine.run((text, "told", {}))
    engine.read(text, "told", LOOK)  # waits until it has been learned
    return "told", text


def test_what_is_reported_is_what_the_oracle_says(engine: Engine) -> None:
    """Requests of one session, each scored before it is learned; the third shares a passage with the first."""
    from vllm_ttt.config import parse_config
    from vllm_ttt.eval.session_cache import SessionCache

    cache, name, gained = SessionCache(parse_config(CONFIG)), "oracle", 0.0
    first, second, third = (x[:700] for x in engine.texts["legal_a"][:3])
    for prompt in (first, second, third[:200] + first[100:500]):
        bare, (found, _) = engine.read(prompt, name, WITHOUT), engine.read(prompt, name, LOOK)
        expected = cache.read(prompt, *bare)
        assert fmean(found) == pytest.approx(fmean(expected), abs=0.005)
        assert found == pytest.approx(expected, abs=0.25), "token by token; logits are rounded to bfloat16"
        gained = fmean(bare[0]) - fmean(found)
        engine.run((prompt, name, {}))
        cache.learn(prompt, *bare)
    assert gained > 0.1, "the cache hardly did anything: the comparison would prove nothing"


def test_tokens_are_sampled_from_what_is_reported(engine: Engine, told: tuple[str, list[int]]) -> None:
    """An answer's log-probabilities are those of the same tokens in a prompt: what was sampled is looked up when the host does
    not know it yet."""
    name, text = told
    output = engine.run((text[:300], name, LOOK), tokens=60)[0]
    ids = text[:300] + list(output.outputs[0].token_ids)
    as_prompt, without = (engine.read(ids, name, x)[0][-60:] for x in (LOOK, WITHOUT))
    found = sampled(output)
    assert fmean(abs(a - b) for a, b in zip(found, as_prompt, strict=True)) < 0.08
    assert fmean(abs(a - b) for a, b in zip(found, without, strict=True)) > 0.1, "without a cache it would be the same"


def test_base_rows_keep_their_bits_beside_a_cache(engine: Engine, told: tuple[str, list[int]]) -> None:
    """The same batch twice: with the cache of the session, and without."""
    name, text = told
    others = [engine.texts["man_fr"][0][:90], engine.texts["kjv"][0][:140]]
    found = []
    for knobs in (LOOK, WITHOUT, LOOK):
        outputs = engine.run((text[:120], name, knobs), (others[0], None, {}), (text[50:250], name, knobs),
                             (others[1], None, {}), (others[0], "empty", LOOK), tokens=40)  # fmt: skip
        found.append([(losses(x), sampled(x), list(x.outputs[0].token_ids)) for x in outputs])
    for row in (1, 3, 4):
        assert found[0][row] == found[1][row] == found[2][row]
    for row in (0, 2):
        assert found[0][row] == found[2][row], "the batch is not the same each time: the comparison would prove nothing"
        assert sum(found[0][row][0][0]) < sum(found[1][row][0][0]) - 5


def test_another_session_knows_nothing_of_it(engine: Engine, told: tuple[str, list[int]]) -> None:
    name, text = told
    mine, other, base = (engine.read(text, session, LOOK)[0] for session in (name, "nobody", None))
    assert fmean(mine) < fmean(base) - 0.1
    assert fmean(other) == pytest.approx(fmean(base), abs=0.005)


def test_what_is_learned_while_others_decode(engine: Engine) -> None:
    """Sessions that learn their answers, together: each cache moves while it is served, and is the oracle's in the end."""
    texts = [engine.texts[name][1][:200] for name in ("man_fr", "kjv", "py_dns", "legal_a")]
    for _ in range(3):
        engine.run(*[(x, f"busy-{i}", {"ttt_learn_output": 1}) for i, x in enumerate(texts)], tokens=150)
    for i, x in enumerate(texts):
        (found, _), (bare, _) = engine.read(x, f"busy-{i}", LOOK), engine.read(x, f"busy-{i}", WITHOUT)
        assert fmean(found) < fmean(bare) - 0.01
