"""Sessions between memory and disk: they come back as they were, whatever happens, and nothing grows without bound."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from world import World

from vllm_ttt.engine.ledger import NAMES
from vllm_ttt.engine.life.states import State
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Servers on one state dir, one at a time."""
    made: list[World] = []

    def start(**options: object) -> World:
        made.append(World(tmp_path / "state", **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    made[-1].store.folder.unlock()


def files(world: World) -> list[Path]:
    return sorted(world.store.folder.sessions.rglob("*.safetensors"))


def test_a_restart_brings_everything_back(make: Make) -> None:
    world = make()
    for i in range(10):
        world.use(f"s{i}", 1.0, i)
    world.end()
    again = make()
    assert not again.ledger.sessions, "nothing is loaded before it is asked for"
    for i in range(10):
        assert again.value(f"s{i}") == 1.0 + i
        session = again.ledger.sessions[SessionKey("-", f"s{i}")]
        assert (session.version, session.tokens_learned, len(session.losses)) == (2, 32, 2)
    assert Offline(again.store.folder.root).fsck()["problems"] == []


def test_memory_is_bounded_and_nothing_is_lost(make: Make) -> None:
    world = make(limit=3)
    for round_ in range(3):
        for i in random.Random(round_).sample(range(20), 20):
            world.use(f"s{i}", 2.0**i)
            world.run()
            assert len(world.trainer.deltas.sessions) <= 3
            assert len(world.ledger.sessions) <= 3
    for i in range(20):
        assert world.value(f"s{i}") == 3 * 2.0**i


def test_others_are_served_while_one_is_brought_back(make: Make) -> None:
    world = make(limit=3)
    for name in "abcd":
        world.use(name, 1.0)
    world.run()
    cold = world.ledger.open(SessionKey("-", "a"))
    cold.requests.add("r")
    assert not world.tiers.ready(cold)
    warm = world.ledger.open(SessionKey("-", "d"))
    assert world.tiers.ready(warm), "it is in memory and need not wait"
    world.run(lambda: world.tiers.ready(cold))
    assert world.trainer.deltas.session(cold.adapter).version == 1


def test_random_lives(make: Make) -> None:
    """Learning, saving, eviction, deletion, rollback, restarts and crashes, in any order: a session always holds what its
    version held when it was made, and never less than what was acknowledged."""
    rng = random.Random(5)
    world = make()
    #: name -> what it held at each version
    truth: dict[str, list[float]] = {}
    acknowledged: dict[str, int] = {}
    for _ in range(400):
        name, act = f"s{rng.randrange(8)}", rng.random()
        if act < 0.5:
            values = [float(rng.randrange(1, 100)) for _ in range(rng.randrange(1, 4))]
            session = world.use(name, *values)
            held = truth.setdefault(name, [0.0])
            assert session.version == len(held) - 1 + len(values)
            for value in values:
                held.append(held[-1] + value)
        elif act < 0.7 and name in truth:
            saved = world.save(name)
            acknowledged[name] = saved.version if saved else 0
            assert acknowledged[name] == len(truth[name]) - 1
        elif act < 0.78 and name in truth:
            session = world.ledger.find(SessionKey("-", name))
            assert session is not None
            world.wait(world.tiers.owner.remove(session))
            del truth[name]
            acknowledged.pop(name, None)
        elif act < 0.86 and acknowledged.get(name):
            session = world.ledger.find(SessionKey("-", name))
            assert session is not None
            assert session.saved is not None
            back = world.wait(world.go_back(session, session.saved.version))
            acknowledged[name] = back.version
            truth[name] = truth[name][: back.version + 1]
        elif act < 0.9:
            world.end()
            world = make()
            acknowledged = {name: len(held) - 1 for name, held in truth.items()}
        elif act < 0.97:
            for _ in range(rng.randrange(4)):
                world.step()
            world.crash()
            world = make()
            for name in list(truth):
                found = world.ledger.peek(SessionKey("-", name))
                version = found.version if found else 0
                assert version >= acknowledged.get(name, 0), "an acknowledged save is gone"
                truth[name] = truth[name][: version + 1]
                if found is None:  # nothing of it had been saved: it is as if nobody had named it
                    del truth[name]
        if name in truth:
            assert world.value(name) == truth[name][-1]
    world.run()
    report = Offline(world.store.folder.root).fsck()
    assert report["problems"] == []
    assert report["sessions"] >= 5


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "gone", "garbage", "folder", "other"])
def test_a_damaged_file_costs_its_version_alone(make: Make, damage: str) -> None:
    world = make()
    for name in ("a", "b"):
        for value in (1.0, 2.0):
            world.use(name, value)
            world.save(name)
    newest = world.store.folder.path(world.ledger.sessions[SessionKey("-", "a")].saved.file)  # type: ignore[union-attr]
    other = world.store.folder.path(world.ledger.sessions[SessionKey("-", "b")].saved.file)  # type: ignore[union-attr]
    world.end()
    data = newest.read_bytes()
    newest.unlink()
    if damage == "folder":
        newest.mkdir()
    elif damage != "gone":
        content = {
            "truncated": data[:-1], "bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "empty": b"",
            "garbage": b"\x80\x04" + b"x" * (len(data) - 2), "other": other.read_bytes(),
        }  # fmt: skip
        newest.write_bytes(content[damage])
    report = Offline(world.store.folder.root).fsck()
    assert [p["session_id"] for p in report["problems"]] == ["a"]
    again = make()
    assert again.value("a") == 1.0, "the version before"
    assert again.value("b") == 3.0
    session = again.ledger.sessions[SessionKey("-", "a")]
    assert (session.version, session.tokens_learned) == (1, 16)
    if damage not in ("gone",):
        assert newest.name in [p.name for p in again.store.folder.damaged.iterdir()]
    again.use("a", 5.0)
    assert again.save("a").version == 2
    again.run()
    assert Offline(again.store.folder.root).fsck()["problems"] == []


def test_every_version_damaged(make: Make) -> None:
    world = make()
    world.use("a", 1.0)
    world.save("a")
    world.end()
    for file in files(world):
        file.write_bytes(bytes(file.stat().st_size))
    again = make()
    assert again.value("a") == 0.0
    session = again.ledger.sessions[SessionKey("-", "a")]
    assert session.version == 0
    assert session.error is not None
    assert "damaged" in session.error


def test_a_file_that_cannot_be_read_refuses_the_request_and_keeps_the_session(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    world.use("a", 1.0)
    world.end()
    again = make()

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("vllm_ttt.worker.deltas.delta_file.read", fail)
        again.use("a")
    assert "Input/output error" in again.refused.pop().message
    assert again.value("a") == 1.0


def test_a_disk_that_is_full(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session goes on from memory, who waits for a save is told, new sessions are refused, and the next save succeeds."""
    world = make(limit=2)
    world.use("a", 1.0)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vllm_ttt.worker.deltas.delta_file.write", full)
        with pytest.raises(RequestError, match="No space left") as caught:
            world.save("a")
        assert caught.value.status == 507
        assert world.value("a") == 1.0
        world.use("a", 2.0)
        with pytest.raises(RequestError, match="No space left") as caught:
            world.use("c")
        assert caught.value.status == 429
        world.end()
    assert files(world) == []


def test_the_bytes_of_a_state_dir_are_bounded(make: Make) -> None:
    """Older versions go first; then saves are refused, and so are new sessions, until something is removed."""
    world = make(limit=8, keep_versions=3)
    for _ in range(3):
        world.use("a", 1.0)
        world.save("a")
    world.store.limit = int(3.5 * files(world)[0].stat().st_size)
    world.use("b", 1.0)
    world.save("b")
    world.use("c", 1.0)
    world.save("c")
    assert Offline(world.store.folder.root).show("a")["versions"] == [3]
    world.use("d", 1.0)
    with pytest.raises(RequestError, match="disk_gib"):
        world.save("d")
    with pytest.raises(RequestError, match="disk_gib"):
        world.use("e")
    world.tiers.owner.remove(world.ledger.sessions[SessionKey("-", "b")])
    world.run()
    assert world.save("d").version == 1
    assert sum(f.stat().st_size for f in files(world)) <= world.store.limit
    assert world.store.bytes == sum(f.stat().st_size for f in files(world))


def test_a_key_has_so_many_sessions_wherever_they_are(make: Make) -> None:
    world = make(per_key=3)
    for i in range(3):
        world.use(f"s{i}", 1.0)
    world.end()
    again = make(per_key=3)
    with pytest.raises(RequestError, match="per_key") as caught:
        again.use("s3")
    assert caught.value.status == 429
    again.use("s3", tenant="other")
    again.use("s1", 1.0)


def test_a_name_that_has_learned_nothing_takes_no_place(make: Make) -> None:
    world = make(per_key=2)
    for i in range(5):
        world.use(f"n{i}")
    assert world.ledger.quotas.of("-") == 0
    world.use("a", 1.0)
    world.use("n0", 1.0)
    with pytest.raises(RequestError, match="per_key"):
        world.use("b", 1.0)
    assert world.ledger.peek(SessionKey("-", "b")) is None
    world.run()
    assert world.store.count("-") <= 2, "the state dir has none but those that have learned"
    world.end()
    again = make(per_key=2)
    assert again.store.count("-") == again.ledger.quotas.total == 2
    assert again.ledger.peek(SessionKey("-", "n1")) is None
    reader = again.ledger.open(SessionKey("-", "n1"), learns=False)
    again.tiers.left(reader)
    assert again.ledger.quotas.of("-") == 2


def test_names_are_forgotten(make: Make) -> None:
    world = make(limit=1000)
    for i in range(NAMES + 40):
        world.use(f"n{i}")
    world.use("a", 1.0)
    assert len(world.ledger.sessions) == NAMES + 1
    assert world.tiers.placed == NAMES + 1
    world.step()
    assert f"n{NAMES}" in {key.name for key in world.ledger.sessions}, "the first are forgotten first"


def test_leftovers_are_removed_and_unknown_files_do_not_exist(make: Make) -> None:
    world = make()
    session = world.use("a", 1.0)
    world.save("a")
    world.crash()
    folder = world.store.folder.sessions / session.uid[:2]
    drawn = f"{session.uid}-0123abcd.safetensors"
    for name in (drawn, f".{drawn}.89abcdef", "notes.txt"):
        (folder / name).write_bytes(files(world)[0].read_bytes())
    for name in ("vllm-ttt-" + 32 * "a" + ".safetensors", "thesis.docx"):
        (world.store.folder.exports / name).write_bytes(b"x")
    offline = Offline(world.store.folder.root).fsck()
    assert offline["problems"] == []
    assert offline["leftovers"] == sorted(f"sessions/{session.uid[:2]}/{name}" for name in (f".{drawn}.89abcdef", drawn))
    again = make()
    assert sorted(path.name for path in folder.iterdir())[1:] == ["notes.txt"], "what is not called as ours are is not ours"
    assert [path.name for path in again.store.folder.exports.iterdir()] == ["thesis.docx"]
    assert again.value("a") == 1.0


def test_a_session_that_has_learned_nothing_keeps_its_name_without_a_place(tmp_path: Path) -> None:
    """What it was sent was not worth learning, and its owner still finds it; there is nothing that the state dir could keep."""
    world = World(tmp_path / "state", limit=2)
    blank = world.use("blank")
    adapter = blank.adapter
    for name in ("a", "b", "c"):
        world.use(name, 1.0)
        world.save(name)
    assert world.ledger.sessions.get(blank.key) is blank
    assert (blank.life.state, world.tiers.placed) == (State.NEW, 2)
    assert adapter not in world.trainer.deltas.sessions
    assert world.value("blank") == 0.0
    world.end()
