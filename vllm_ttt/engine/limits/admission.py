"""What the engine refuses of a request, whichever way it came in; the front end has looked at names and values before."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.request import Request

from vllm_ttt import placement, plugin
from vllm_ttt.config import LearnConfig
from vllm_ttt.errors import RequestError
from vllm_ttt.types import NO_ADAPTERS, SAMPLES, Knobs, SessionKey


def check_adapter(request: Request) -> None:
    """Raise RequestError (400) where the request brings an adapter: the engine alone gives adapters, to sessions."""
    if request.lora_request is not None:
        raise RequestError(NO_ADAPTERS, param="model")


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


def refusal(request: Request, error: RequestError) -> EngineCoreOutput:
    """The whole answer to a request that is refused."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ABORT,
        kv_transfer_params={"ttt": {"status": error.status, "message": error.message}},
    )
