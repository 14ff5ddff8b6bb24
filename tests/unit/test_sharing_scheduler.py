"""The real scheduler on a state dir that servers share: what is running for a session that is lost is refused, at once, and
nothing else is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_deep_scheduler
from test_deep_scheduler import Engine
from vllm.v1.outputs import ModelRunnerOutput

from vllm_ttt.engine.storage import database, leases, member
from vllm_ttt.engine.storage.failures import Moved
from vllm_ttt.engine.storage.member import STOP
from vllm_ttt.engine.storage.watch import Watch
from vllm_ttt.types import SessionKey, StepReport

pytestmark = pytest.mark.unit


class Sharing(Engine):
    """``time``: the clock by which it beats."""

    def __init__(self, folder: Path):
        self.time = 0.0
        super().__init__("deep", sessions={"resident": 4, "shared": True, "state_dir": str(folder)})
        self.scheduler.ttt_http = False  # sessions are named as in a script, which has no front end to claim them
        self.store = self.scheduler.ttt_store
        assert self.store is not None

    def claim(self, name: str) -> bool:
        sharing = self.scheduler.ttt_tiers.sharing
        assert sharing is not None
        return self.finish(sharing.claim(SessionKey("-", name)))

    def forward(self, output: Any) -> dict[str, Any]:
        """What the clients get of a step that was scheduled."""
        ids = list(output.num_scheduled_tokens)
        done = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, [[7]] * len(ids))
        done.ttt = StepReport()  # type: ignore[attr-defined]
        outputs = self.scheduler.update_from_output(output, done)
        return {o.request_id: o for per_client in outputs.values() for o in per_client.outputs}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sharing]:
    clock: list[Sharing] = []
    monkeypatch.setattr(member, "now", lambda: clock[0].time if clock else 0.0)
    monkeypatch.setattr(Watch, "start", lambda self: None)
    made = test_deep_scheduler.engine_args

    def served(*args: Any) -> dict[str, Any]:
        found = made(*args)
        found["additional_config"]["ttt"]["http"] = True
        return found

    monkeypatch.setattr(test_deep_scheduler, "engine_args", served)
    found = Sharing(tmp_path / "s")
    clock.append(found)
    yield found
    found.scheduler.ttt_tiers.end()


def test_a_session_is_served_once_it_has_been_claimed(engine: Sharing) -> None:
    engine.send("a")
    ((_, error),) = engine.scheduler.ttt_refused
    assert isinstance(error, Moved)
    engine.step()
    assert engine.claim("a")
    assert engine.read("a") == 0


def test_what_runs_for_a_lost_session_is_refused_and_nothing_else(engine: Sharing) -> None:
    for name in ("lost", "kept"):
        assert engine.claim(name)
    lost, kept, base = (engine.send(name, outputs=50) for name in ("lost", "kept", None))
    engine.step()
    assert set(engine.scheduled) == {lost, kept, base}
    output = engine.scheduler.schedule()
    assert set(output.num_scheduled_tokens) == {lost, kept, base}
    # Somebody finds this server dead while the step runs, and has one of its sessions; then it looks.
    watch = engine.scheduler.ttt_store.watch  # type: ignore[union-attr]
    assert watch is not None
    with contextlib.closing(database.connect(watch.member.folder.parent / "sessions.db")) as db:
        db.execute("DELETE FROM servers")
        db.execute("DELETE FROM leases WHERE session = ?", (watch.leases.session(SessionKey("-", "lost")),))
        other = member.Member(watch.member.folder)
        other.rejoin(db)
        assert leases.claim(db, other.id, watch.leases.session(SessionKey("-", "lost"))) is not None
    watch.look()
    answers = engine.forward(output)
    told = answers[lost].kv_transfer_params["ttt"]
    assert (answers[lost].new_token_ids, told["status"], told["retry_after"]) == ([], 409, 2)
    assert answers[kept].new_token_ids == answers[base].new_token_ids == [7]
    engine.step()
    assert set(engine.scheduled) == {kept, base}
    assert [key.name for key in engine.scheduler.ttt_ledger.sessions] == ["kept"]
    assert not engine.claim("lost")


def test_a_server_that_could_not_beat_answers_nothing_of_its_sessions(engine: Sharing) -> None:
    """Not even what it has computed in time."""
    assert engine.claim("a")
    running, base = engine.send("a", outputs=50), engine.send(None, outputs=50)
    engine.step()
    output = engine.scheduler.schedule()
    engine.time += STOP
    answers = engine.forward(output)
    assert answers[running].kv_transfer_params["ttt"]["status"] == 409
    assert (answers[running].new_token_ids, answers[base].new_token_ids) == ([], [7])
    engine.send("a")
    ((_, error),) = engine.scheduler.ttt_refused
    assert isinstance(error, Moved)
    engine.step()
    # Nobody has taken it: when the server goes on, it has it still.
    watch = engine.scheduler.ttt_store.watch  # type: ignore[union-attr]
    assert watch is not None
    watch.look()
    engine.step()
    assert engine.claim("a")
    again = engine.send("a")
    engine.step()
    assert again in engine.scheduled
