"""Blocks of requests that have left and are still to be learned, in vLLM's own scheduler and block pool."""

from __future__ import annotations

import pytest
from test_deep_scheduler import BLOCK, PROMPT, Engine
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from vllm_ttt.engine.prefix.held_blocks import SHARE

pytestmark = pytest.mark.unit

LONG = list(range(3000, 3300))


class Holding(Engine):
    """A worker that is busy, and says nothing of what it has learned until it is asked to."""

    def step(self) -> SchedulerOutput:
        self.report.busy = True
        return super().step()

    @property
    def free(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def leave(self, session: str, prompt: list[int] = PROMPT) -> str:
        """A request that learns, to its end."""
        name = self.send(session, prompt, learn=True)
        self.step()
        assert name in self.scheduled, "it must not wait"
        assert name not in self.scheduler.requests
        return name

    def released(self, *names: str) -> None:
        """The worker's next report."""
        self.report.released += names
        self.step()


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def test_blocks_are_kept_until_all_is_learned() -> None:
    engine = Holding("deep")
    free = engine.free
    name = engine.leave("a")
    assert engine.free == free - blocks(len(PROMPT))
    engine.step()
    assert engine.scheduler.has_requests(), "there is something to wait for"
    engine.released(name)
    assert engine.free == free
    assert not engine.scheduler.ttt_held.requests


def test_nothing_is_kept_for_who_needs_nothing() -> None:
    """With `last`; of a request that learns nothing; of one that was learned before it left."""
    engine = Holding("last")
    free = engine.free
    engine.leave("a")
    assert engine.free == free
    engine = Holding("deep")
    engine.read("a")
    assert engine.free == free
    name = engine.send("a", learn=True, outputs=3)
    engine.step()
    engine.learned(name, "a", 1)
    engine.drain()
    assert engine.free == free


def test_ids_of_who_needs_nothing_are_forgotten() -> None:
    """However many come and go beside a request whose blocks are kept."""
    engine = Holding("deep")
    kept = engine.leave("a")
    for _ in range(5):
        name = engine.send("b", learn=True, outputs=3)
        engine.step()
        engine.learned(name, "b", 1)
        engine.drain()
    held = engine.scheduler.ttt_held
    assert list(held.requests) == [kept]
    assert held.told == {kept}


def test_an_aborted_request_keeps_what_is_being_learned() -> None:
    engine = Holding("deep")
    free = engine.free
    name = engine.send("a", learn=True, outputs=30)
    engine.step()
    engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    assert engine.free < free
    engine.step()
    engine.released(name)
    assert engine.free == free


def test_a_worker_that_rests_reads_nothing() -> None:
    """Whatever it said, or did not: blocks of requests that it knows to have left come back."""
    engine = Engine("deep")
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    engine.send("a", learn=True)
    engine.step()
    assert engine.scheduler.ttt_held.requests, "it does not know yet"
    engine.step()
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_a_limit() -> None:
    """Beyond a share of the cache, the worker is told to learn what has been kept longest."""
    engine, names = Holding("deep"), []
    total = engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    while engine.scheduler.ttt_held.count <= SHARE * total:
        assert engine.step().ttt.urgent == []  # type: ignore[attr-defined]
        names.append(engine.leave(f"s{len(names)}", LONG))
    assert len(names) > 3
    assert engine.step().ttt.urgent == names[:1]  # type: ignore[attr-defined]
    engine.released(names[0])
    assert engine.step().ttt.urgent == []  # type: ignore[attr-defined]


def test_who_waits_for_blocks_gets_them() -> None:
    """What is kept is learned one by one although it is less than the limit, as long as somebody has no room."""
    engine = Holding("deep")
    names = [engine.leave(f"s{i}", LONG) for i in range(4)]
    assert engine.step().ttt.urgent == []  # type: ignore[attr-defined]
    for i in range(5):
        engine.send(None, [*range(4000 + 500 * i, 4480 + 500 * i)], outputs=30)
    for running, name in ((3, names[0]), (4, names[1])):
        engine.step()
        assert engine.step().ttt.urgent == [name]  # type: ignore[attr-defined]
        assert len(engine.scheduler.running) == running, "there is no room for all"
        engine.released(name)
    engine.step()
    assert len(engine.scheduler.running) == 5
    assert engine.step().ttt.urgent == []  # type: ignore[attr-defined]


def test_who_runs_gets_them() -> None:
    """Before another request is preempted more than once."""
    engine = Holding("deep")
    names = [engine.leave(f"s{i}", LONG) for i in range(4)]
    for i in range(4):
        engine.send(None, [*range(4000 + 500 * i, 4470 + 500 * i)], outputs=40)
    urgent: list[str] = []
    while engine.scheduler.running or engine.scheduler.waiting:
        step = engine.step()
        urgent += step.ttt.urgent  # type: ignore[attr-defined]
        assert bool(step.preempted_req_ids) <= bool(step.ttt.urgent)  # type: ignore[attr-defined]
        engine.report.released += step.ttt.urgent  # type: ignore[attr-defined]
    assert list(dict.fromkeys(urgent)) in (names[:1], names[:2])


def test_all_blocks_are_wanted_back() -> None:
    """vLLM's reset of the prefix cache, running requests included: what waits of requests that have left is given up."""
    engine = Holding("deep")
    free = engine.free
    name = engine.leave("a")
    engine.step()
    assert not engine.scheduler.reset_prefix_cache(), "not while somebody needs it"
    assert engine.scheduler.ttt_held.requests
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.free == free
    assert engine.step().ttt.lost == [name]  # type: ignore[attr-defined]
    assert engine.step().ttt.lost == []  # type: ignore[attr-defined]


def test_an_id_may_be_used_again() -> None:
    """vLLM knows nothing of a request whose blocks are kept."""
    engine = Holding("deep")
    name = engine.leave("a")
    engine.number -= 1
    assert engine.send(None) == name
    engine.drain()
    engine.released(name)
    assert not engine.scheduler.ttt_held.requests


def test_a_chat_reads_its_history() -> None:
    """Each turn goes on from the one before: what the session has learned is read from the cache, the rest is computed."""
    engine = Engine("deep", schedule={"kv_epoch": 10})
    chat, known = [], 0
    for turn in range(20):
        chat += range(100 * turn, 100 * turn + 20)
        name = engine.send("a", chat, learn=True)
        engine.step()
        # Its last pair was followed by no token yet. The first turn was computed by the base model, which it was then.
        assert engine.scheduled[name] == len(chat) - (max(known - 1, 0) // BLOCK * BLOCK if turn > 1 else 0)
        known = len(chat)
        engine.learned(name, "a", 1)
        engine.report.chunks[-1].end = len(chat) - 1
        engine.step()
        engine.drain()
    assert engine.session("a").tokens_skipped["history"] == sum(20 * turn - 1 for turn in range(1, 20))


def test_a_chat_whose_delta_has_moved_computes_its_history() -> None:
    """What was computed in an earlier epoch is not its past."""
    engine = Engine("deep", schedule={"kv_epoch": 0})
    for turn in (1, 2, 3):
        name = engine.send("a", PROMPT[: 32 * turn], learn=True)
        engine.step()
        assert engine.scheduled[name] == 32 * turn
        engine.learned(name, "a", 1)
        engine.report.chunks[-1].end = 32 * turn - 1
        engine.step()
