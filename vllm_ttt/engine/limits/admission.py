"""What the engine refuses of a request, whichever way it came in; the front end has looked at names and values before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import Request

from vllm_ttt import placement, plugin, support
from vllm_ttt.config import LearnConfig
from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTER_PATH, NO_ADAPTERS, SAMPLES, Knobs, SessionKey

if TYPE_CHECKING:
    from vllm_ttt.engine.ledger import Session


def check_adapter(request: Request, in_slots: bool) -> None:
    """Raise RequestError (400) where the request brings an adapter that cannot be served.

    Args:
        in_slots: whether sessions are served from vLLM's LoRA slots: then the engine alone gives adapters, to sessions. Else it
            may have any adapter that leaves lm_head as it is, which the step takes from the model.
    """
    adapter = request.lora_request
    if adapter is None:
        return
    if in_slots or adapter.lora_path.startswith(ADAPTER_PATH):
        raise RequestError(NO_ADAPTERS, param="model")
    if _adapts_lm_head(adapter.lora_path):
        message = (
            f"the adapter {adapter.lora_name} changes lm_head, which the preset head learns before; merge it into the model"
        )
        raise RequestError(message, param="model")


@lru_cache(maxsize=1024)
def _adapts_lm_head(path: str) -> bool:
    from vllm.lora.utils import get_adapter_absolute_path

    file = Path(get_adapter_absolute_path(path)) / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        named = settings.get("target_modules") or []
        modules = [*([named] if isinstance(named, str) else named), *(settings.get("modules_to_save") or [])]
    except (OSError, ValueError, AttributeError):
        return False  # vLLM says what is wrong with it
    return any(str(module).endswith("lm_head") for module in modules)


def other_model(session: Session, request: Request) -> RequestError | None:
    """The refusal (409) of a request that names another model, by an adapter's name, than the one that its session began with.

    A session that has learned nothing begins with the model of the request.
    """
    name = "" if request.lora_request is None else request.lora_request.lora_name
    if session.model is None or (session.version == 0 and not session.open):
        session.model = name
    if session.model == name:
        return None
    began, asked = (f"the adapter {model}" if model else "the base model" for model in (session.model, name))
    message = (
        f"session {session.key.name} has learned with {began}, and this request names {asked}, where that means nothing; "
        "name the model that it began with, or another session"
    )
    return RequestError(message, status=409, param="model")


def check_owner(key: SessionKey, vllm_config: VllmConfig) -> None:
    """Raise RequestError (503) where the session is another engine's: that would have it twice."""
    own, engines = vllm_config.parallel_config.data_parallel_index, plugin.engines_of(vllm_config)
    if engines > 1 and (right := placement.owner(key.wire(), engines)) != own:
        message = f"session {key.name!r} belongs to engine {right}, and its request came to engine {own}: name it over HTTP"
        raise RequestError(message, 503)


def knobs_of(params: SamplingParams, learn: LearnConfig, vllm_config: VllmConfig) -> Knobs:
    """The knobs of a session's request. Raises RequestError (400) where this server cannot do what they ask."""
    extra: dict[str, Any] = params.extra_args or {}
    # The CPU runner moves the generator of a seeded request back when a part of a prompt has been read (vLLM's
    # GPUModelRunner._bookkeeping_sync), and torch's CPU generator cannot be moved: the engine core would end.
    seeded = params.sampling_type == SamplingType.RANDOM_SEED and vllm_config.device_config.device_type == "cpu"
    several = SAMPLES in extra
    knobs = Knobs.parse(extra, learn_output=learn.tokens == "all", interleave=learn.interleave and not (seeded or several))
    if knobs.learn_output and not support.accepted_are_known(vllm_config):
        raise RequestError(f"ttt_learn_output: {support.NO_ANSWERS}; leave it out", param="ttt_learn_output")
    if knobs.interleave and not vllm_config.scheduler_config.enable_chunked_prefill:
        message = "ttt_interleave reads a prompt in chunks, and this server runs with --no-enable-chunked-prefill"
        raise RequestError(message, param="ttt_interleave")
    if knobs.interleave and several:
        message = "ttt_interleave answers from what its prompt has taught, and n samples answer from one version; leave one out"
        raise RequestError(message, param="ttt_interleave")
    if knobs.interleave and seeded:
        message = (
            "ttt_interleave reads a prompt in chunks, and vLLM cannot sample with a seed on a CPU after a prompt that was read "
            "in parts; leave out seed, ttt_interleave or the temperature"
        )
        raise RequestError(message, param="ttt_interleave")
    return knobs


def refuse(refused: Iterable[tuple[Request, RequestError]], outputs: dict[int, EngineCoreOutputs], balanced: bool) -> None:
    """Add the whole answers to requests that are refused to what each client is told. ``balanced``: of several engines, whose
    clients count what each has under way."""
    for request, error in refused:
        told = {"status": error.status, "message": error.message, "retry_after": error.retry_after}
        answer = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=FinishReason.ABORT,
            kv_transfer_params={"ttt": told},
        )
        mine = outputs.setdefault(request.client_index, EngineCoreOutputs())
        mine.outputs.append(answer)
        if balanced:
            mine.finished_requests = {*(mine.finished_requests or ()), request.request_id}
