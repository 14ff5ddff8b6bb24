"""The filter: which characters are part of a match, in linear time; which tokens; and that they are not learned."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers.decoders
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_deep_scheduler import Engine
from test_worker_hooks import A, Hooks
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from vllm_ttt.automaton import Automaton
from vllm_ttt.config import LearnConfig, parse_config
from vllm_ttt.engine.limits.filter import Filter
from vllm_ttt.engine.limits.trust import Trust
from vllm_ttt.engine.prefix.history import History
from vllm_ttt.engine.requests import Attached, distinct, placeholders
from vllm_ttt.errors import ConfigError
from vllm_ttt.types import Knobs, RequestPlan

pytestmark = pytest.mark.unit

MODEL = Path(__file__).parents[2] / "demo" / "model"

#: Patterns over a few characters: of everything that is supported.
ATOMS = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\W", r"\d", r"\s", "-", "1", r"\b", r"\B", "^", "$", r"\A", r"\Z"]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        inner.map(lambda p: f"({p})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{,2}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        inner.map(lambda p: f"(?i:{p})"),
        inner.map(lambda p: f"(?s:{p})"),
    ),
    max_leaves=5,
)


def any_match(pattern: str, text: str) -> set[int]:
    """Characters of all matches of all lengths, by trying them all."""
    size, found = len(text), set[int]()
    for first in range(size):
        for end in range(first + 1, size + 1):
            if re.fullmatch(rf"(?s:.{{{first}}})(?:{pattern})(?s:.{{{size - end}}})", text):
                found |= set(range(first, end))
    return found


@given(PATTERNS, st.text("ab1B- \n", max_size=7))
def test_it_finds_what_python_finds(pattern: str, text: str) -> None:
    # Around `$` a line feed that ends the text is a place that fullmatch with something behind it cannot show.
    assume(not (text.endswith("\n") and "$" in pattern))
    found = Automaton([pattern]).covered(text)
    assert [i for first, end in found for i in range(first, end)] == sorted(any_match(pattern, text))
    assert all(first < end for first, end in found)
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(found))


def test_patterns_of_operators() -> None:
    patterns = [r"\b(?:\d[ -]?){13,16}\b", r"[\w.+-]+@[\w-]+\.[\w.]{2,20}", r"(?i)\bpassword\s*[:=]\s*\S+"]
    text = "Card 4111 1111 1111 1111, of bob@example.com. PassWord = hunter2 and 1234 5678.\n" * 2
    found = Automaton(patterns)
    expected = ["4111 1111 1111 1111", "bob@example.com.", "PassWord = hunter2"] * 2
    assert [text[a:b] for a, b in found.covered(text)] == expected
    assert [text[a:b] for a, b in found.covered(text)] == expected, "what it has learned of a text misleads it in no other"
    assert found.covered("nothing of the kind") == found.covered("") == []


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+c", "(.*a){12}c", "(a|b|ab)*c"])
def test_no_text_keeps_it_busy(pattern: str) -> None:
    """With re each of them takes longer than anybody waits."""
    assert Automaton([pattern]).covered("ab" * 5000 + "!") == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a)\1", "groupref is not supported"), ("(?=a)b", "assert is not supported"), ("(?<!a)b", "is not supported"),
        ("(?m)^a", "flags m"), ("(?m:^a)b", "flags m"), ("(", "no regular expression"),
        ("a{3000}", "too large"), ("(?:(?:a{99}){99}){99}", "too large"),
        ("x" * 501, "1 to 500 characters"), ("", "1 to 500 characters"), ("(?>a)b", "not supported"), ("a*+b", "not supported"),
    ],
)  # fmt: skip
def test_patterns_that_are_refused(pattern: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config({"learn": {"filter": ["a", pattern]}})


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(ConfigError, match="up to 64 patterns"):
        parse_config({"learn": {"filter": ["a"] * 65}})
    with pytest.raises(ConfigError, match="too large"):
        parse_config({"learn": {"filter": ["a{90}"] * 64}})
    assert parse_config({"learn": {"filter": ["a"] * 64}}).learn.filter == ("a",) * 64


def model_config() -> Any:
    from vllm.config import ModelConfig

    return ModelConfig(model=str(MODEL))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def vllm_model() -> Any:
    return model_config()


TEXT = "Write to bob@example.com, or to grüße@müller.example; the snowman ☃☃ says 12345678 and naïve 🧑‍🚀 no more."


@pytest.mark.parametrize("pattern", [r"\S+@\S+", r"\d+", "☃+", "🧑", "^W", r"more\.$", "nowhere", "o"])
def test_the_tokens_of_a_match_are_those_that_have_a_character_of_it(vllm_model: Any, tokenizer: Any, pattern: str) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    whole = tokenizer.decode(ids)
    left_out = {i + 1 for first, end in Filter([pattern], vllm_model).pairs(ids) for i in range(first, end)}
    spans = [m.span() for m in re.finditer(pattern, whole)]
    expected = set()
    for i in range(1, len(ids)):
        # The characters that this token completes or begins; those of a part of one are the whole.
        before, after = (tokenizer.decode(ids[:n]).rstrip("�") for n in (i, i + 1))
        end = len(after) if after != before else len(before) + 1
        if any(first < end and len(before) < last for first, last in spans):
            expected.add(i)
    assert left_out == expected
    assert bool(left_out) == (pattern not in ("nowhere", "^W") or 0 in expected)


def test_without_a_tokenizer_there_is_nothing_to_match() -> None:
    with pytest.raises(ConfigError, match="skip-tokenizer-init"):
        Filter(["a"], SimpleNamespace(skip_tokenizer_init=True))
    assert Filter([], None).pairs([1, 2, 3]) == []


def test_what_is_accepted_is_what_is_left(vllm_model: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    config = parse_config({"learn": {"filter": [r"\S+@\S+"], "min_chunk": 1}})
    trust = Trust(config, vllm_model)
    request: Any = SimpleNamespace(request_id="r", prompt_token_ids=ids, mm_features=[])
    session: Any = SimpleNamespace(open={})
    attached = Attached(request, session, Knobs(), True, 1, len(ids))
    attached.look_at(trust, ids, 0)
    out = sum(end - first for first, end in attached.filtered)
    assert out > 4
    assert attached.accepted(config.learn) == len(ids) - 1 - out
    attached.start = history = attached.filtered[0][1]
    attached.look_at(trust, ids, history)
    rest = sum(end - first for first, end in attached.filtered[1:])
    assert attached.accepted(config.learn) == len(ids) - 1 - history - rest, "what of it is history counts once"


def picture(offset: int, length: int, digest: str) -> Any:
    """As vLLM describes it in a request."""
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length), mm_hash=digest, identifier=digest)


def test_what_stands_for_an_image_is_left_out(vllm_model: Any, tokenizer: Any) -> None:
    """Together with what a pattern matches; and it does not count as a text that repeats itself."""
    ids = tokenizer(TEXT)["input_ids"]
    config = parse_config({"learn": {"filter": [r"\S+@\S+"], "min_chunk": 1}, "guard": {"min_ratio": 0.9}})
    trust, session = Trust(config, vllm_model), SimpleNamespace(open={})
    (first, end), *rest = trust.filter.pairs(ids)
    many = [5] * 200
    ids = ids[: first + 1] + many + ids[first + 1 :]
    request: Any = SimpleNamespace(request_id="r", prompt_token_ids=ids, mm_features=[picture(first + 1, 200, "a")])
    attached = Attached(request, session, Knobs(), True, 1, len(ids))  # type: ignore[arg-type]
    attached.look_at(trust, ids, 0)
    moved = [(a + 200, b + 200) for a, b in rest]
    assert attached.filtered == [(first, end + 200), *moved]
    assert attached.repetitive == []
    assert trust.repetitive(ids, 0) != [], "the tokens themselves would"
    request.mm_features = [picture(0, 3, "a"), picture(3, 1, "b")]
    assert placeholders(request) == [(0, 2), (2, 3)]


def test_another_image_is_another_prompt() -> None:
    """What a session has seen of the same words beside one image is no history beside another."""
    ids, history = [1, 2, 9, 9, 9, 3, 4, *range(10, 30)], History()
    one, same, other = (SimpleNamespace(mm_features=[picture(2, 3, digest)]) for digest in "aab")
    history.add_prompt(distinct(one, ids), 0, len(ids) - 1)  # type: ignore[arg-type]
    longer = [*ids, 31, 32]
    assert history.known(distinct(same, longer)) == len(ids) - 1  # type: ignore[arg-type]
    assert history.known(distinct(other, longer)) == 0  # type: ignore[arg-type]
    assert distinct(SimpleNamespace(mm_features=[]), ids) is ids  # type: ignore[arg-type]


def learned(filtered: list[tuple[int, int]], other_tokens: bool) -> tuple[torch.Tensor, list[tuple[str | None, int]], int]:
    """What a session's delta is after 40 pairs in chunks of 16, of which the next tokens of pairs 3 to 8 and 20 to 21 are
    others, or not; what was reported; its version."""
    worker = Hooks()
    if other_tokens:
        for first, end in ((3, 9), (20, 22)):
            worker.tokens[first:end] = (worker.tokens[first:end] + 1) % 8
    worker.trainer.start("a", RequestPlan(A, 41, True, False, filtered=filtered))
    worker.batch(("a", 0, 41))
    worker.backlog.finish("a", 40)
    version = worker.learn()[A]
    delta = torch.cat([x.flatten() for x in worker.trainer.deltas.read(A).delta.tensors()])
    return delta, [(c.skipped, c.tokens) for c in worker.trainer.take_report().chunks], version


def test_what_is_left_out_is_not_learned() -> None:
    """Whatever the tokens are that match, the delta is the same, bit for bit; and another one than without the filter."""
    out = [(3, 9), (20, 22)]
    one, report, version = learned(out, False)
    two, _, _ = learned(out, True)
    plain, _, _ = learned([], False)
    others, _, _ = learned([], True)
    assert torch.equal(one, two)
    assert not torch.equal(plain, others)
    assert not torch.equal(one, plain)
    assert report == [(None, 10), ("filter", 6), (None, 14), ("filter", 2), (None, 8)]
    assert version == 3


def test_a_chunk_of_which_nothing_is_left_is_no_commit() -> None:
    delta, report, version = learned([(0, 16), (30, 35)], False)
    assert sorted(report, key=str) == [("filter", 16), ("filter", 2), ("filter", 3), (None, 14), (None, 5)]
    assert version == 2
    assert delta.isfinite().all()


#: Ids that are no text: a byte that begins a character, the three of U+FFFD, an id beyond the vocabulary.
NO_TEXT = [[174], [174, 126, 124], [9000]]


class CountingStream:
    """A DecodeStream, and how many ids all of them have decoded."""

    decoded = 0

    def __init__(self, ids: Sequence[int] = (), skip_special_tokens: bool = False):
        self.real, self.held = DecodeStream(ids, skip_special_tokens), len(ids)

    def step(self, tokenizer: Tokenizer, token: int) -> str | None:
        self.held += 1
        CountingStream.decoded += self.held
        if piece := self.real.step(tokenizer, token):
            self.held = 1
        return piece


@pytest.mark.parametrize("ids", NO_TEXT)
def test_no_tokens_keep_it_busy(vllm_model: Any, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """DecodeStream decodes at each token all since it last said something; here each id is decoded a few times."""
    monkeypatch.setattr(tokenizers.decoders, "DecodeStream", CountingStream)
    monkeypatch.setattr(CountingStream, "decoded", 0)
    many = ids * (2000 // len(ids))
    assert Filter(["a"], vllm_model).pairs([*many, 67])
    assert len(many) <= CountingStream.decoded < 20 * len(many)


@given(st.text("aé☃漢字🧑\u200d🚀\ufffd \n", max_size=60))
@example("\ufffd" * 20 + "🧑☃a")
def test_pieces_are_what_the_tokenizer_says_as_it_goes_on(vllm_model: Any, tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    stream, found = DecodeStream(), Filter(["a"], vllm_model)
    pieces = [stream.step(tokenizer._tokenizer, token) for token in ids]
    silent = max((len([*run]) for no, run in itertools.groupby(pieces, lambda piece: piece is None) if no), default=0)
    said = found._pieces(ids)
    if silent < 16:
        assert said == pieces
    else:  # of what is no text there may be more
        plain, other = ([re.sub("\ufffd+", "\ufffd", piece) if piece else piece for piece in one] for one in (said, pieces))
        assert plain == other


@pytest.mark.parametrize("count", [*range(12, 18), 28])
@pytest.mark.parametrize("ids", NO_TEXT)
def test_a_character_that_comes_after_much_that_is_no_text_is_found(
    vllm_model: Any, tokenizer: Any, ids: list[int], count: int
) -> None:
    before, letters = (ids * count)[:count], tokenizer.convert_tokens_to_ids(["ð", "Ł", "§", "ĳ"])
    assert tokenizer.decode(letters) == "🧑"
    ((_, end),) = Filter(["🧑"], vllm_model).pairs([*before, *letters, 67])
    assert end == count + 3


def test_the_setting_is_off_by_default() -> None:
    assert LearnConfig().filter == ()


def test_bytes_that_are_no_text() -> None:
    """A client may send any ids. The tokenizers of Llama 2 and Mistral 7B spell unknown characters in bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581a": 256, "a": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = Filter(["aa"], SimpleNamespace(skip_tokenizer_init=False))
    found._tokenizer = SimpleNamespace(_tokenizer=tokenizer)
    for before in ([], [0xC3, 0xA9], [0xC3, 0xA9, 0xFF], [257, 0xC3, 0xA9, 0xFF, 0xFF]):
        ids = [*before, 0xC3, 0xA9, 257, 257]
        assert found.pairs(ids), "what comes after is found all the same"


@pytest.mark.parametrize("whole", [True, False])
def test_an_interleaved_prompt_is_not_cut_within_an_image(whole: bool) -> None:
    """Where the model attends within it both ways; all of the prompt is read all the same, as soon as it may be."""
    engine, chunk = Engine("last", learn={"interleave": True, "chunk": 16}), 16
    name = engine.send("a", list(range(1000, 1200)), learn=True)
    attached = engine.scheduler.ttt_requests[name]
    engine.scheduler.scheduler_config.disable_chunked_mm_input = whole
    images = [picture(10, 4, "a"), picture(20, 16, "b"), picture(36, 30, "c"), picture(96, 16, "d"), picture(190, 6, "e")]
    attached.request.mm_features = images
    read, ends = 0, []
    while read < 200:
        attached.session.open[name].done = read // chunk * chunk
        tokens = engine.scheduler._reserve_prefill_lookahead(attached.request, read, 200 - read)
        assert tokens > 0, "it goes on"
        ends.append(read := read + tokens)
    if whole:
        assert ends == [16, 20, 36, 66, 80, 96, 112, 128, 144, 160, 176, 190, 196, 200]
    else:
        assert ends == [16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 200]
