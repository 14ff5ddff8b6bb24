"""The preset `head`, without an engine: its step beside autograd and the plain loop, its table of deltas, its settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.geometry import Geometry
from vllm_ttt.types import FileOrder, FileReport, RequestPlan
from vllm_ttt.worker import memory
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.states import States
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.deltas import peft
from vllm_ttt.worker.deltas.delta_file import FileError
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.files import Files
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.serve.head_runner import HeadRunnerV1
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.serve.replaced import replaced
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.micro_step import accumulate

pytestmark = pytest.mark.unit

D, V, R, CHUNK = 24, 80, 8, 16
#: Of each session of a batch.
ROWS = (12, 5, 9)


def config_of(**learn: Any) -> TTTConfig:
    learn = {"chunk": CHUNK, "min_chunk": 1, "max_loss": 2.0, **learn}
    return parse_config({"adapt": {"rank": R}, "learn": learn, "guard": {"every": 0}, "sessions": {"resident": 2}}, "head")


def head_of(dtype: torch.dtype = torch.float32, **more: Any) -> Head:
    draw = torch.Generator().manual_seed(3)
    a = torch.linalg.qr(torch.randn(D, R, generator=draw))[0].T.contiguous()
    return Head(0.3 * torch.randn(V, D, generator=draw).to(dtype), a.to(dtype), **more)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """States, tokens and weights [S, C]; what fills up the shorter ones weighs nothing."""
    draw, C = torch.Generator().manual_seed(4), max(ROWS)
    y, t = torch.randn(len(ROWS), C, D, generator=draw), torch.randint(0, V, (len(ROWS), C), generator=draw)
    weight = torch.stack([(torch.arange(C) < n).float() / n for n in ROWS])
    return y, t, weight


MORE = [{}, {"bias_V": torch.linspace(-1, 1, V)}, {"soft_cap": 3.0}, {"logit_scale": 0.4}]


@pytest.mark.parametrize("more", MORE, ids=" ".join)
def test_the_gradient_is_autograds(more: dict[str, Any]) -> None:
    """In float64, session by session; with what some models do to their logits."""
    head, (y, t, weight) = head_of(**more), batch()
    delta, grad = head.zeros(len(ROWS)), head.zeros(len(ROWS))
    delta.thin.normal_(std=0.2, generator=torch.Generator().manual_seed(5))
    rows = torch.zeros(2, *weight.shape)
    losses = accumulate(head, delta, y, None, t, weight, grad, None, rows)
    assert torch.allclose(accumulate(head, delta, y, None, t, weight, None), losses, atol=1e-6)
    W, A = head.head_VD.double(), head.ay_RD.double()
    for s, n in enumerate(ROWS):
        B, states = delta.thin[s, 0].double().requires_grad_(), y[s, :n].double()
        logits = (states + (states @ A.T) @ B.T) @ W.T
        if head.bias_V is not None:
            logits = logits + head.bias_V.double()
        if head.soft_cap is not None:
            logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
        each = cross_entropy(logits * head.logit_scale, t[s, :n], reduction="none")
        assert losses[s].item() == pytest.approx(each.mean().item(), rel=1e-5)
        assert torch.allclose(rows[0, s, :n].double() * n, each, rtol=1e-4)
        assert torch.allclose(rows[1, s, :n].double(), -(logits * head.logit_scale).log_softmax(-1).amax(-1), rtol=1e-4)
        (expected,) = torch.autograd.grad(each.mean(), B)
        assert ((grad.thin[s, 0] - expected).norm() / expected.norm()).item() < 1e-5


class Served:
    """A worker's parts around tiny states, and sessions that send them."""

    def __init__(self, config: TTTConfig, head: Head):
        self.head, self.chunk = head, config.learn.chunk
        self.states = States(head.head_VD.shape[1], 256, torch.float32, torch.device("cpu"))
        self.backlog = Backlog(6, self.chunk, config.learn.min_chunk, self.states.h_ND, self.states.a_NQ)
        self.deltas = Deltas(head, config.sessions.resident, config.learn.rate)
        self.slots = HeadSlots(head, self.deltas, config.sessions.resident)
        probe = Probe(1, self.states.h_ND, self.states.a_NQ)
        self.trainer, self.sent = Trainer(head, config, self.backlog, self.deltas, self.slots, probe), 0

    def learn(self, key: int, y: Tensor, tokens: list[int]) -> None:
        """One request whose states are ``y`` [T, D]."""
        self.sent += 1
        name, pairs = f"r{self.sent}", len(tokens) - 1
        self.trainer.start(name, RequestPlan(key, len(tokens), learn=True, learn_output=False))
        self.states.ran(SimpleNamespace(hidden_states=y))
        self.backlog.take([Rows(name, 0, 0, torch.tensor(tokens[1:]))], self.states.h_ND, self.states.a_NQ)
        self.states.taken()
        self.backlog.finish(name, pairs)
        while self.backlog.queues:
            self.trainer.learn(self.chunk)
        self.trainer.collect(wait=True)
        self.trainer.sync()

    def delta(self, key: int) -> Tensor:
        return self.deltas.read(key).delta.thin[0, 0]

    def serve(self, y: Tensor, *keys: int | None) -> Tensor:
        """y' of rows of such sessions."""
        for key in keys:
            if key is not None:
                self.slots.start(f"of {key}", key)
        found = self.slots.adapt(y, [None if key is None else f"of {key}" for key in keys])
        for key in keys:
            self.slots.finish(f"of {key}")
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm_ttt.eval.oracle import load_model

    return load_model(tiny_model("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024))


def test_the_trainers_delta_is_the_plain_loops(model: nn.Module) -> None:
    """Whole chunks and a rest, request after request; what is served afterwards is what the loop says."""
    config = parse_config({"adapt": {"rank": 16}, "learn": {"chunk": 64, "max_loss": 2.0}, "guard": {"every": 0}}, "head")
    oracle = HeadOracle(model, config)
    served, draw = Served(config, Head(oracle.head, oracle.A)), torch.Generator().manual_seed(6)
    for length in (129, 90, 200):
        ids = torch.randint(0, 40, (length,), generator=draw).tolist()
        assert len(oracle.learn(ids)) > 1
        served.learn(7, oracle.states(ids), ids)
    session = served.deltas.session(7)
    assert session.version == oracle.version == 7
    assert session.rate == pytest.approx(oracle.rate, rel=1e-3)
    expected = oracle.B[0]["y"]
    assert ((served.delta(7) - expected).norm() / expected.norm()).item() < 0.02
    y = oracle.states(ids)[:-1]
    moved = served.serve(y, *[7] * len(y))
    losses = cross_entropy(moved @ oracle.head.T, torch.tensor(ids[1:]), reduction="none")
    assert torch.allclose(losses, oracle.score(ids), atol=1e-3)
    assert (losses - oracle.nll(torch.zeros_like(expected), y, torch.tensor(ids[1:]))).abs().max() > 0.1, "it must matter"


def test_the_plain_loop_is_the_models_own(model: Any) -> None:
    """With no delta its losses are the model's."""
    ids = torch.randint(0, 320, (50,), generator=torch.Generator().manual_seed(8)).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    expected = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    assert torch.allclose(HeadOracle(model).score(ids), expected, atol=1e-4)


def moving(*keys: int) -> Served:
    """Sessions with deltas of their own; two of them have slots at once."""
    served = Served(config_of(), head_of())
    for key in keys:
        served.deltas.row(key)
        served.deltas.read(key).delta.thin.normal_(generator=torch.Generator().manual_seed(key))
    return served


def test_each_row_gets_its_own_sessions_delta_and_others_keep_their_bits() -> None:
    served, y = moving(1, 2), torch.randn(5, D, generator=torch.Generator().manual_seed(9)).bfloat16()
    before = y.clone()
    found = served.serve(y, 1, None, 2, 1, None)
    assert torch.equal(y, before), "the states that are kept stay as they were"
    assert torch.equal(found[[1, 4]], y[[1, 4]])
    for row, key in ((0, 1), (2, 2), (3, 1)):
        state = y[row].float()
        expected = (state + served.delta(key) @ (served.head.ay_RD @ state)).bfloat16()
        assert torch.allclose(found[row].float(), expected.float(), rtol=0.01, atol=0.01)
    assert served.serve(y, None, None, None, None, None) is y


def test_a_slot_is_given_to_who_is_served_and_the_others_come_back() -> None:
    served, y = moving(1, 2, 3), torch.randn(1, D)
    first = served.serve(y, 1)
    served.serve(y, 2)
    served.serve(y, 3)
    assert served.slots.held() == [2, 3], "who was served least recently goes"
    assert torch.equal(served.serve(y, 1), first)
    served.slots.drop(3)
    assert sorted(served.slots.held()) == [1]


def test_what_is_served_follows_the_master_when_it_is_told() -> None:
    """A prompt is read to its end under the delta that it began with, also where its session loses its slot meanwhile."""
    served, y = moving(1, 2, 3), torch.randn(1, D)
    old, session = served.serve(y, 1), served.deltas.session(1)
    master = served.deltas.read(1).delta
    session.serving = master.by(*(x.clone() for x in master.tensors()))
    master.thin.mul_(2)
    assert torch.equal(served.serve(y, 1), old)
    served.serve(y, 2)
    served.serve(y, 3)
    assert not served.slots.holds(1)
    assert torch.equal(served.serve(y, 1), old), "what fills its slot is what is being served"
    served.slots.write(1, session)
    assert torch.allclose(served.serve(y, 1) - y, 2 * (old - y), atol=1e-5)


def test_a_slot_that_cannot_be_written_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    served = moving(1)
    served.serve(torch.randn(1, D), 1)

    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(served.slots, "_copy", broken)
        with pytest.raises(RuntimeError, match="planted"):
            served.slots.write(1, served.deltas.session(1))
    assert not served.slots.holds(1)


def test_a_slot_that_cannot_be_filled_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it is another session's."""
    served, y = moving(1, 2), torch.randn(1, D)
    assert not torch.equal(served.serve(y, 1), y)
    served.serve(y, 2)

    def full(_: int) -> Any:
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(served.deltas, "fresh_state", full)
        with pytest.raises(torch.OutOfMemoryError, match="planted"):
            served.serve(y, 3)
    assert not served.slots.holds(3)
    assert torch.equal(served.serve(y, 3), y), "it has learned nothing"
    assert len(served.slots.held()) == 2


def test_a_row_that_cannot_be_written_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    served = moving(1, 2)
    free = len(served.deltas.free)

    def broken(*_: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(served.deltas, "_write", broken)
        with pytest.raises(RuntimeError, match="planted"):
            served.deltas.row(3)
    assert 3 not in served.deltas.rows
    assert len(served.deltas.free) == max(1, free), "another session has made room"
    assert not served.delta(3).any()
    assert served.deltas.row(3) is not None
    assert not served.delta(3).any()


def test_replaced_gives_back_what_was_there() -> None:
    class Owner:
        def say(self) -> str:
            return "class"

    owner = Owner()
    with replaced(owner, "say", lambda: "outer"):
        with replaced(owner, "say", lambda: "inner"):
            assert owner.say() == "inner"
        assert owner.say() == "outer"
    assert owner.say() == "class"
    assert not vars(owner)


class Runner:
    """What of vLLM's model runner makes logits: a batch of three requests, of 3, 1 and 4 tokens; those of drafts, too."""

    def __init__(self, W: Tensor):
        self.model, self.hidden = Model(W), torch.randn(8, D, generator=torch.Generator().manual_seed(12))
        self.query_start_loc = SimpleNamespace(np=[0, 3, 4, 8])
        self.input_batch = SimpleNamespace(req_ids=["old"], req_id_to_index={"a": 0, "base": 1, "b": 2})
        self.num_prompt_logprobs = {"base": 0, "b": 0}

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Tensor:
        self.input_batch.req_ids = list(scheduler_output.num_scheduled_tokens)  # the batch is ordered in here
        drafts = [len(scheduler_output.scheduled_spec_decode_tokens.get(name, ())) for name in self.input_batch.req_ids]
        ends = zip((2, 3, 7), drafts, strict=False)
        return self.model.compute_logits(self.hidden[[row for last, n in ends for row in range(last - n, last + 1)]])

    def _get_prompt_logprobs_dict(self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Tensor]:
        parts = {"base": slice(3, 4), "b": slice(4, 7)}
        return {name: self.model.compute_logits(hidden_states[part]) for name, part in parts.items()}


def batch_of(scheduled: dict[str, int], drafts: dict[str, list[int]] | None = None) -> Any:
    """What the scheduler says of a batch."""
    return SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens=drafts or {})


class Model:
    def __init__(self, W: Tensor):
        self.W = W

    def compute_logits(self, states: Tensor) -> Tensor:
        return states @ self.W.T


def test_the_runner_serves_each_request_with_its_sessions_delta() -> None:
    """Sampled tokens and prompts; the states that it keeps, and a request of nobody, stay as they are."""
    served, failures = moving(1, 2), list[str]()
    W = served.head.head_VD
    runner: Any = Runner(W)
    HeadRunnerV1.adopt(runner, served.slots, failures.append)
    hidden, batch = runner.hidden.clone(), batch_of({"a": 3, "base": 1, "b": 4})
    plain = runner.execute_model(batch)
    assert torch.equal(plain, hidden[[2, 3, 7]] @ W.T), "nobody is a session's"
    served.slots.start("a", 1)
    served.slots.start("b", 2)
    found = runner.execute_model(batch)
    for row, state, key in ((0, 2, 1), (2, 7, 2)):
        assert torch.allclose(found[row], served.serve(hidden[state][None], key)[0] @ W.T, atol=1e-4)
        assert (found[row] - plain[row]).abs().max() > 0.1
    assert torch.equal(found[1], plain[1])
    prompts = runner._get_prompt_logprobs_dict(runner.hidden, batch.num_scheduled_tokens)
    assert torch.equal(prompts["base"], hidden[3:4] @ W.T)
    assert torch.allclose(prompts["b"], served.serve(hidden[4:7], 2, 2, 2) @ W.T, atol=1e-4)
    assert torch.equal(runner.hidden, hidden)
    assert not failures
    assert torch.equal(runner.model.compute_logits(hidden), hidden @ W.T), "outside of a batch the model is as it was"


def test_rows_of_drafts_are_their_sessions() -> None:
    """Two drafts of one session and one of another, with a request of nobody between them."""
    served, failures = moving(1, 2), list[str]()
    W = served.head.head_VD
    runner: Any = Runner(W)
    HeadRunnerV1.adopt(runner, served.slots, failures.append)
    served.slots.start("a", 1)
    served.slots.start("b", 2)
    hidden, drafts = runner.hidden.clone(), {"a": [5, 6], "b": [7]}
    found = runner.execute_model(batch_of({"a": 3, "base": 1, "b": 4}, drafts))
    rows = {0: 1, 1: 1, 2: 1, 3: None, 6: 2, 7: 2}
    assert len(found) == len(rows)
    for logits, (state, key) in zip(found, rows.items(), strict=True):
        y = hidden[state] if key is None else served.serve(hidden[state][None], key)[0]
        assert torch.allclose(logits, y @ W.T, atol=1e-4)
    assert not failures


def test_what_cannot_be_applied_is_counted_and_the_base_model_answers() -> None:
    served, failures = moving(1), list[str]()

    class Other(Runner):
        def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Tensor:
            self.input_batch.req_ids = ["a"]
            return self.model.compute_logits(self.hidden[[2, 3, 7]])

    runner: Any = Other(served.head.head_VD)
    HeadRunnerV1.adopt(runner, served.slots, failures.append)
    served.slots.start("a", 1)
    found = runner.execute_model(batch_of({"a": 8}, drafts={"a": [5]}))  # two rows, says the scheduler, and there are three
    assert torch.equal(found, runner.hidden[[2, 3, 7]] @ served.head.head_VD.T)
    assert len(failures) == 1


def test_an_adapter_of_lm_head_is_the_delta() -> None:
    """W y + lora_B lora_A y = W (y + B A y), whatever lm_head is."""
    head, geometry = head_of(), Geometry(0, R, 0, D, 0, 0, modules=("lm_head",))
    assert geometry.shapes == {"lm_head": (D, R)}
    b = torch.randn(D, R)
    (exported,) = head.exported({"lm_head": b}).values()
    y = torch.randn(5, D)
    expected = (y + (y @ head.ay_RD.T) @ b.T) @ head.head_VD.T
    assert torch.allclose(y @ head.head_VD.T + (y @ head.ay_RD.T) @ exported.T, expected, atol=1e-4)
    assert peft.config(geometry, "m")["target_modules"] == ["lm_head"]
    with pytest.raises(FileError, match="takes no adapter"):
        peft.read_adapter(b"", {}, geometry)


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    """And learns on as if nothing had happened to it."""
    config, draw = config_of(), torch.Generator().manual_seed(11)
    texts = [(torch.randn(40, D, generator=draw), torch.randint(0, V, (40,), generator=draw).tolist()) for _ in range(3)]
    servers = [Served(config, head_of()) for _ in range(3)]
    for server in servers[:2]:
        server.learn(7, *texts[0])
        server.learn(7, *texts[1])
    geometry, path = Geometry(0, R, 0, D, 0, 0, modules=("lm_head",)), tmp_path / "one.safetensors"
    files = [Files(server.trainer, geometry, "tiny") for server in servers]
    saved = ordered(files[1], FileOrder("save", 7, str(path), metadata={}))
    loaded = ordered(files[2], FileOrder("load", 7, str(path), checksum=saved.checksum))
    assert (saved.version, loaded.version) == (6, 6)
    for server in (servers[0], servers[2]):
        server.learn(7, *texts[2])
    assert torch.equal(servers[0].delta(7), servers[2].delta(7))
    assert not torch.equal(servers[0].delta(7), servers[1].delta(7))


def ordered(files: Files, order: FileOrder) -> FileReport:
    """What has become of an order."""
    files.step([order])
    while not files.idle:
        files.step([])
    report = files.take_reports()[-1]
    assert report.outcome == "done", report.error
    return report


def test_settings() -> None:
    config = parse_config(None, "head")
    assert (config.adapt.rank, config.adapt.letters, config.adapt.in_slots) == (512, "y", False)
    hf = SimpleNamespace(hidden_size=384, num_hidden_layers=8)  # nothing else of the model counts
    geometry = Geometry.of(hf, config.adapt)
    assert (geometry.rank, geometry.bytes) == (384, 6 * 384 * 384 + 4), "no rank beyond the hidden size"
    assert Geometry.from_json(geometry.to_json()) == geometry
    for adapt, preset, says in (
        ({"modules": ["o_proj"]}, "head", "modules must be lm_head alone with the preset head"),
        ({"modules": ["lm_head"]}, "deep", "lm_head has a delta with no other"),
        ({"modules": ["lm_head", "o_proj"]}, "last", "lm_head has a delta with no other"),
        ({"layers": 2}, "head", "layers must be 1 with the preset head"),
    ):
        with pytest.raises(ConfigError, match=says):
            parse_config({"adapt": adapt}, preset)


def test_needs_are_the_bytes_of_the_buffers() -> None:
    data = {"adapt": {"rank": R}, "sessions": {"resident": 3}, "schedule": {"backlog_tokens": 1024}, "cache": {"orders": 0}}
    config = parse_config(data, "head")
    geometry, head = Geometry(0, R, 0, D, 0, 0, modules=("lm_head",)), head_of(torch.bfloat16)
    deltas, states = Deltas(head, 3, 0.01), States(D, 64, torch.bfloat16, torch.device("cpu"))
    assert deltas.bytes_per_session() == geometry.bytes
    backlog = Backlog(memory.pages(config), config.learn.chunk, 8, states.h_ND, states.a_NQ)
    probe = Probe(config.guard.probe_tokens, states.h_ND, states.a_NQ)
    buffers = [*deltas.masters.tensors(), backlog.h_PCD, backlog.x_PC, backlog.t_PC, probe.h_PD, probe.x_P, probe.t_P]
    buffers += [head.ay_RD, head.logits, HeadSlots(head, deltas, 3).b_KDR]
    assert sum(memory.needs(geometry, config, 64, 2, V, 512, 2).values()) == sum(x.nbytes for x in buffers)


def test_a_delta_has_one_matrix() -> None:
    delta = Delta.zeros("y", 1, 2, D, 0, R)
    assert [(name, tuple(x.shape)) for name, x in delta.parts()] == [("y", (2, D, R))]
    assert [tuple(x.shape) for x in delta.matrices()] == [(D, R)]
    assert delta.layers == 1
