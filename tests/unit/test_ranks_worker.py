"""The workers of two ranks between two iterations: they learn the same, whatever their clocks say, and one has the files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from several import together
from test_worker_compute import D, F, Q, R
from test_worker_hooks import CHUNK, Hooks
from torch import Tensor

from vllm_ttt.geometry import Geometry
from vllm_ttt.types import FileOrder, FileReport, RequestPlan, StepPlan
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.files import Files
from vllm_ttt.worker.ranks import ALONE, FAILED, Ranks, Several

pytestmark = pytest.mark.unit

GEOMETRY = Geometry(layer=1, rank=R, seed=0, hidden=D, attention=Q, feed_forward=F)
SESSIONS = (3, 4, 5)
#: Chunks of each request, and requests of each session.
CHUNKS, REQUESTS = 2, 3


class SteadyClock(Clock):
    """Whatever is timed takes a second, however busy this machine is."""

    def seconds(self, first: Any, second: Any) -> float:
        return 1.0


class SlowClock(SteadyClock):
    """Every second is a thousandth, so that no time would be left for learning; and what is done is seen late."""

    asked = 0

    def seconds(self, first: Any, second: Any) -> float:
        return super().seconds(first, second) / 1000

    def done(self, mark: Any) -> bool:
        self.asked += 1
        return self.asked % 3 == 0


class Rank(Hooks):
    """``slow``: this rank's clock is wrong."""

    def __init__(self, ranks: Ranks = ALONE, slow: bool = False):
        super().__init__(pages=12, ranks=ranks)
        self.go_by((SlowClock if slow else SteadyClock)(torch.device("cpu")))
        self.trainer.deltas.clock = self.clock
        self.files = Files(self.trainer, GEOMETRY, "tiny")
        #: a tile takes as long as an iteration, and a quarter of the time is for learning: it waits for four
        self.budget.calibrate(128, 1.0)

    def serve(self) -> list[tuple[int, int]]:
        """Batches of all sessions, one after the other; which sessions had learned how often after each iteration."""
        seen = []
        for i in range(REQUESTS):
            for key in SESSIONS:
                self.start(f"{key}-{i}", key, CHUNKS)
                self.batch((f"{key}-{i}", 0, CHUNKS * CHUNK + 1))
                self.backlog.finish(f"{key}-{i}", CHUNKS * CHUNK)
                for _ in range(9):
                    self.iterations.append((0.0, 1.0))
                    self._guard(self._between, True, [])
                    self.trainer.take_report()
                    seen.append(tuple(self.trainer.deltas.session(k).version for k in SESSIONS))
        while self.trainer.learning:
            self._guard(self._between, False, [])
        return seen

    def order(self, order: FileOrder) -> FileReport:
        """Its final report."""
        self.files.step([order])
        while not self.files.idle:
            time.sleep(0.001)
            self.files.step([])
        return self.files.take_reports()[-1]

    def bits(self, key: int) -> list[Tensor]:
        return [x.clone() for x in self.trainer.deltas.read(key).tensors()]


@dataclass
class Found:
    seen: list[tuple[int, int]]
    before: list[Tensor]
    after: list[Tensor]
    reports: dict[str, FileReport]
    damaged: FileReport
    sizes: list[int]
    digest: int
    ended: tuple[list[int], list[int]]


def on_a_rank(ranks: Ranks, folder: Path, slow: bool) -> Found:
    with torch.inference_mode():  # as the worker's hooks run
        worker = Rank(ranks, slow)
        seen = worker.serve()
        key, path = SESSIONS[0], folder / "saved.safetensors"
        before, reports = worker.bits(key), {}
        reports["save"] = worker.order(FileOrder("save", key, str(path)))
        reports["digest"] = worker.order(FileOrder("digest", key))
        reports["export"] = worker.order(FileOrder("export", key, str(folder / "exported.safetensors")))
        worker.trainer.drop(key)
        # Only the first rank has the checksum, as only its report reaches the engine core.
        checksum = ranks.agree("the checksum", lambda: reports["save"].checksum)
        reports["load"] = worker.order(FileOrder("load", key, str(path), checksum))
        after, other = worker.bits(key), worker.order(FileOrder("load", 99, str(path), "another"))
        size, ended = worker.trainer.deltas.bytes_per_session(), end_together(ranks)
        return Found(seen, before, after, reports, other, [size], getattr(ranks, "digest", 0), ended)


def end_together(ranks: Ranks) -> tuple[list[int], list[int]]:
    """Requests end in one step, and others are preempted in one; the sets that say so have another order on each rank. Whose
    chunks wait then, and which pages have been given back."""
    worker, end, names, order = Rank(ranks), CHUNK // 2, "abcdef", 1 if ranks.first else -1
    worker.cache = SimpleNamespace()  # type: ignore[assignment]
    for name, key in zip(names, 2 * SESSIONS, strict=True):
        worker.trainer.start(name, RequestPlan(key, 1, True, True))
    worker.batch(*((name, 0, end) for name in names))
    worker._preempt("def"[::order])
    worker._finish(SimpleNamespace(finished_req_ids="abc"[::order]), StepPlan(ended=dict.fromkeys("abc", end)))
    return [chunk.session for chunk in worker.backlog.heads()], list(worker.backlog.returned)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Found]]:
    folder = tmp_path_factory.mktemp("ranks")
    found, codes = together(2, folder, on_one_of_two, folder)
    assert codes == [0, 0], (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return folder, found


def on_one_of_two(ranks: Several, folder: Path) -> Found:
    return on_a_rank(ranks, folder, slow=not ranks.first)


def test_a_slow_clock_of_one_rank_changes_nothing(both: tuple[Path, list[Found]], tmp_path: Path) -> None:
    (first, second), alone = both[1], on_a_rank(ALONE, tmp_path, slow=False)
    assert first.seen == second.seen
    assert first.digest == second.digest != 0
    assert len(set(first.seen)) > CHUNKS * REQUESTS, "they learn one after the other, as time allows"
    assert first.seen == alone.seen, "as one rank with that clock"
    assert torch.equal(first.before[0], second.before[0]), "o and down are whole on both"
    wide = torch.cat((first.before[1], second.before[1]), 2)
    for found, expected in ((first.before[0], alone.before[0]), (wide, alone.before[1])):
        assert ((found - expected).norm() / expected.norm()).item() < 0.002
    assert 2 * GEOMETRY.shard(2, 1).bytes == first.sizes[0] + second.sizes[0] > alone.sizes[0] == GEOMETRY.bytes


def test_requests_that_end_in_one_step_end_in_one_order(both: tuple[Path, list[Found]]) -> None:
    first, second = both[1]
    assert first.ended == second.ended
    assert first.ended[0] == list(SESSIONS)


def test_a_file_is_whole_whoever_has_written_it(both: tuple[Path, list[Found]], tmp_path: Path) -> None:
    folder, (first, second) = both
    for found in (first, second):
        for x, y in zip(found.before, found.after, strict=True):
            assert torch.equal(x, y), "what comes back is what was saved, on either rank"
        assert all(report.outcome == "done" for report in found.reports.values())
        assert (found.damaged.outcome, "checksum" in found.damaged.error) == ("damaged", True), "the first rank says so"
    save = first.reports["save"]
    with torch.inference_mode():
        one = Rank()
        assert one.order(FileOrder("load", 3, save.path, save.checksum)).outcome == "done"
        thin, wide, *_ = one.bits(3)
        assert torch.equal(thin, first.before[0])
        assert torch.equal(wide, torch.cat((first.before[1], second.before[1]), 2))
        again = one.order(FileOrder("save", 3, str(tmp_path / "again.safetensors")))
        exported = one.order(FileOrder("export", 3, str(tmp_path / "exported.safetensors")))
    assert (again.checksum, again.digest) == (save.checksum, save.digest), "byte for byte"
    assert first.reports["digest"].digest == first.reports["export"].digest == exported.digest == save.digest
    mine, theirs = (safetensors.torch.load_file(path / "exported.safetensors") for path in (tmp_path, folder))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items()), "A too, which each rank has a part of"


def goes_by_its_own_clock(ranks: Several) -> None:
    worker = Rank(ranks, slow=not ranks.first)
    agree = ranks.agree
    ranks.agree = lambda what, decide: decide() if what == "how much is learned" else agree(what, decide)  # type: ignore[method-assign]
    with torch.inference_mode():
        worker.serve()


def test_a_rank_that_went_by_its_own_clock_would_end_the_engine(tmp_path: Path) -> None:
    """So the clock that is planted above does matter, and ranks that have parted are found."""
    found, codes = together(2, tmp_path, goes_by_its_own_clock)
    assert found == [None, None]
    assert FAILED in codes
    logs = [(tmp_path / f"{i}.log").read_text() for i in (0, 1)]
    assert any("ends the engine" in log for log in logs)
