"""vllm.v1.engine.parallel_sampling.ParentRequest. A sample of a request with n > 1 says how many samples there are.

The engine core gets them one by one, as requests of their own, and serves all of them with one version of the session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ttt.patches import _contract
from vllm_ttt.types import SAMPLES

_PARAMS = ("_get_child_sampling_params", "self index")


def install() -> None:
    from vllm.v1.engine.parallel_sampling import ParentRequest

    _contract.wrap(ParentRequest, *_PARAMS, _count)


def check() -> None:
    from vllm.v1.engine.parallel_sampling import ParentRequest

    _contract.check(ParentRequest, *_PARAMS)


def _count(original: Callable) -> Callable:
    def _get_child_sampling_params(self: Any, index: int) -> Any:
        params = original(self, index)
        params.extra_args = {**(params.extra_args or {}), SAMPLES: self.n}  # whatever the client has put there
        return params

    return _get_child_sampling_params
