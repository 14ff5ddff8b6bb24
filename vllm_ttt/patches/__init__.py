"""One module per vLLM function that we wrap; patches/README.md lists them for people.

``engine_args`` is installed by every process that loads the plugin and only adds flags. The others are installed once a
config asks for ttt: ``frontend`` in the API server, ``offline`` in a script, ``samples`` in both, ``engine`` in the engine
core. The worker needs none.
"""

from __future__ import annotations

from collections.abc import Callable


def contracts() -> dict[str, Callable[[], None]]:
    """For each group of patches, a function that raises PatchContractError where vLLM is not what they were written for."""
    from vllm_ttt.patches import endpoint_plugins, engine, engine_args, frontend, offline, samples

    modules = {
        "engine_args": engine_args,
        "endpoint_plugins": endpoint_plugins,
        "engine": engine,
        "frontend": frontend,
        "offline": offline,
        "samples": samples,
    }
    return {name: module.check for name, module in modules.items()}


def worker_contracts() -> dict[str, Callable[[], None]]:
    """The same for what the worker changes in a live model runner, watches or calls: it compares that itself, where needed."""
    from vllm_ttt.worker import ranks
    from vllm_ttt.worker.serve import gpu_linear
    from vllm_ttt.worker.serve.cpu_runner import MixingModelRunner
    from vllm_ttt.worker.serve.gpu_cache import MixingRunnerV2
    from vllm_ttt.worker.serve.gpu_head import HeadRunnerV2
    from vllm_ttt.worker.serve.head_runner import HeadRunnerV1
    from vllm_ttt.worker.step import lm_head

    return {
        "worker/ranks": ranks.check,
        "worker/serve/cpu_runner": MixingModelRunner.ttt_check,
        "worker/serve/head_runner": HeadRunnerV1.ttt_check,
        "worker/serve/gpu_cache": MixingRunnerV2.ttt_check,
        "worker/serve/gpu_head": HeadRunnerV2.ttt_check,
        "worker/serve/gpu_linear": gpu_linear.check,
        "worker/step/lm_head": lm_head.check,
    }


def check_all() -> None:
    """Raise PatchContractError for the first vLLM function that changed."""
    for check in contracts().values():
        check()
