"""Which vLLM, which model and which of vLLM's options can be served with ttt; what is set where the user set nothing.

Refusals say what was found, why it cannot be, and the way out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_ttt import placement, tensor_parallel
from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.families import ENCODER_DECODER, HEAD_INSTEAD, LAST_INSTEAD, Layers, check_weights, layers_of
from vllm_ttt.geometry import Geometry, adapted_layers
from vllm_ttt.log import logger_of
from vllm_ttt.types import NO_ADAPTERS

logger = logger_of(__name__)

#: Releases of vLLM that are served with, by device, and the one with which the tests run. What a contract asks of any other has
#: been looked up in its source (patches/source_check.py).
RELEASES = {"cpu": ("0.32",), "cuda": ("0.32", "0.33")}
TESTED = "0.32"

#: Methods of speculative decoding whose drafts are made from tokens alone, and from the model's last hidden states or those of
#: some layers.
DRAFTS_FROM_TOKENS = ("ngram", "ngram_gpu")
DRAFTS_FROM_STATES = ("eagle", "eagle3", "mtp")
#: Why an answer is not learned beside drafts on CUDA, and what else there is.
NO_ANSWERS = (
    "with speculative decoding on CUDA an answer is not learned, since the device alone knows which drafts were accepted; one "
    "that the client sends back in its next prompt is learned there"
)

#: Seconds between SIGTERM and SIGKILL with a state dir, where the user sets no --shutdown-timeout.
SHUTDOWN_TIMEOUT = 60
#: Seconds for which a script waits at its end until all is learned and saved, where it sets no shutdown_timeout.
OFFLINE_TIMEOUT = 600
SCHEDULER = "vllm_ttt.engine.scheduler.TTTScheduler"
WORKERS = {
    "cpu": "vllm_ttt.worker.cpu_worker.TTTCPUWorker",
    "cuda": "vllm_ttt.worker.cuda_worker.TTTCUDAWorker",
}


def vllm_release() -> tuple[str, bool, str]:
    """(what, whether it is supported, what was found)."""
    try:
        from vllm import __version__
    except ModuleNotFoundError:
        return "vLLM", False, "not installed; pip install 'vllm-ttt[cuda]' or 'vllm-ttt[cpu]', or run make setup"

    from vllm.platforms import current_platform

    return release(__version__, current_platform.device_type)


def release(version: str, device: str = "cuda") -> tuple[str, bool, str]:
    """`vllm_release` for a version by its name."""
    known, minor = RELEASES["cpu" if device == "cpu" else "cuda"], ".".join(version.split("+")[0].split(".")[:2])
    if minor not in known:
        return f"vLLM {version}", False, f"vllm-ttt supports vLLM {' and '.join(known)}{' on a CPU' * (device == 'cpu')}"
    by_source = "supported: its source has what vllm-ttt asks of it; nothing of it has been run with vllm-ttt"
    return f"vLLM {version}", True, "supported" if minor == TESTED else by_source


def prepare_engine_args(engine_args: Any, config: TTTConfig) -> None:
    """Set what ttt needs on vLLM's EngineArgs. Raises ConfigError where the user asked for something else."""
    from vllm import envs
    from vllm.platforms import current_platform

    from vllm_ttt import plugin

    what, supported, why = vllm_release()
    if not supported:
        raise ConfigError(f"{what}: {why}; install vLLM {TESTED}, or serve without ttt")
    if config.adapt.in_slots and (engine_args.enable_lora or getattr(engine_args, "lora_modules", None)):
        raise ConfigError(f"--enable-lora and --lora-modules cannot be combined with --plugin ttt: {NO_ADAPTERS}")
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        # It opens /v1/load_lora_adapter, and lets resolver plugins load an adapter for any model name: another one may get the
        # name that a session began with.
        why = (
            NO_ADAPTERS if config.adapt.in_slots else "name adapters with --lora-modules, so that none changes under a session"
        )
        raise ConfigError(f"VLLM_ALLOW_RUNTIME_LORA_UPDATING cannot be combined with --plugin ttt; unset it: {why}")
    if envs.VLLM_USE_RUST_FRONTEND and engine_args.additional_config[plugin.NAME]["http"]:
        raise ConfigError(
            "VLLM_USE_RUST_FRONTEND cannot be combined with --plugin ttt; unset it: vLLM's front end in Rust loads no plugins, "
            "and would neither know whose a session is nor say what was learned"
        )
    if engine_args.fully_sharded_loras:
        raise ConfigError("--fully-sharded-loras is not supported with --plugin ttt; leave it out")
    if engine_args.scheduler_cls is not None:
        raise ConfigError("--scheduler-cls cannot be combined with --plugin ttt, which brings its own scheduler; leave it out")
    worker = WORKERS.get(current_platform.device_type)
    if worker is None:
        raise ConfigError(
            f"vllm-ttt serves on {' and '.join(WORKERS)}, not on {current_platform.device_type}; serve there, or without ttt"
        )
    if config.sessions.state_dir is not None and engine_args.shutdown_timeout == 0:
        # vLLM's default kills the engine core at once: nothing could be saved.
        http = engine_args.additional_config[plugin.NAME]["http"]
        engine_args.shutdown_timeout = SHUTDOWN_TIMEOUT if http else OFFLINE_TIMEOUT
    if engine_args.enable_sleep_mode:
        raise ConfigError(
            "--enable-sleep-mode is not supported with --plugin ttt: the deltas of sessions lie in memory that sleep takes "
            "away; leave it out"
        )
    engine_args.scheduler_cls = SCHEDULER
    if engine_args.worker_cls == "auto":
        engine_args.worker_cls = worker
    elif engine_args.worker_cls != worker:
        _check_worker(engine_args.worker_cls, worker)


def _check_worker(given: Any, ours: str) -> None:
    """Raise ConfigError where a worker class that the user names is not one of ours."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_ttt.worker.worker import TTTWorkerMixin

    try:
        found = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--worker-cls {given} cannot be imported: {error}; name another, or leave it out") from None
    if not (isinstance(found, type) and issubclass(found, TTTWorkerMixin)):
        raise ConfigError(f"--worker-cls {given} cannot be combined with --plugin ttt, whose worker learns; subclass {ours}")


def finish_vllm_config(vllm_config: Any, config: TTTConfig) -> None:
    """Refuse what cannot be served, and give the adapted layers, and no others, LoRA slots.

    LoRA joins the config when vLLM has finished it: so the model is compiled, or not, as it would be without ttt. (vLLM's CPU
    backend switches compilation off with --enable-lora, and base requests would get other bits than from stock vLLM.)
    """
    from vllm.config.lora import LoRAConfig

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refusals = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--enable-dbo (or --ubatch-size)": parallel.use_ubatching,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--runner pooling": model.runner_type != "generate",
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--weight-transfer-config": getattr(vllm_config, "weight_transfer_config", None) is not None,
    }
    config = settle_cache(vllm_config, config)
    for flag, refused in refusals.items():
        if refused:
            raise ConfigError(f"{flag} is not supported with --plugin ttt; leave it out, or serve without ttt")
    if config.learn.interleave and not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ConfigError("learn.interleave reads prompts in chunks; leave out --no-enable-chunked-prefill, or set it to false")
    placement.check_engines(vllm_config, config)
    tensor_parallel.check(vllm_config, config)
    _check_drafts(vllm_config, config)
    _check_fp8(vllm_config, config)
    if vllm_config.device_config.device_type == "cuda" and not vllm_config.use_v2_model_runner:
        raise ConfigError("on CUDA, --plugin ttt needs vLLM's model runner V2; unset VLLM_USE_V2_MODEL_RUNNER")
    if config.guard.every and config.guard.probe is not None and not Path(config.guard.probe).is_file():
        raise ConfigError(f"guard.probe {config.guard.probe} is not a file; name a text, or set guard.every to 0")
    hf = model.hf_text_config
    if config.adapt.preset == "head":
        _check_head(vllm_config)
        return
    quantised, on_cpu = getattr(model.hf_config, "quantization_config", None), vllm_config.device_config.device_type == "cpu"
    where = _check_layered(model.architectures, hf, quantised, on_cpu, config.adapt.preset)
    check_layers(hf, config, model.max_model_len)
    lora = LoRAConfig(
        max_lora_rank=config.adapt.rank,  # type: ignore[arg-type]  # one of RANKS
        max_loras=config.sessions.resident,
        max_cpu_loras=config.sessions.resident,
        target_modules=adapted_modules(hf.num_hidden_layers, config, where.path),
    )
    lora.verify_with_model_config(model)
    vllm_config.lora_config = lora


def settle_cache(vllm_config: Any, config: TTTConfig) -> TTTConfig:
    """``config`` with a number in the place of cache.orders `auto`; all processes read it from ``vllm_config``, too.

    Raises ConfigError where the user asked for caches of sessions, and they cannot be mixed in.
    """
    from vllm_ttt import plugin

    parallel, on_cuda = vllm_config.parallel_config, vllm_config.device_config.device_type == "cuda"
    refusals = {
        "--speculative-config on CUDA": on_cuda and vllm_config.speculative_config is not None,
        "--enable-batch-sharded-sampling": bool(parallel.enable_batch_sharded_sampling),
    }
    #: what nobody gets who has not asked for it
    untried = {"--tensor-parallel-size on CUDA, where it has not been run": on_cuda and parallel.tensor_parallel_size > 1}
    given, orders = config.cache.orders, config.cache.longest
    if given == "auto":
        if found := [what for what, there in (refusals | untried).items() if there]:
            orders = 0
            logger.warning("vllm-ttt: cache.orders is 0 here, so that sessions have no cache: none is served with %s", found[0])
    elif orders:
        for what, there in refusals.items():
            if there:
                raise ConfigError(f"{what} is not supported with cache.orders above 0; leave it out, or set cache.orders to 0")
    settled = config.model_copy(update={"cache": config.cache.model_copy(update={"orders": orders})})
    additional = vllm_config.additional_config
    if plugin.config_of(vllm_config) is not None:  # what the user gave stays: another server may be started with it
        settings = {**additional[plugin.NAME], "config": settled.model_dump(mode="json")}
        vllm_config.additional_config = {**additional, plugin.NAME: settings}
    return settled


def _check_fp8(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where the step cannot multiply in FP8."""
    from vllm.platforms import current_platform

    if config.learn.fp8 == "none":
        return
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    refusals = {
        "on a CPU": vllm_config.device_config.device_type != "cuda",
        "on a device that is older than compute capability 8.9": not current_platform.has_device_capability(89),
        f"with --dtype {dtype}, but with bfloat16 alone": dtype != "bfloat16",
        "with --tensor-parallel-size above 1": vllm_config.parallel_config.tensor_parallel_size > 1,
    }
    for what, refused in refusals.items():
        if refused:
            raise ConfigError(f"learn.fp8 {config.learn.fp8} is not supported {what}; set learn.fp8 to none")


def _check_drafts(vllm_config: Any, config: TTTConfig) -> None:
    """Raise ConfigError where speculative decoding and sessions cannot go together."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return
    what = f"--speculative-config with the method {drafts.method}"
    if drafts.method in DRAFTS_FROM_STATES and config.adapt.preset != "head":
        raise ConfigError(
            f"{what} is not supported with the preset {config.adapt.preset}: its drafts are made from hidden states that hold "
            "a session's delta, and other sessions would read the drafter's keys of them; serve with --ttt-preset head, or "
            "take the method ngram"
        )
    if drafts.method not in (*DRAFTS_FROM_TOKENS, *DRAFTS_FROM_STATES):
        raise ConfigError(
            f"{what} is not supported with --plugin ttt; take the method ngram, or with --ttt-preset head one of "
            f"{', '.join(DRAFTS_FROM_STATES)}"
        )
    if drafts.enable_adaptive_verification:
        raise ConfigError(
            f"{what} and enable_adaptive_verification is not supported with --plugin ttt, which must know whose each row is; "
            "leave enable_adaptive_verification out"
        )
    if config.learn.tokens == "all" and not accepted_are_known(vllm_config):
        raise ConfigError(f"learn.tokens all: {NO_ANSWERS}; set learn.tokens to prompt")


def accepted_are_known(vllm_config: Any) -> bool:
    """Whether the worker knows which rows of an answer were accepted, when it keeps what is learned of them."""
    return vllm_config.speculative_config is None or vllm_config.device_config.device_type == "cpu"


def _check_head(vllm_config: Any) -> None:
    """Raise ConfigError where the preset head cannot serve. What only the loaded model can tell is refused by
    worker/step/lm_head.py."""
    _refuse_for_head(
        {
            ENCODER_DECODER: vllm_config.model_config.is_encoder_decoder,
            "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,  # not every token has a last state
            "--enable-batch-sharded-sampling": bool(vllm_config.parallel_config.enable_batch_sharded_sampling),
        }
    )


def _refuse_for_head(refusals: dict[str, bool]) -> None:
    for what, refused in refusals.items():
        if refused:
            raise ConfigError(f"{what} is not supported with the preset head; serve without ttt")


def geometry_of(model: Any, config: TTTConfig) -> Geometry:
    """Of what a server of vLLM's ModelConfig ``model`` learns."""
    where = None if config.adapt.preset == "head" else layers_of(model.architectures, model.hf_text_config)
    return Geometry.of(model.hf_text_config, config.adapt, where)


def adapted_modules(num_layers: int, config: TTTConfig, path: str = "model.layers") -> list[str]:
    """Full names of the adapted modules: the only ones that get LoRA slots, so every other layer stays as it was."""
    names = {"o_proj": "self_attn.o_proj", "gate_up_proj": "mlp.gate_up_proj", "down_proj": "mlp.down_proj"}
    first = num_layers - adapted_layers(num_layers, config.adapt)
    return [f"{path}.{i}.{names[m]}" for i in range(first, num_layers) for m in config.adapt.modules]


def max_sessions(hf: Any, config: TTTConfig, ranks: int = 1) -> int:
    """How many sessions fit: those with a slot, and as many as ``sessions.host_gib`` holds in float32, of all ranks together.

    With the guard, a session may take twice its size: what it is, and what it was when it was last found good.
    """
    own = Geometry.of(hf, config.adapt).shard(ranks, 1).bytes
    size = ranks * (own * (2 if config.guard.every else 1) + config.cache.bytes)
    return config.sessions.resident + int(config.sessions.host_gib * 2**30 / size)


def max_saved(hf: Any, config: TTTConfig) -> int:
    """How many sessions fit into ``sessions.disk_gib``, one version of each."""
    return int(config.sessions.disk_gib * 2**30 / (Geometry.of(hf, config.adapt).bytes + config.cache.bytes))


def served_name(model_config: Any) -> str:
    """What clients call the model: its served name, or the hub's name where vLLM put the path of its snapshot in its place."""
    name = str(model_config.served_model_name or model_config.model)
    snapshot = re.search(r"[/\\]models--(.+?)[/\\]snapshots[/\\]", name)
    return snapshot[1].replace("--", "/") if snapshot else name


def unreadable(model: str) -> str | None:
    """Why nothing can be said of a model; None where its config can be read."""
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        folder = Path(model)
        no_name = isinstance(error.__cause__, HFValidationError)
        if no_name or (folder.is_dir() and not (folder / "config.json").exists()):
            return f"there is no model at {model}: name a folder with config.json, or a name on a hub"
        return str(error)
    return None


def describe_model(model: str, preset: str = "deep") -> str:
    """One line about a model that a preset can serve. Raises ConfigError (unsupported) or OSError (no config found)."""
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    hf = AutoConfig.from_pretrained(model)
    text = hf.get_text_config()
    if preset == "head":
        _refuse_for_head({ENCODER_DECODER: hf.is_encoder_decoder})
    else:
        quantised = getattr(hf, "quantization_config", None)
        _check_layered(hf.architectures, text, quantised, current_platform.is_cpu(), preset)
        check_layers(text, parse_config(None, preset), getattr(text, "max_position_embeddings", 2**62))
    kind, quantisation = (hf.architectures or ["unknown"])[0], _quantization(model, hf)
    shape = f"{text.num_hidden_layers} layers, hidden {text.hidden_size}, vocabulary {text.vocab_size}"
    return f"{kind}, {shape}" + (f", quantised ({quantisation})" if quantisation else "")


def _quantization(model: str, hf: Any) -> str | None:
    """How the model's weights are quantised, as vLLM finds it out; None: they are not."""
    for name in ("quantization_config", "compression_config"):
        if found := getattr(hf, name, None):
            return str(found.get("quant_method") or name if isinstance(found, dict) else name)
    return "modelopt" if (Path(model) / "hf_quant_config.json").is_file() else None


def _check_layered(architectures: list[str] | None, text: Any, quantised: Any, on_cpu: bool, preset: str) -> Layers:
    """Where the model's layers are. Raises ConfigError where none can have a delta with the preset."""
    try:
        where = layers_of(architectures, text)
        check_weights(quantised, on_cpu)
    except ConfigError as error:
        raise ConfigError(f"{error}. {HEAD_INSTEAD}") from None
    if preset == "deep" and where.not_deep:
        raise ConfigError(
            f"the preset deep cannot learn through {(architectures or [''])[0]}: {where.not_deep}; {LAST_INSTEAD}"
        )
    return where


def check_layers(hf: Any, config: TTTConfig, max_model_len: int) -> None:
    """Raise ConfigError where the model has not so many layers, or an adapted layer attends in a way that cannot be learned
    through. What only the loaded model can tell is refused by worker/step/tail.py."""
    layers = adapted_layers(hf.num_hidden_layers, config.adapt)
    kinds = getattr(hf, "layer_types", None)
    window = getattr(hf, "sliding_window", None) if getattr(hf, "use_sliding_window", True) else None
    if window is None or window >= max_model_len:
        return
    if config.adapt.preset != "deep":
        return
    every = layers == hf.num_hidden_layers  # then the step attends in the lowest of them too
    for i in reversed(range(hf.num_hidden_layers - layers + (not every), hf.num_hidden_layers)):
        if kinds is None or kinds[i] == "sliding_attention":
            what = f"{kinds[i]} in layer {i}" if kinds else f"a sliding window of {window} tokens"
            most = 1 if not kinds else hf.num_hidden_layers - max(i, 1)
            raise ConfigError(
                f"the model has {what}, which the preset deep cannot learn through: adapt.layers may be at most {most} here, "
                f"or serve with adapt.preset last, or with --max-model-len {window}"
            )
