"""The session's cache: the plain loop against its definition, the arrays against the plain loop, and what it never gives."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ttt.config import CACHE_SURE, CacheConfig, LearnConfig, TTTConfig
from vllm_ttt.eval.session_cache import SessionCache
from vllm_ttt.worker.ngrams import stream as streams
from vllm_ttt.worker.ngrams.index import BITS, HASH_BITS, Index
from vllm_ttt.worker.ngrams.mixing import mix
from vllm_ttt.worker.ngrams.ngrams import Indexes, NGrams, commit

pytestmark = pytest.mark.unit

ORDERS, VOCABULARY = 3, 6
CONFIG = TTTConfig(cache=CacheConfig(orders=ORDERS), learn=LearnConfig(chunk=16, min_chunk=1))
#: Few tokens, so that contexts come back; and where a request begins to be new to the session.
requests = st.lists(
    st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=40), st.integers(0, 3)), min_size=1, max_size=4
)


def losses_of(ids: list[int]) -> list[float]:
    return [0.2 + (7 * t + ids[t]) % 11 / 3 for t in range(1, len(ids))]


def tops_of(ids: list[int]) -> list[float]:
    """Losses of the model's first choices; now and then it is the token that is there."""
    return [min(loss, (5 * t + 3) % 8 / 4) for t, loss in enumerate(losses_of(ids))]


def learned(sent: list[tuple[list[int], int]], cache: SessionCache) -> SessionCache:
    for ids, start in sent:
        cache.learn(ids, losses_of(ids), tops_of(ids), start)
    return cache


class Fast:
    """Requests as the worker takes them in."""

    def __init__(self, config: TTTConfig = CONFIG):
        self.config, self.indexes = config, Indexes(1)
        self.ngrams = NGrams.fresh(config.cache.longest)

    def learn(self, ids: list[int], start: int = 0) -> list[tuple[float, float]]:
        """As `SessionCache.learn`."""
        text, losses, tops, found = np.array(ids, np.int32), np.array(losses_of(ids)), np.array(tops_of(ids)), []
        for first in range(start, len(losses), self.config.learn.chunk):
            last = min(first + self.config.learn.chunk, len(losses))
            chunk = text[max(0, first + 1 - streams.LONGEST) : last + 1]
            index = self.indexes.of(self.ngrams)
            said, limit = (losses[first:last], tops[first:last]), self.config.cache.tokens
            self.ngrams, known = commit(self.ngrams, index, chunk, last - first, *said, limit)
            found.append((known.loss, known.share))
        return found

    @property
    def index(self) -> Index:
        return self.indexes.of(self.ngrams)

    def served(self, logits: torch.Tensor, before: list[int]) -> torch.Tensor:
        """Log-probabilities after ``before``, where the model says ``logits``."""
        mixed = logits.clone()[None]
        mix(mixed, [0], [np.array(before[-streams.LONGEST :], np.int32)], self.index, self.ngrams.shares)
        return mixed[0].log_softmax(-1)


def followers(sent: list[tuple[list[int], int]], context: list[int]) -> Counter[int]:
    """What has followed ``context`` among the tokens that were learned, looked for in the text itself."""
    n = len(context)
    return Counter(ids[t] for ids, start in sent for t in range(max(n, start + 1), len(ids)) if ids[t - n : t] == context)


def by_definition(sent: list[tuple[list[int], int]], before: list[int], model: float, token: int) -> tuple[float, int]:
    """PPM-C over contexts of one token and more, above the model's probability; and the length of the longest that is known."""
    p, longest = model, 0
    for n in range(1, min(ORDERS, len(before)) + 1):
        seen = followers(sent, before[len(before) - n :])
        if not seen:
            break
        p, longest = (seen[token] + len(seen) * p) / (seen.total() + len(seen)), n
    return p, longest


@given(requests, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), st.floats(0, 1))
def test_the_plain_loop_is_the_definition(sent: list[tuple[list[int], int]], before: list[int], likeliest: float):
    cache = learned(sent, SessionCache(CONFIG))
    whole = 0.0
    for token in range(VOCABULARY):
        length, model, ours = cache.parts(tuple(before), token, 1 / VOCABULARY, likeliest)
        p, longest = by_definition(sent, before, 1 / VOCABULARY, token)
        assert length == longest
        if length:
            spoke = cache.experience[length - 1][[likeliest >= x for x in (*CACHE_SURE, 0)].index(True)]
            share = spoke[1] / sum(spoke)
            assert (model, ours) == pytest.approx(((1 - share) / VOCABULARY, share * p))
        whole += model + ours
    assert whole == pytest.approx(1)


@given(requests, st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), st.sampled_from([0.1, 1, 2, 4, 9]))
def test_the_arrays_are_the_plain_loop(sent: list[tuple[list[int], int]], before: list[int], sharp: float):
    cache, fast = SessionCache(CONFIG), Fast()
    for ids, start in sent:
        told = cache.learn(ids, losses_of(ids), tops_of(ids), start)
        assert fast.learn(ids, start) == [pytest.approx(x, rel=1e-9) for x in told]
    assert fast.ngrams.experience == pytest.approx(np.array(cache.experience), rel=1e-9)
    logits = sharp * torch.linspace(-2, 3, VOCABULARY)
    model = logits.softmax(-1).tolist()
    expected = [math.log(sum(cache.parts(tuple(before), token, p, max(model))[1:])) for token, p in enumerate(model)]
    assert fast.served(logits, before).tolist() == pytest.approx(expected, abs=1e-5)


@given(requests, st.integers(1, 30))
def test_the_oldest_go_first(sent: list[tuple[list[int], int]], limit: int):
    """What is left is what a cache would be that had been sent the last tokens alone."""
    cache, fast = SessionCache(CONFIG), Fast()
    config = CacheConfig.model_construct(orders=ORDERS, tokens=limit)
    cache.limit, fast.config = limit, CONFIG.model_copy(update={"cache": config})
    for ids, start in sent:
        cache.learn(ids, losses_of(ids), tops_of(ids), start)
        fast.learn(ids, start)
    assert fast.ngrams.tokens <= limit
    for ids, _ in sent:
        for t in range(1, len(ids)):
            before = tuple(ids[max(0, t - ORDERS) : t])
            contexts = cache.contexts(before)
            found = fast.index.followers(np.array(before, np.int32))
            assert found.length == len(contexts)
            assert found.tokens.tolist() == (sorted(contexts[0]) if contexts else [])


@given(requests, st.integers(1, 30))
def test_an_index_that_has_moved_is_the_one_that_is_made_anew(sent: list[tuple[list[int], int]], limit: int):
    fast = Fast(CONFIG.model_copy(update={"cache": CacheConfig.model_construct(orders=ORDERS, tokens=limit)}))
    for ids, start in sent:
        fast.learn(ids, start)
        if len(ids) - 1 <= start:
            continue  # nothing is learned
        moved, anew = fast.ngrams.index, Index(fast.ngrams.stream, ORDERS)
        assert moved is not None
        assert moved.keys.tolist() == anew.keys.tolist()
        assert moved.counts.tolist() == anew.counts.tolist()


@given(requests, st.data())
def test_no_token_is_known_before_it_was_scored(sent: list[tuple[list[int], int]], data: st.DataObject):
    """Another future changes nothing of what was served before it: a request is served by what was there when it came."""
    ids, _ = sent[-1]
    t = data.draw(st.integers(1, len(ids) - 1))
    rest = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(ids) - t, max_size=len(ids) - t))
    cache = learned(sent[:-1], SessionCache(CONFIG))
    same = [1.0] * (len(ids) - 1)
    one, two = cache.read(ids, same, same), cache.read(ids[:t] + rest, same, same)
    assert one[: t - 1] == two[: t - 1]


def test_only_what_followed_the_same_token_gains():
    """A token that was never sent after the last one keeps the model's logit to the bit."""
    fast = Fast()
    fast.learn([1, 2, 3, 1, 2, 3, 4])
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    mixed = logits.clone()[None]
    mix(mixed, [0], [np.array([1, 2], np.int32)], fast.index, fast.ngrams.shares)
    moved = (mixed[0] != logits).nonzero().flatten().tolist()
    assert moved == [3]
    assert mixed[0, 3] > logits[3]
    assert mixed[0].softmax(-1)[3] > logits.softmax(-1)[3]


def test_a_row_of_which_nothing_is_known_keeps_its_bits():
    fast = Fast()
    fast.learn([1, 2, 3])
    logits = torch.randn(2, VOCABULARY)
    mixed = logits.clone()
    mix(mixed, [1], [np.array([5, 4], np.int32)], fast.index, fast.ngrams.shares)
    assert torch.equal(mixed, logits)


def test_a_row_has_the_same_bits_beside_others_and_with_any_number_of_threads():
    """Two ranks whose threads are not as many sample the same token."""
    fast, before, threads = Fast(), np.array([1, 2], np.int32), torch.get_num_threads()
    fast.learn([1, 2, 3, 1, 2, 3, 4])
    logits = torch.randn(96, 50_000, generator=torch.Generator().manual_seed(0))
    together, alone = [], []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            mix(mixed := logits.clone(), range(96), [before] * 96, fast.index, fast.ngrams.shares)
            together.append(mixed[:, 3])
            mixed = logits.clone()
            for row in range(96):
                mix(mixed, [row], [before], fast.index, fast.ngrams.shares)
            alone.append(mixed[:, 3])
    finally:
        torch.set_num_threads(threads)
    assert not (together[0] == logits[:, 3]).any(), "the cache knows what comes"
    assert all(torch.equal(found, together[0]) for found in (*together, *alone))


def test_a_token_that_the_model_rules_out_is_said_where_the_session_said_it():
    fast = Fast()
    fast.learn([1, 2] * 8)
    logits = torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0])
    served = fast.served(logits, [1])
    assert served[2] > -20
    assert served.exp().sum() == pytest.approx(1)


def test_weights_follow_what_was_right():
    """Where the cache is right and the model is not, it is believed more with each request; where it is wrong, less."""
    right, wrong = Fast(), Fast()
    for i in range(4):
        right.learn([1, 2, 3, 4] * 8)
        wrong.learn([(i * t * t + t + i) % VOCABULARY for t in range(32)])
    shares = [np.array(x.shares)[-1] for x in (right.ngrams, wrong.ngrams, NGrams.fresh(ORDERS))]
    assert max(shares[0] / shares[2]) > 2
    assert max(shares[0] / shares[1]) > 2


def test_what_an_earlier_version_was_stays():
    fast = Fast()
    fast.learn([1, 2, 3, 4] * 4)
    before, was = fast.ngrams, fast.ngrams.stream.tolist()
    fast.learn([4, 3, 2, 1] * 4)
    assert before.stream.tolist() == was
    with pytest.raises(ValueError, match="read-only"):
        before.stream[0] = 1
    back, again = Fast(), Fast()
    back.ngrams = before
    again.learn([1, 2, 3, 4] * 4)
    back.learn([4, 4, 4])
    again.learn([4, 4, 4])
    assert back.ngrams.stream.tolist() == again.ngrams.stream.tolist()
    assert back.ngrams.to_state() == again.ngrams.to_state()


def test_a_chunk_that_goes_on_needs_no_context_of_its_own():
    """Chunks of one request lie behind one another; another request's begin with what came before them."""
    fast = Fast()
    fast.learn([*range(1, 6)] * 10)
    assert np.count_nonzero(fast.ngrams.stream == streams.BREAK) == 1
    assert fast.ngrams.tokens == 49
    fast.learn([1, 2, 3], start=1)
    assert fast.ngrams.stream[-4:].tolist() == [streams.BREAK, -3, -4, 3]


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=80), st.sets(st.integers(0, 79)))
def test_tokens_that_are_not_learned_leave_one_mark(ids: list[int], out: set[int]):
    """However many there are, as of an image; and what is known of the others is the same."""
    text = np.array([streams.BREAK if t in out else token for t, token in enumerate(ids)], np.int32)
    stream = streams.EMPTY
    for first in range(1, len(text), 16):
        chunk = text[first : first + 16]
        if (chunk != streams.BREAK).any():
            stream = streams.join(stream, text[max(0, first - streams.LONGEST) : first], chunk)
    cuts = stream == streams.BREAK
    assert not (cuts[1:] & cuts[:-1]).any()
    apart = np.where(np.arange(len(text)) == 0, -text - 2, text)
    known, plain = Index(stream, ORDERS), Index(np.where(text == streams.BREAK, streams.BREAK, apart), ORDERS)
    assert (known.keys.tolist(), known.counts.tolist()) == (plain.keys.tolist(), plain.counts.tolist())


def test_indexes_that_nobody_asks_for_are_given_back():
    indexes, some = Indexes(2), [NGrams.fresh(ORDERS) for _ in range(3)]
    for ngrams in some:
        indexes.of(ngrams)
    assert [ngrams.index is not None for ngrams in some] == [False, True, True]


def test_contexts_that_differ_do_not_meet():
    """Hashes of long contexts: the same tokens in another order are another context."""
    ids = np.random.default_rng(0).integers(0, 150_000, 5000).astype(np.int32)
    stream = streams.extend(streams.EMPTY, ids[:1], ids[1:], 10_000)
    index = Index(stream, 6)
    found = np.unique(index.keys >> np.uint64(BITS)) >> np.uint64(HASH_BITS)  # of each context its length
    for length in range(1, 7):
        contexts = {tuple(ids[t - length : t]) for t in range(length, len(ids))}
        assert np.count_nonzero(found == length) == len(contexts)
    turned = Index(streams.extend(streams.EMPTY, ids[:1], np.array([7, 8, 9, 5], np.int32), 100), 6)
    assert turned.followers(np.array([8, 7, 9], np.int32)).length == 1


def test_where_contexts_do_meet_the_shorter_ones_count():
    """Followers that the next shorter context does not have are another context's, of the same hash."""
    index, before = (
        Index(streams.extend(streams.EMPTY, np.array([1], np.int32), np.array([2, 3, 4], np.int32), 100), 3),
        [1, 2, 3],
    )
    assert index.followers(np.array(before, np.int32))[0] == 3
    index.keys[-1] += 1  # after three tokens came 5
    found = index.followers(np.array(before, np.int32))
    assert (found.length, found.tokens.tolist(), found.rest) == (2, [4], 0.25)


def test_a_file_that_is_no_cache_is_refused():
    config = CacheConfig(orders=2)
    with pytest.raises(ValueError, match="positive"):
        NGrams.revive(streams.EMPTY.copy(), [[[1.0, math.nan]] * 5], config)
    assert not streams.valid(np.array([5, -9, 1], np.int32), 7)
    assert streams.valid(np.array([5, -8, -1, 1], np.int32), 7)
    stream, fresh = np.array([-1, -3, 2, 2, 2], np.int32), NGrams.fresh(2).shares
    assert NGrams.revive(stream, [[[1.0, 3.0]] * 5], config).shares == [[0.75] * 5, fresh[1]]
    assert NGrams.revive(stream, [[[1.0, 3.0]] * 4], config).shares == fresh, "steps that are no longer those"
