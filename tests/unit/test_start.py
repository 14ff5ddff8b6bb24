"""Starting: what is refused, with its reason; and that an installed plugin which nobody asked for changes nothing."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ttt import engine_args, plugin, support, tensor_parallel
from vllm_ttt.config import EXPERIMENTS, CacheConfig, TTTConfig
from vllm_ttt.engine.storage.store import open_store
from vllm_ttt.errors import ConfigError, PatchContractError
from vllm_ttt.patches import _contract
from vllm_ttt.state_dir import SECRET_VARIABLE

pytestmark = pytest.mark.unit

MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def from_flags(*flags: str) -> Any:
    """EngineArgs as `vllm serve` makes them."""
    parser: Any = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", str(MODEL), "--max-model-len", "256", *flags]))


def offline(**options: Any) -> Any:
    return EngineArgs(**{"model": str(MODEL), "max_model_len": 256, "enforce_eager": True, **engine_args(), **options})


def test_flags_become_a_config(tmp_path: Path) -> None:
    file = tmp_path / "ttt.yaml"
    file.write_text("sessions: {resident: 3}\nadapt: {rank: 32}")
    made = from_flags("--plugin", "ttt", "--ttt-config", str(file), "--enforce-eager").create_engine_config()
    config = plugin.config_of(made)
    assert config is not None
    assert config.sessions.resident == made.lora_config.max_loras == 3
    assert made.lora_config.max_lora_rank == 32
    assert made.scheduler_config.scheduler_cls.endswith("TTTScheduler")
    assert made.parallel_config.worker_cls.endswith("TTTCPUWorker")
    assert sorted(made.lora_config.target_modules) == [
        f"model.layers.{i}.{name}" for i in range(8) for name in ("mlp.down_proj", "self_attn.o_proj")
    ]
    last = from_flags("--plugin", "ttt", "--ttt-preset", "last", "--enforce-eager").create_engine_config()
    assert last.lora_config.max_lora_rank == 128
    assert sorted(last.lora_config.target_modules) == [
        f"model.layers.7.{name}" for name in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj")
    ], "only the adapted layers, and modules, have slots"


def test_compiled_as_without_ttt() -> None:
    """vLLM switches compilation off for LoRA on the CPU; a base request would then get other bits than from stock vLLM."""
    with_ttt = offline(enforce_eager=False).create_engine_config()
    without = offline(enforce_eager=False, additional_config={}).create_engine_config()
    assert with_ttt.compilation_config.mode == without.compilation_config.mode


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--plugin", "nothing"), "--plugin nothing: no such vLLM plugin is installed; installed: "),
        (("--ttt-preset", "last"), "--ttt-preset needs --plugin ttt"),
        (("--ttt-config", "x.yaml"), "--ttt-config needs --plugin ttt"),
        (("--ttt-state-dir", "x"), "--ttt-state-dir needs --plugin ttt"),
        (("--plugin", "ttt", "--ttt-state-dir", ""), "needs the name of a folder"),
        (("--plugin", "ttt", "--ttt-state-dir", "/dev/null/x"), "cannot be used"),
        (("--plugin", "ttt", "--ttt-config", "missing.yaml"), "--ttt-config missing.yaml: No such file"),
        (("--plugin", "ttt", "--ttt-preset", "wide"), "preset 'wide' is not available; allowed: deep, last"),
    ],
)
def test_flags_that_are_refused(flags: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TTT_SECRET", raising=False)
    with pytest.raises(ConfigError) as error:
        from_flags(*flags)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "changed", "says"),
    [
        ({}, {}, None),
        ({**engine_args("last")}, {}, None),
        ({**engine_args("head")}, {}, "and the preset head"),
        ({}, {"device_config.device_type": "cuda"}, None),
        ({}, {"model_config.quantization": "fp8"}, "and a quantised model"),
        ({}, {"speculative_config": object()}, "and --speculative-config"),
        ({}, {"parallel_config.nnodes": 2}, "and several machines"),
        ({}, {"parallel_config.distributed_executor_backend": "ray"}, "and --distributed-executor-backend ray"),
        ({}, {"parallel_config.enable_batch_sharded_sampling": True}, "and --enable-batch-sharded-sampling"),
        ({}, {"parallel_config.data_parallel_size": 2}, "and --data-parallel-size"),
    ],
)
def test_which_ranks_are_refused(
    options: dict[str, Any], changed: dict[str, Any], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = offline().create_engine_config()
    made.parallel_config.tensor_parallel_size = 2
    for path, value in changed.items():
        *part, name = path.split(".")
        monkeypatch.setattr(getattr(made, part[0]) if part else made, name, value)
    config = TTTConfig.model_validate((options or engine_args())["additional_config"]["ttt"]["config"])
    if says is None:
        tensor_parallel.check(made, config)
        assert offline(tensor_parallel_size=2, **options).create_engine_config().parallel_config.world_size == 2
        return
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size 2 is not supported with --plugin ttt {says}"):
        tensor_parallel.check(made, config)


def test_ranks_share_what_the_host_holds() -> None:
    """o and down are whole on each rank: so many fewer sessions fit."""
    hf, config = ModelConfig(str(MODEL)).hf_text_config, plugin.config_of(offline().create_engine_config())
    assert config is not None
    one, two = (support.max_sessions(hf, config, ranks) - config.sessions.resident for ranks in (1, 2))
    assert one == pytest.approx(2 * two, abs=2), "the default adapts those two alone"


def test_a_state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: a dir in use is refused, and one of another model or other settings, by name."""
    monkeypatch.delenv("TTT_SECRET", raising=False)
    monkeypatch.setenv(EXPERIMENTS, "1")
    state, flags = tmp_path / "state", ("--plugin", "ttt", "--enforce-eager", "--ttt-state-dir")
    made = from_flags(*flags, str(state)).create_engine_config()
    config = plugin.config_of(made)
    assert config is not None
    assert config.sessions.state_dir == str(state)
    assert made.shutdown_timeout == 60, "vLLM would kill the engine core before it has saved"
    assert from_flags(*flags, str(state), "--shutdown-timeout", "7").create_engine_config().shutdown_timeout == 7
    assert os.environ["TTT_SECRET"] == (state / "secret").read_text().strip()
    store = open_store(made, config)
    assert store is not None
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        from_flags(*flags, str(state)).create_engine_config()
    store.close()
    other = tmp_path / "ttt.yaml"
    for changed, says in (
        ("rank: 32", r"adapt\.rank 64, and this server has 32"),
        ("layers: 4", r"adapt\.layers 8, and this server has 4"),
        ("modules: [down_proj]", r"adapt\.modules"),
    ):
        other.write_text(f"adapt: {{{changed}}}")
        with pytest.raises(ConfigError, match=says):
            from_flags(*flags, str(state), "--ttt-config", str(other)).create_engine_config()
    key, sealed = tmp_path / "key", str(tmp_path / "sealed")
    key.touch(mode=0o600)
    key.write_bytes(bytes(32))
    other.write_text(f"sessions: {{key_file: {key}}}")
    made = from_flags(*flags, sealed, "--ttt-config", str(other)).create_engine_config()
    config = plugin.config_of(made)
    assert config is not None
    store = open_store(made, config)
    assert store is not None
    store.close()
    with pytest.raises(ConfigError, match=r"is encrypted: sessions\.key_file"):
        from_flags(*flags, sealed).create_engine_config()
    other.write_text("sessions: {audit_log: audit.jsonl}")
    with pytest.raises(ConfigError, match="name a full path"):
        from_flags("--plugin", "ttt", "--enforce-eager", "--ttt-config", str(other)).create_engine_config()
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = next(iter(sorted(model.glob("*.safetensors"))))
    data = bytearray(weights.read_bytes())
    data[-5:] = b"other"
    weights.write_bytes(data)
    with pytest.raises(ConfigError, match=f"sessions of the model .*, and this server serves another: {model}"):
        from_flags(*flags, str(state), "--model", str(model)).create_engine_config()


def test_several_engines_share_a_state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its shelf; and one server uses the dir, however many engines it has, and another one would have."""
    monkeypatch.delenv("TTT_SECRET", raising=False)
    state = tmp_path / "state"
    flags = ("--plugin", "ttt", "--enforce-eager", "--ttt-state-dir", str(state), "--data-parallel-size")
    one, two = (from_flags(*flags, count).create_engine_config() for count in ("1", "2"))
    assert (plugin.engines_of(one), plugin.engines_of(two)) == (1, 2)
    assert "engines" not in one.additional_config["ttt"], "one engine is what it always was"
    two.parallel_config.reconfigure_for_independent_dp_rank()  # as vLLM does in each engine core
    stores = []
    for engine, folder in enumerate((state, state / "engine-1")):
        two.parallel_config.data_parallel_index = engine
        config = plugin.config_of_engine(two)
        assert config.sessions.state_dir == str(folder)
        stores.append(open_store(two, config))
    for count in ("1", "2", "3"):
        with pytest.raises(ConfigError, match=f"the state dir {state} is in use by process {os.getpid()}"):
            from_flags(*flags, count).create_engine_config()
    stores[0].close()
    for count in ("1", "2", "3"):
        with pytest.raises(ConfigError, match=f"engine-1 is in use by process {os.getpid()}"):
            from_flags(*flags, count).create_engine_config()
    stores[1].close()
    from_flags(*flags, "3").create_engine_config()
    assert {path.name for path in state.glob("engine-*") if path.is_dir()} == {"engine-1", "engine-2"}

    # What the two engines have placed others have changed before they could open it.
    two.parallel_config.data_parallel_index = 0
    with pytest.raises(ConfigError, match="start this server again"):
        open_store(two, plugin.config_of_engine(two))
    from_flags(*flags, "2").create_engine_config()
    with contextlib.closing(sqlite3.connect(state / "sessions.db")) as db, db:
        db.execute("INSERT INTO sessions VALUES ('u', '-', 'carol', 1.0, 1.0, '{}', '{}')")
    with pytest.raises(ConfigError, match="start this server again"):
        open_store(two, plugin.config_of_engine(two))
    shared = tmp_path / "ttt.yaml"
    shared.write_text("sessions: {shared: true}")
    with pytest.raises(ConfigError, match=r"start once with --data-parallel-size 1 and without sessions\.shared"):
        from_flags(*flags, "1", "--ttt-config", str(shared)).create_engine_config()
    from_flags(*flags, "1").create_engine_config()
    from_flags(*flags, "1", "--ttt-config", str(shared)).create_engine_config()

    with pytest.raises(ConfigError, match="--data-parallel-size 2 is not supported with --plugin ttt and a script"):
        offline(data_parallel_size=2).create_engine_config()


def test_a_new_secret_is_taken_where_no_key_has_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for secret in "ab":
        monkeypatch.setenv(SECRET_VARIABLE, 64 * secret)
        made = from_flags("--plugin", "ttt", "--enforce-eager", "--ttt-state-dir", str(tmp_path / "s")).create_engine_config()
        config = plugin.config_of(made)
        assert config is not None
        store = open_store(made, config)
        assert store is not None
        store.close()


def test_a_server_that_is_not_http_is_refused() -> None:
    """It has no routes for sessions, and no answers for their ``ttt``."""
    parser: Any = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(MODEL), "--plugin", "ttt"])
    args.grpc = True
    with pytest.raises(ConfigError, match="--grpc cannot be combined with --plugin ttt"):
        EngineArgs.from_cli_args(args)


@pytest.mark.parametrize(
    ("text", "says"), [("lern: {}", "lern: unknown key"), ("learn: {chunk: 5}", "learn.chunk: Input should be greater than")]
)
def test_config_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "ttt.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        from_flags("--plugin", "ttt", "--ttt-config", str(file))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_lora": True}, "--enable-lora and --lora-modules cannot be combined with --plugin ttt"),
        ({"fully_sharded_loras": True}, "--fully-sharded-loras is not supported"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls cannot be combined"),
        ({"runner": "pooling"}, "--runner pooling is not supported with --plugin ttt"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "cpu_worker.CPUWorker cannot be combined with --plugin ttt"),
        ({"worker_cls": "no.such.Worker"}, "--worker-cls no.such.Worker cannot be imported"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode is not supported with --plugin ttt: the deltas"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds is not supported with --plugin ttt"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "--weight-transfer-config is not supported with --plugin ttt"),
        (
            {"enable_chunked_prefill": False, **engine_args("last", {"learn": {"interleave": True}})},
            "learn.interleave reads prompts in chunks; leave out --no-enable-chunked-prefill",
        ),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        offline(**options).create_engine_config()
    assert says in str(error.value)


def test_adapters_are_served_beside_the_preset_head() -> None:
    made = offline(enable_lora=True, max_lora_rank=8, **engine_args("head")).create_engine_config()
    assert made.lora_config.max_lora_rank == 8, "they are vLLM's alone"
    assert made.lora_config.target_modules is None


@pytest.mark.parametrize("start", [offline, lambda: from_flags("--plugin", "ttt", "--enforce-eager")], ids=["offline", "serve"])
def test_adapters_at_run_time_are_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable opens vLLM's route and its resolver plugins, whose adapters would have the ids of sessions."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    with pytest.raises(ConfigError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING cannot be combined with --plugin ttt; unset it"):
        start().create_engine_config()
    offline(additional_config={}).create_engine_config()  # who does not ask for ttt is not stopped


@pytest.mark.parametrize(
    ("version", "device", "supported", "says"),
    [
        ("0.32.0", "cuda", True, "supported"),
        ("0.32.1+cpu", "cpu", True, "supported"),
        ("0.33.0", "cuda", True, "nothing of it has been run with vllm-ttt"),
        ("0.33.0", "cpu", False, "vllm-ttt supports vLLM 0.32 on a CPU"),
        ("0.34.0", "cuda", False, "vllm-ttt supports vLLM 0.32 and 0.33"),
    ],
)
def test_releases_of_vllm(version: str, device: str, supported: bool, says: str) -> None:
    """One that was never run says so."""
    found = support.release(version, device)
    assert found[:2] == (f"vLLM {version}", supported)
    assert found[2].endswith(says)


def test_the_front_end_in_rust_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers in the place of the API server, and loads no plugins. A script has no front end."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigError, match=r"VLLM_USE_RUST_FRONTEND cannot be combined with --plugin ttt; unset it: .* in Rust"):
        from_flags("--plugin", "ttt", "--enforce-eager").create_engine_config()
    from_flags("--enforce-eager").create_engine_config()  # who does not ask for ttt is not stopped
    assert plugin.config_of(offline().create_engine_config()) is not None


def test_a_worker_of_ours_may_be_extended() -> None:
    ours = "vllm_ttt.worker.cpu_worker.TTTCPUWorker"
    assert offline(worker_cls=ours).create_engine_config().parallel_config.worker_cls == ours


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("prefill_context_parallel_size", 2, "--prefill-context-parallel-size is not supported"),
        ("decode_context_parallel_size", 2, "--decode-context-parallel-size is not supported"),
        ("enable_dbo", True, "--enable-dbo"),
        ("ubatch_size", 4, "--enable-dbo (or --ubatch-size) is not supported"),
    ],
)
def test_ways_to_run_in_parallel_that_are_refused(name: str, value: Any, says: str) -> None:
    """vLLM itself refuses most of them on a CPU, before we see them."""
    made = offline(additional_config={}).create_engine_config()
    setattr(made.parallel_config, name, value)
    with pytest.raises(ConfigError, match=re.escape(says)):
        support.finish_vllm_config(made, TTTConfig())


def test_sessions_have_caches_by_default() -> None:
    """The processes read a number, and what the user gave stays as it was: a second server may be made of it."""
    for given, orders in ({}, 6), ({"cache": {"orders": 0}}, 0), ({"cache": {"orders": 3}}, 3):
        arguments = engine_args(config=given)
        before = json.dumps(arguments)
        config = plugin.config_of(offline(**arguments).create_engine_config())
        assert config is not None
        assert (config.cache.orders, json.dumps(arguments)) == (orders, before)


@pytest.mark.parametrize("flag", ["--enable-batch-sharded-sampling", "--speculative-config on CUDA"])
def test_where_caches_cannot_be_mixed_in(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has asked for none is served without, and told so; who has is refused."""
    made, logged = offline(additional_config=engine_args()["additional_config"]).create_engine_config(), list[str]()
    if "CUDA" in flag:
        made.device_config.device_type, made.speculative_config = "cuda", SimpleNamespace(method="ngram")  # type: ignore[assignment]
    else:
        made.parallel_config.enable_batch_sharded_sampling = True
    says = f"{flag} is not supported with cache.orders above 0; leave it out, or set cache.orders to 0"
    with pytest.raises(ConfigError, match=re.escape(says)):
        support.settle_cache(made, TTTConfig(cache=CacheConfig(orders=6)))
    monkeypatch.setattr(support.logger, "warning", lambda text, *values: logged.append(text % values))
    assert support.settle_cache(made, TTTConfig(cache=CacheConfig(orders=0))).cache.orders == 0
    assert not logged
    assert support.settle_cache(made, TTTConfig()).cache.orders == 0
    config = plugin.config_of(made)
    assert config is not None
    assert config.cache.orders == 0, "engine core and worker read it there"
    assert logged == [f"vllm-ttt: cache.orders is 0 here, so that sessions have no cache: none is served with {flag}"]


def test_where_caches_have_not_been_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks on CUDA: who asks for caches tries them, and nobody else has them."""
    made, logged = offline().create_engine_config(), list[str]()
    monkeypatch.setattr(support.logger, "warning", lambda text, *values: logged.append(text % values))
    made.parallel_config.tensor_parallel_size = 2
    assert support.settle_cache(made, TTTConfig()).cache.orders == 6, "on a CPU they have been"
    made.device_config.device_type = "cuda"
    assert support.settle_cache(made, TTTConfig(cache=CacheConfig(orders=4))).cache.orders == 4
    assert not logged
    assert support.settle_cache(made, TTTConfig()).cache.orders == 0
    assert "--tensor-parallel-size on CUDA, where it has not been run" in logged[0]


def changed_model(folder: Path, **change: Any) -> str:
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return str(folder)


def test_another_activation_is_refused(tmp_path: Path) -> None:
    model = changed_model(tmp_path, hidden_act="gelu")
    with pytest.raises(ConfigError, match="hidden_act 'gelu' is not supported"):
        offline(model=model, skip_tokenizer_init=True).create_engine_config()


def test_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = changed_model(tmp_path, architectures=["GemmaForCausalLM"], model_type="gemma")
    says = "architecture GemmaForCausalLM is not supported with --plugin ttt by the presets deep and last, which know Llama; "
    row = plugin.check(model, "deep")[-1]
    assert (row.what, row.ok) == (f"model {model}", False)
    assert says in row.why
    # To look at Gemma itself, vLLM would start a process that imports it.
    monkeypatch.setattr(ModelConfig, "architectures", ["GemmaForCausalLM"])
    with pytest.raises(ConfigError, match=says):
        offline().create_engine_config()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, str(MODEL)),
        ({"served_model_name": ["acme/model-1", "other"]}, "acme/model-1"),
        ({"served_model_name": "/cache/hub/models--acme--model-1/snapshots/0123abcd"}, "acme/model-1"),
    ],
)
def test_what_an_export_calls_the_model(options: dict[str, Any], name: str) -> None:
    """With HF_HUB_OFFLINE vLLM serves the snapshot's path, and what the model is called is in it."""
    assert support.served_name(offline(**options).create_engine_config().model_config) == name


def test_a_rank_wider_than_the_model_is_refused_with_the_way_out() -> None:
    from vllm_ttt.worker.step.tail import make_projection

    with pytest.raises(ConfigError, match="choose a smaller rank"):
        make_projection(64, 128, 0)


@pytest.mark.parametrize("name", ["schedule", "add_request", "update_from_output", "has_requests", "finish_requests"])
def test_a_changed_vllm_function_stops_the_start_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, something_new: int) -> None: ...

    monkeypatch.setattr(Scheduler, name, changed)
    for start in (lambda: from_flags("--plugin", "ttt"), lambda: offline().create_engine_config()):
        with pytest.raises(PatchContractError, match=rf"Scheduler.{name} takes \(self something_new\)"):
            start()
    from_flags()  # who does not ask for ttt is not stopped


def test_a_changed_flag_parser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, usage: (self, usage))
    with pytest.raises(PatchContractError, match=r"EngineArgs.create_engine_config takes \(self usage\)"):
        plugin.register()


def test_registering_twice_wraps_once() -> None:
    names = ("add_cli_args", "from_cli_args", "create_engine_config")
    before = [inspect.getattr_static(EngineArgs, name) for name in names]
    plugin.register()
    assert [inspect.getattr_static(EngineArgs, name) for name in names] == before
    assert getattr(EngineArgs.create_engine_config, _contract.MARK)


PROBE = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
import vllm.plugins
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
args = EngineArgs.from_cli_args(parser.parse_args(["--model", sys.argv[1], "--max-model-len", "256"]))
config = args.create_engine_config()
functions = [AsyncLLM.generate, GenerateBaseServing._get_session_id, kv_cache_utils._gen_lora_extra_hash_keys,
             vllm.plugins.load_endpoint_plugins]
scheduler, worker = config.scheduler_config.scheduler_cls, config.parallel_config.worker_cls
result = (config.additional_config, config.lora_config, scheduler, worker,
          config.compute_hash(), [hasattr(f, "__wrapped__") for f in functions], hasattr(EngineCore, "ttt_admin"))
print("RESULT", result)
print("plugin is loaded:", hasattr(EngineArgs.create_engine_config, "__vllm_ttt__"), file=sys.stderr)
print("worker modules of ours:", [m for m in sys.modules if m.startswith("vllm_ttt.") and ".worker" in m], file=sys.stderr)
"""


def test_installed_but_not_asked_for_changes_nothing() -> None:
    """The same config, bit for bit, in a process that loads the plugin and in one that does not; nothing else is wrapped."""
    stock = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}
    command = [sys.executable, "-c", PROBE, str(MODEL)]
    start = lambda env: subprocess.Popen(  # noqa: E731
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    environments = {True: stock, False: {**stock, "VLLM_PLUGINS": ""}}
    started = {loads: start(e) for loads, e in environments.items()}
    results = []
    for loads, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        results += [line for line in out.splitlines() if line.startswith("RESULT")]
        assert f"plugin is loaded: {loads}" in err
        assert "worker modules of ours: []" in err
    assert results[0] == results[1]
    assert results[0].startswith("RESULT ({}, None, None, 'vllm.v1.worker.cpu_worker.CPUWorker'")
