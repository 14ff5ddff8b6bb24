"""The session's cache in the worker: it learns what the delta learns, when the delta does, and goes where the delta goes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from test_worker_compute import D, F, Q, R, V, make

from vllm_ttt.config import CacheConfig, TTTConfig, parse_config
from vllm_ttt.engine.counts import EngineCounts
from vllm_ttt.engine.ledger import Session
from vllm_ttt.errors import ConfigError
from vllm_ttt.geometry import Geometry
from vllm_ttt.types import ChunkReport, FileOrder, Knobs, RequestPlan, SessionKey
from vllm_ttt.worker import memory
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import BEFORE, Rows, view_v1, view_v2
from vllm_ttt.worker.deltas import delta_file
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.files import Files
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.ngrams import stream as streams
from vllm_ttt.worker.serve.slots import Slots

pytestmark = pytest.mark.unit

CHUNK = 16
A, B = 7, 8


def config(**cache: Any) -> TTTConfig:
    return parse_config(
        {
            "adapt": {"layers": 1, "rank": R, "modules": ("o_proj", "gate_up_proj", "down_proj")},
            "learn": {"chunk": CHUNK, "min_chunk": 1, "max_loss": 2.0, "rate": 0.01},
            "guard": {"every": 0},
            "sessions": {"version_every": 1, "keep_versions": 9},
            "cache": {"orders": 4, **cache},
        }
    )


class Worker:
    """The trainer and its files, on a model of one layer; vLLM's slots are left out."""

    def __init__(self, rows: int = 3, **cache: Any):
        self.config = config(**cache)
        tail = make().tail
        self.h, self.a = torch.zeros(8 * CHUNK, D), torch.zeros(8 * CHUNK, Q)
        self.backlog, self.deltas = Backlog(16, CHUNK, 1, self.h, self.a), Deltas(tail, rows, 0.01)
        slots: Any = SimpleNamespace(drop=lambda _: None, holds=lambda _: False, deltas=self.deltas)
        slots.write = lambda key, session: Slots.write(slots, key, session)
        self.trainer = Trainer(tail, self.config, self.backlog, self.deltas, slots, Probe(1, self.h, self.a))
        geometry = Geometry(0, R, 0, D, Q, F, modules=self.config.adapt.modules)
        self.files = Files(self.trainer, geometry, "tiny", cache=self.config.cache)

    def begin(self, name: str, key: int, length: int, **plan: Any) -> None:
        request = RequestPlan(key, length, learn=True, learn_output=False, **{"cache": True, **plan})
        self.trainer.start(name, request)
        self.trainer.caches.start(name, request)

    def read(self, name: str, ids: list[int], first: int, end: int) -> None:
        """A batch has read the positions from ``first`` to ``end`` of a request, of which ``ids`` are the tokens."""
        self.h.normal_(generator=torch.Generator().manual_seed(first))
        text = torch.tensor(ids)
        before = text[max(0, first - BEFORE) : first]
        self.backlog.take([Rows(name, 0, first, text[first + 1 : end + 1], text[first:end], before)], self.h, self.a)

    def learn(self) -> list[ChunkReport]:
        while self.backlog.queues:
            self.trainer.learn(CHUNK)
        self.trainer.sync()
        return self.trainer.take_report().chunks

    def send(self, key: int, ids: list[int], **plan: Any) -> list[ChunkReport]:
        """One request, read at once."""
        name = f"r{key}-{len(ids)}-{sum(ids)}"
        self.begin(name, key, len(ids), **plan)
        self.read(name, ids, plan.get("start", 0), len(ids) - 1)
        self.backlog.finish(name, len(ids) - 1)
        self.trainer.caches.finish(name)
        return self.learn()

    def tokens(self, key: int) -> list[int]:
        ngrams = self.deltas.session(key).ngrams
        return [] if ngrams is None else ngrams.stream[ngrams.stream >= 0].tolist()

    def order(self, **order: Any) -> Any:
        self.files.step([FileOrder(**order)])
        while not self.files.idle:
            self.files.step([])
        return self.files.take_reports()[-1]


def text(number: int, length: int = 2 * CHUNK + 1) -> list[int]:
    return np.random.default_rng(number).integers(0, V, length).tolist()


def test_each_token_that_is_learned_is_remembered_once_with_what_came_before_it() -> None:
    worker, ids = Worker(), text(0, 45)
    worker.begin("r", A, len(ids))
    for first, end in ((0, 10), (10, 27), (27, 44)):
        worker.read("r", ids, first, end)
    chunks = worker.learn()
    assert [c.tokens for c in chunks] == [16, 16, 12]
    assert all(c.cache_loss is not None and c.cache_share is not None for c in chunks)
    ngrams = worker.deltas.session(A).ngrams
    assert ngrams is not None
    assert streams.shown(ngrams.stream).tolist() == [streams.BREAK, *ids], "chunks of one request lie behind one another"
    assert worker.tokens(A) == ids[1:]
    index = worker.trainer.caches.indexes.of(ngrams)
    for t in range(1, 45):
        found = index.followers(np.array(ids[max(0, t - 8) : t], np.int32))
        assert found.length == min(t, 4)
        assert ids[t] in found.tokens


def test_history_is_context_and_not_learned_again() -> None:
    worker, ids = Worker(), text(1, 40)
    worker.send(A, ids[:24])
    worker.send(A, ids, start=23)
    assert worker.tokens(A) == ids[1:]
    index = worker.trainer.caches.indexes.of(worker.deltas.session(A).ngrams)  # type: ignore[arg-type]
    assert index.followers(np.array(ids[20:24], np.int32)).length == 4, "its context is what came before it"


def test_what_a_filter_leaves_out_is_nowhere_in_it() -> None:
    """Neither as what came nor as what came before it: in a chunk, at its end, and in the context of the next one."""
    worker, ids = Worker(), list(range(2 * CHUNK + 1))
    left_out = [(4, 7), (14, 18), (25, 26)]  # of pairs: tokens 5, 6, 7, then 15 to 18, and 26
    chunks = worker.send(A, ids, filtered=left_out)
    assert sum(c.tokens for c in chunks if c.skipped is None) == 32 - 8
    secret = {5, 6, 7, 15, 16, 17, 18, 26}
    ngrams = worker.deltas.session(A).ngrams
    assert ngrams is not None
    assert not secret & set(streams.shown(ngrams.stream).tolist())
    assert worker.tokens(A) == [x for x in ids[1:] if x not in secret]
    index = worker.trainer.caches.indexes.of(ngrams)
    assert index.followers(np.array([4], np.int32)).length == 0, "nothing is known after what was left out follows"
    assert index.followers(np.array([8], np.int32)).tokens.tolist() == [9]


def test_what_is_not_learned_is_not_remembered() -> None:
    worker = Worker()
    worker.send(A, text(2))
    before = worker.tokens(A)
    worker.h.fill_(torch.nan)
    worker.begin("noise", A, CHUNK + 1)
    ids = torch.tensor(text(3, CHUNK + 1))
    worker.backlog.take([Rows("noise", 0, 0, ids[1:], ids[:-1], ids[:0])], worker.h, worker.a)
    (chunk,) = worker.learn()
    assert chunk.skipped == "nonfinite"
    assert chunk.cache_loss is None
    assert worker.tokens(A) == before


def test_a_request_may_leave_it_out() -> None:
    worker = Worker()
    worker.send(A, text(2))
    chunks = worker.send(A, text(4), cache=False)
    assert [c.skipped for c in chunks] == [None, None]
    assert worker.tokens(A) == text(2)[1:]
    worker.begin("r", A, 10, cache=False)
    assert worker.trainer.caches.served("r") is None
    worker.begin("s", A, 10)
    assert worker.trainer.caches.served("s") is not None


def test_a_server_without_a_cache_remembers_nothing() -> None:
    worker = Worker(orders=0)
    chunks = worker.send(A, text(2))
    assert [c.skipped for c in chunks] == [None, None]
    assert worker.tokens(A) == []
    assert not worker.trainer.caches.requests


def test_it_is_served_when_the_delta_is() -> None:
    """While a prompt is being read, its chunks that have been learned are in the master, and not in what is served."""
    worker, ids = Worker(), text(5, 3 * CHUNK + 1)
    worker.send(A, text(6))
    worker.begin("r", A, len(ids))
    served = worker.deltas.session(A).served_ngrams
    worker.read("r", ids, 0, 2 * CHUNK)
    worker.learn()
    session = worker.deltas.session(A)
    assert (session.version, session.served) == (4, 2)
    assert session.served_ngrams is served is not session.ngrams
    worker.read("r", [*ids, 0], 2 * CHUNK, len(ids))
    worker.learn()
    assert session.served == session.version == 5
    assert session.served_ngrams is session.ngrams


def test_another_session_is_never_looked_into() -> None:
    worker = Worker()
    worker.send(A, text(7))
    worker.begin("mine", A, 10)
    worker.begin("other", B, 10)
    caches = worker.trainer.caches
    assert caches.served("mine") is not None
    assert caches.served("other") is None, "it was sent nothing"
    worker.send(B, text(8))
    mine, other = caches.served("mine"), caches.served("other")
    assert mine is not None
    assert other is not None
    for t in range(1, 2 * CHUNK):
        before = np.array(text(7)[:t], np.int32)
        sent = {b for a, b in zip(text(8), text(8)[1:], strict=False) if a == before[-1]}
        assert set(other.followed.followers(before).tokens.tolist()) == sent


def test_a_fork_and_what_it_learns() -> None:
    worker = Worker()
    worker.send(A, text(9))
    worker.trainer.copy(A, B)
    worker.send(B, text(10))
    assert worker.tokens(A) == text(9)[1:]
    assert worker.tokens(B) == text(9)[1:] + text(10)[1:]


def test_a_rollback_and_a_reset() -> None:
    worker = Worker()
    worker.send(A, text(11))
    weights = worker.deltas.session(A).ngrams.to_state()  # type: ignore[union-attr]
    worker.send(A, text(12))
    assert worker.trainer.roll_back(A, 2)
    assert worker.tokens(A) == text(11)[1:]
    assert worker.deltas.session(A).ngrams.to_state() == weights  # type: ignore[union-attr]
    assert worker.trainer.roll_back(A, 1)
    assert worker.tokens(A) == text(11)[1 : CHUNK + 1]
    assert worker.trainer.roll_back(A, 0)
    assert worker.tokens(A) == []
    worker.send(A, text(11))
    worker.trainer.drop(A)
    assert worker.tokens(A) == []


def test_nothing_of_a_session_that_is_gone_stays_behind() -> None:
    worker = Worker()
    indexes = worker.trainer.caches.indexes
    worker.send(A, text(19))
    worker.send(A, text(20))
    worker.begin("r", A, 10)
    assert worker.trainer.caches.served("r") is not None
    assert list(indexes.recent.values()) == [worker.deltas.session(A).ngrams], "earlier versions need none"
    worker.trainer.drop(A)
    assert not indexes.recent
    assert worker.trainer.caches.served("r") is None


def test_eviction_to_the_host() -> None:
    worker = Worker(rows=1)
    for number in (13, 14):
        worker.send(A, text(number))
        worker.send(B, text(number + 10))
    assert worker.deltas.evictions == 3
    assert worker.tokens(A) == text(13)[1:] + text(14)[1:]


def test_a_file(tmp_path: Path) -> None:
    worker, path = Worker(), tmp_path / "s.safetensors"
    worker.send(A, text(15))
    saved = worker.order(action="save", session=A, path=str(path))
    assert saved.outcome == "done"
    again = Worker()
    assert again.order(action="load", session=B, path=str(path), checksum=saved.checksum).outcome == "done"
    assert again.tokens(B) == text(15)[1:]
    for one, key in ((worker, A), (again, B)):
        one.send(key, text(16))
    mine, other = worker.deltas.session(A).ngrams, again.deltas.session(B).ngrams
    assert mine is not None
    assert other is not None
    assert (mine.stream.tolist(), mine.to_state()) == (other.stream.tolist(), other.to_state())
    smaller = Worker(tokens=512)
    smaller.files.cache = CacheConfig.model_construct(orders=4, tokens=10)
    assert smaller.order(action="load", session=B, path=str(path), checksum=saved.checksum).outcome == "done"
    assert smaller.tokens(B) == text(15)[-10:]
    without = Worker(orders=0)
    assert without.order(action="load", session=B, path=str(path), checksum=saved.checksum).outcome == "done"
    kept = without.order(action="save", session=B, path=str(path))
    back = Worker()
    assert back.order(action="load", session=A, path=str(path), checksum=kept.checksum).outcome == "done"
    assert back.tokens(A) == text(15)[1:], "a server without caches keeps what others have"


def test_ranks_have_a_session_or_have_it_not_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first could not read, another has not, although it could; one that cannot begin what the others do ends the
    engine, but where none of them can."""
    worker, path = Worker(), str(tmp_path / "s.safetensors")
    worker.send(A, text(1))
    saved = worker.order(action="save", session=A, path=path)
    other, ended = Worker(), mock.Mock()
    other.files.ranks = mock.Mock(agree=lambda what, decide: [x and False for x in decide()], failed=ended)
    other.order(action="load", session=B, path=path, checksum=saved.checksum)
    assert B not in other.deltas.sessions
    assert other.order(action="save", session=B, path=path, version=1).outcome == "failed"
    ended.assert_not_called()
    monkeypatch.setattr(other.files, "_snapshot", mock.Mock(side_effect=MemoryError))
    other.send(A, text(1))
    assert other.order(action="save", session=A, path=path).outcome == "failed"
    ended.assert_called_once()


@pytest.mark.parametrize("stream", [[V], [-V - 2], [5, -V - 3]])
def test_a_file_with_tokens_that_there_are_not_is_damaged(tmp_path: Path, stream: list[int]) -> None:
    worker, path = Worker(), tmp_path / "s.safetensors"
    worker.send(A, text(17))
    session = worker.deltas.session(A)
    assert session.ngrams is not None
    session.ngrams.stream = np.array(stream, np.int32)
    saved = worker.order(action="save", session=A, path=str(path))
    report = worker.order(action="load", session=B, path=str(path), checksum=saved.checksum)
    assert report.outcome == "damaged"
    assert "tokens that the model does not have" in report.error


def test_a_file_whose_cache_is_something_else_is_refused(tmp_path: Path) -> None:
    worker, path = Worker(), tmp_path / "s.safetensors"
    worker.send(A, text(18))
    tensors = worker.files._named(worker.deltas.read(A).delta)
    tensors |= worker.files._named(worker.deltas.read(A).last, delta_file.UPDATE)
    for wrong in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)):
        data = delta_file.encode({**tensors, delta_file.CACHE: wrong}, {"state": "{}"})
        checksum = delta_file.write(path, data)
        with pytest.raises(delta_file.FileError, match=delta_file.CACHE):
            delta_file.load(path, checksum, worker.files.geometry)


def test_tokens_before_a_batch_are_looked_up() -> None:
    """What vLLM's batch says of a request whose first positions were read in an earlier step."""
    ids = np.arange(100, 140)
    batch = SimpleNamespace(
        req_ids=["a"], num_computed_tokens_cpu=np.array([10]), num_tokens_no_spec=np.array([30]), token_ids_cpu=ids[None]
    )
    (rows,) = view_v1(SimpleNamespace(input_batch=batch), SimpleNamespace(num_scheduled_tokens={"a": 5}), {"a"})
    assert rows.before is not None
    assert rows.before.tolist() == list(range(103, 110))
    assert rows.tokens is not None
    assert rows.tokens.tolist() == list(range(110, 115))


def test_tokens_before_a_batch_are_looked_up_where_the_device_has_them() -> None:
    """Of model runner V2: a request in the middle of its prompt, and one at its beginning; another is not asked for."""
    ids = torch.arange(40) + 100 * torch.arange(3)[:, None]  # of each state of a request
    batch = SimpleNamespace(
        req_ids=["x", "a", "b"], num_scheduled_tokens=np.array([4, 5, 1]), num_computed_tokens_np=np.array([0, 10, 2]),
        query_start_loc_np=np.array([0, 4, 9, 10]), idx_mapping_np=np.array([2, 0, 1]), input_ids=torch.zeros(10),
    )  # fmt: skip
    runner = SimpleNamespace(req_states=SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids.int())))
    a, b = view_v2(runner, batch, {"a", "b"})
    assert (a.request, a.first, a.position, b.request, b.first, b.position) == ("a", 4, 10, "b", 9, 2)
    found = [[x.tolist() for x in (rows.before, rows.tokens, rows.next_tokens) if x is not None] for rows in (a, b)]
    assert found[0] == [list(range(3, 10)), list(range(10, 15)), list(range(11, 16))]
    assert found[1] == [[100, 101], [102], [103]]
    assert a.context(12, [(5, 7)]) is not None
    assert a.context(12, [(5, 7)]).tolist() == [5, -1, -1, 8, 9, 10, 11, 12]  # type: ignore[union-attr]


@pytest.mark.parametrize("what", ["keep", "texts", "commit"])
def test_what_fails_after_a_step_leaves_version_and_delta_together(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory for a copy is short: the master has moved by then. What could not be kept is all that is lost."""
    worker, other = Worker(), Worker()
    errors = worker.trainer.errors
    failing = mock.Mock(side_effect=MemoryError)
    if what == "keep":
        monkeypatch.setattr("vllm_ttt.worker.learn.trainer.keep", failing)
    else:
        monkeypatch.setattr(worker.trainer.caches, what, failing)
    chunks = worker.send(A, text(1))
    assert failing.call_count == errors.count == 2
    assert [(c.skipped, c.tokens) for c in chunks] == [(None, CHUNK), (None, CHUNK)]
    session = worker.deltas.session(A)
    assert (session.version, worker.trainer.in_flight(A), worker.trainer.guard.untried(A)) == (2, False, 0)
    monkeypatch.undo()
    other.send(A, text(1))
    for found, expected in zip(worker.deltas.read(A).delta.tensors(), other.deltas.read(A).delta.tensors(), strict=True):
        assert torch.equal(found, expected)
    (chunk, _) = worker.send(A, text(2))
    assert (chunk.skipped, session.version) == (None, 4), "and it goes on"


def test_a_session_that_cannot_be_brought_in_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(rows=1)
    worker.send(A, text(1))
    monkeypatch.setattr(worker.deltas, "to_host", mock.Mock(side_effect=MemoryError))
    chunks = worker.send(B, text(2))
    assert [c.skipped for c in chunks] == ["error", "error"]
    monkeypatch.undo()
    assert [c.skipped for c in worker.send(A, text(3))] == [None, None]
    assert [c.skipped for c in worker.send(B, text(2))] == [None, None]


def test_memory_is_counted() -> None:
    geometry = Geometry(0, R, 0, D, Q, F)
    found = [memory.needs(geometry, config(orders=orders), 64, 4, V, 512, 4) for orders in (0, 4)]
    more = sum(found[1].values()) - sum(found[0].values())
    assert more == 64 * 12 * 4 * 65536


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache\.orders"):
        config(orders=9)


def test_what_it_gains_is_counted_and_kept_with_the_session() -> None:
    session, counts = Session(SessionKey("-", "s"), 1, 4), EngineCounts()
    assert session.summary()["cache_share"] is session.summary()["cache_gain"] is None, "it has learned nothing beside a cache"
    for tokens, cache in ((100, (1.5, 0.25)), (300, (1.9, 0.05)), (50, (None, None))):
        chunk = ChunkReport(1, "r", tokens, 2.0, None, None, tokens, 1, 0.01, 0.1, *cache)
        session.record(chunk)
        counts.chunk(chunk)
    found = session.summary()
    assert found["cache_share"] == pytest.approx((25 + 15) / 400)
    assert found["cache_gain"] == pytest.approx((50 + 30) / 400)
    assert [c["cache_loss"] for c in session.losses] == [1.5, 1.9, None]
    again = Session(SessionKey("-", "t"), 2, 4)
    again.from_state(json.loads(json.dumps(session.to_state())))
    assert again.summary()["cache_gain"] == found["cache_gain"]
    counted = counts.snapshot()
    assert counted["source_tokens_total"] == pytest.approx({"model": 360, "cache": 40})
    assert sum(counted["cache_loss_nats"][""][1:]) == 2


def test_a_request_that_learns_nothing_still_says_whether_it_wants_the_cache() -> None:
    assert Knobs.parse(None).cache
    assert not Knobs.parse({"ttt_cache": 0}).cache
    assert not Knobs.parse({"ttt_cache": 0, "ttt_learn": 0}).cache
    for wanted in (True, False):
        knobs = Knobs(learn=True, learn_output=True, interleave=True, cache=wanted).without_learning
        assert (knobs.learn, knobs.learn_output, knobs.interleave, knobs.cache) == (False, False, False, wanted)
