"""The kernels of worker/ngrams/mixing_cuda.py beside the host's mixing: test_mixing_cuda.py runs this file in Triton's
interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_ttt.config import CacheConfig, TTTConfig
from vllm_ttt.eval.session_cache import SessionCache
from vllm_ttt.worker.ngrams import stream as streams
from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.mixing import mix
from vllm_ttt.worker.ngrams.mixing_cuda import mix as mix_there
from vllm_ttt.worker.ngrams.ngrams import NGrams
from vllm_ttt.worker.ngrams.tables import Tables, places

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.*(invalid value|divide by zero|overflow).*")]

DEVICE = "cpu"
V = 900


def told(ids: list[int], orders: int, seed: int = 0) -> NGrams:
    """A session that has learned ``ids``, with weights of its own."""
    ngrams = NGrams.fresh(orders)
    experience = ngrams.experience * np.random.default_rng(seed).uniform(0.5, 2, ngrams.experience.shape)
    text = np.array(ids, np.int32)
    return NGrams(streams.extend(streams.EMPTY, text[:1], text[1:], 4000), experience)


def index_of(ngrams: NGrams) -> Index:
    return Index(ngrams.stream, len(ngrams.experience))


def text(seed: int, length: int, kinds: int) -> list[int]:
    """Of few kinds of tokens, so that contexts come back."""
    return np.random.default_rng(seed).integers(0, kinds, length).tolist()


def tables_of(sessions: list[NGrams], orders: int) -> Tables:
    tables = Tables(len(sessions), CacheConfig.model_construct(orders=orders, tokens=4000), torch.device(DEVICE))
    for key, ngrams in enumerate(sessions):
        assert tables.row(key, ngrams, index_of, ()) == key
    return tables


def mixed(logits: Tensor, rows: list[int], befores: list[list[int]], tables: Tables) -> Tensor:
    """``logits`` after the kernels; each row's tokens are a request of its own."""
    width = max(len(before) for before in befores) + 3
    tokens = torch.full((len(rows), width), 7, dtype=torch.int32)
    for i, before in enumerate(befores):
        tokens[i, : len(before)] = torch.tensor(before)
    positions = torch.tensor([len(before) - 1 for before in befores])
    found, states = logits.clone().to(DEVICE), list(range(len(rows)))[::-1]
    # In another order, and not all of them: a batch has others, too.
    order = 2 * torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    lying = torch.full((2 * len(rows),), -9)
    lying[order] = positions
    where = places(tables, rows, states)
    mix_there(found, where, order.to(DEVICE), lying.to(DEVICE), tokens.flip(0).to(DEVICE), tables)
    return found.cpu()


def by_the_host(logits: Tensor, rows: list[int], befores: list[list[int]], sessions: list[NGrams]) -> Tensor:
    found = logits.clone()
    for i, (row, before) in enumerate(zip(rows, befores, strict=True)):
        if row >= 0:
            last = np.array(before[-streams.LONGEST :], np.int32)
            mix(found, [i], [last], index_of(sessions[row]), sessions[row].shares)
    return found


@pytest.mark.parametrize(("orders", "sharp"), [(1, 3), (2, 0.5), (3, 12), (6, 3), (8, 6)])
def test_the_mixture_is_the_hosts(orders: int, sharp: float) -> None:
    """Several sessions and rows without one; contexts that are known in part, wholly, and not at all; short and long ones."""
    ids = [text(0, 700, 5), text(1, 900, 40) + text(2, 2000, V), text(3, 300, 12)]
    sessions = [told(x, orders, seed) for seed, x in enumerate(ids)]
    befores = [ids[0][:1], ids[0][100:130], ids[1][37:40], ids[1][1000:1100], [*ids[1][1500:1503], 3, 2], [V - 1, 899, 898],
               ids[2][5:25], ids[2][7:9], ids[2][50:60], ids[0][:200]]  # fmt: skip
    rows = [0, 0, 1, 1, 1, 2, 2, 2, -1, 0]
    logits = sharp * torch.randn(len(rows), V, generator=torch.Generator().manual_seed(orders))
    found, expected = mixed(logits, rows, befores, tables_of(sessions, orders)), by_the_host(logits, rows, befores, sessions)
    assert torch.allclose(found, expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(found, logits, atol=0.1), "nothing was mixed in: the comparison would prove nothing"
    assert torch.equal(found[8], logits[8])
    assert torch.equal(found[5], logits[5]), "nothing is known after a token that was never sent"
    assert torch.equal((found - logits).abs() > 0.01, (expected - logits).abs() > 0.01)


def test_a_token_with_more_followers_than_one_program_takes() -> None:
    ids = [x for follower in range(1, V) for x in (0, follower)]
    session = told(ids * 2, 3)
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    befores = [[0], [3, 0]]
    found = mixed(logits, [0, 0], befores, tables_of([session], 3))
    assert torch.allclose(found, by_the_host(logits, [0, 0], befores, [session]), atol=2e-5)
    assert int((found[0] != logits[0]).sum()) > 850


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_stay_in_their_dtype(dtype: torch.dtype) -> None:
    """What moves is rounded as the model's logits are; what does not move keeps its bits."""
    ids = text(4, 600, 6)
    session, befores = told(ids, 6), [ids[40:60], ids[90:100], [1]]
    logits = (4 * torch.randn(3, V, generator=torch.Generator().manual_seed(1))).to(dtype)
    found, expected = mixed(logits, [0, -1, 0], befores, tables_of([session], 6)), logits.float()
    expected = by_the_host(expected, [0, -1, 0], befores, [session])
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(found[1], logits[1])
    assert torch.equal(found[:, 6:], logits[:, 6:])


def test_a_token_that_the_model_rules_out() -> None:
    ids = text(5, 500, 4)
    session, logits = told(ids, 4), torch.randn(1, V)
    logits[0, 2] = -torch.inf
    at = next(t for t in range(300, 500) if ids[t] == 2)
    found = mixed(logits, [0], [ids[at - 8 : at]], tables_of([session], 4))
    assert torch.allclose(found, by_the_host(logits, [0], [ids[at - 8 : at]], [session]), atol=2e-5)
    assert found[0, 2] > -20


def test_the_plain_loop_says_the_same() -> None:
    """A session that learned by the oracle's rules; token by token of a text that repeats a part of it."""
    config = TTTConfig(cache=CacheConfig(orders=6))
    cache, ids = SessionCache(config), text(6, 600, 30)
    even = [3.0] * (len(ids) - 1)
    cache.learn(ids, even, even)
    ngrams = NGrams(streams.extend(streams.EMPTY, np.array(ids[:1], np.int32), np.array(ids[1:], np.int32), 4000),
                    np.array(cache.experience))  # fmt: skip
    request = text(7, 10, 30) + ids[200:260]
    logits = 3 * torch.randn(len(request) - 1, V, generator=torch.Generator().manual_seed(2))
    befores = [request[:t] for t in range(1, len(request))]
    found = mixed(logits, [0] * len(befores), befores, tables_of([ngrams], 6)).log_softmax(-1)
    model = logits.log_softmax(-1)
    losses = [-model[t, token].item() for t, token in enumerate(request[1:])]
    expected = cache.read(request, losses, (-model.amax(-1)).tolist())
    assert [-found[t, token].item() for t, token in enumerate(request[1:])] == pytest.approx(expected, abs=1e-4)
    assert sum(expected) < sum(losses) - 20


def test_a_row_is_written_when_the_session_has_moved_and_given_back_when_it_is_needed() -> None:
    config, ids = CacheConfig.model_construct(orders=3, tokens=4000), text(8, 200, 9)
    tables, one, two = Tables(2, config, torch.device(DEVICE)), told(ids, 3), told(ids[:50], 3, 1)
    built: list[NGrams] = []

    def building(ngrams: NGrams) -> Index:
        built.append(ngrams)
        return index_of(ngrams)

    assert [tables.row(5, x, building, ()) for x in (one, one, two, two)] == [0, 0, 0, 0]
    assert built == [one, two], "what is there is not written again"
    assert int(tables.sizes[0]) == len(index_of(two).keys)
    assert tables.row(6, one, building, ()) == 1
    assert tables.row(7, one, building, {5}) == 1, "the row of the session that was not to be kept"
    tables.drop(5)
    assert not tables.keys[0].any(), "something of a session that is gone stayed behind"
    assert tables.row(8, two, building, ()) == 0
