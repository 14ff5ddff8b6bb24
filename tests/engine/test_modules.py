"""Modules that are left out have no slots; what the step needs is captured beside them, and the rest is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import NO_CACHE, SHORT, Stage, running_ttt
from served import Documents, assert_same, logprobs
from torch import nn

from vllm_ttt.config import parse_config
from vllm_ttt.eval.oracle import Oracle

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("modules", [["down_proj"], ["gate_up_proj"]], ids="+".join)
def test_the_delta_is_the_oracles(
    stage: Stage, models: dict[torch.dtype, nn.Module], documents: Documents, modules: list[str]
) -> None:
    stage.stop()
    adapt = {"layers": 2, "modules": modules}
    config: dict[str, Any] = {"adapt": adapt, "learn": SHORT, "sessions": {"resident": 2}, **NO_CACHE}
    reference = Oracle(models[torch.float32], parse_config(config))
    with running_ttt(stage.folder / "-".join(modules), config, ["--dtype", "float32"]) as served:
        name = served.fresh()
        for text in documents["man_fr"][:2]:
            scores = -torch.tensor(logprobs(served.complete(text[:700], name, prompt_logprobs=0)))
            assert (scores - reference.score(text[:700])).abs().max() < 0.01
            reference.learn(text[:700])
        assert_same(served.delta(name), reference)
        assert served.session(name)["rate"] == pytest.approx(reference.rate, rel=1e-3)
        assert served.rpc("test_slot_is_master") == {"held": True, "equal": True}
        assert served.settle()["errors"] == 0
