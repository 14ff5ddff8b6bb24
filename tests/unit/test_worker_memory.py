"""What is said to be needed is what is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vllm_ttt.config import parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.geometry import Geometry
from vllm_ttt.worker import memory
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.step.micro_step import Tail

pytestmark = pytest.mark.unit

D, Q, F, V, R, N = 32, 48, 64, 96, 8, 40


@pytest.mark.parametrize("layer", [1, 0], ids=["last layer", "every layer"])
@pytest.mark.parametrize("modules", [("o_proj", "down_proj"), ("o_proj", "gate_up_proj", "down_proj"), ("gate_up_proj",)])
def test_needs_are_the_bytes_of_the_buffers(modules: tuple[str, ...], layer: int) -> None:
    """Where every layer is adapted, all that is kept of a token is the token, and the one that follows."""
    adapt = {"layers": 1, "modules": modules, "rank": R}
    settings = {"sessions": {"resident": 3}, "schedule": {"backlog_tokens": 1024}, "cache": {"orders": 0}}
    config = parse_config({"adapt": adapt, **settings})
    geometry = Geometry(layer=layer, rank=R, seed=0, hidden=D, attention=Q, feed_forward=F, modules=modules)
    new = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)  # noqa: E731
    tail = Tail(
        new(D, Q), new(2 * F, D), new(D, F), new(V, D), new(D), new(D), 1e-5, 1e-5, new(R, Q), new(R, D), new(R, F),
        dict.fromkeys("ogud", 1.0), config.adapt.letters,
    )  # fmt: skip
    deltas = Deltas(tail, config.sessions.resident, config.learn.rate)
    assert deltas.bytes_per_session() == geometry.bytes
    h, a = (new(N, D), new(N, Q)) if layer else (new(N, 0), new(N, 0))
    backlog = Backlog(memory.pages(config), config.learn.chunk, 8, h, a)
    buffers = [*deltas.masters.tensors(), backlog.h_PCD, backlog.a_PCQ, backlog.x_PC, backlog.t_PC, h, a]
    probe = Probe(config.guard.probe_tokens, h, a)
    buffers += [probe.h_PD, probe.a_PQ, probe.x_P, probe.t_P]
    buffers += [tail.ao_RQ, tail.ai_RD, tail.ad_RF, tail.logits]
    needs = memory.needs(geometry, config, N, 2, V, 512, 2)
    assert sum(needs.values()) == sum(x.nbytes for x in buffers)

    memory.check(needs, sum(needs.values()))
    with pytest.raises(ConfigError, match=r"needs 0\.00 GiB of device memory"):
        memory.check(needs, sum(needs.values()) - 1)


def test_weights_that_the_step_has_for_itself_are_counted() -> None:
    """On a CPU without 16-bit products: float32 beside the model's bfloat16. (`weights.copied` says how much that is.)"""
    config = parse_config({"adapt": {"layers": 1, "rank": R}, "sessions": {"resident": 3}})
    geometry = Geometry(layer=1, rank=R, seed=0, hidden=D, attention=Q, feed_forward=F)
    own, shared = (
        memory.needs(geometry, config, N, 2, V, 512, itemsize, False, more) for itemsize, more in ((4, 1000), (2, 0))
    )
    copies = next(size for what, size in own.items() if what.startswith("copies of the weights of the adapted layers"))
    assert copies == 1000
    workspace = "fixed projections and the workspace of the loss"
    assert own[workspace] == 2 * shared[workspace]
    assert sum(own.values()) == sum(shared.values()) + copies + shared[workspace]


def test_a_step_of_a_gpu_has_twice_as_many_tokens_and_counts_what_it_has_at_a_time() -> None:
    """More for more layers, for a longer context once, however many sessions take part, and for the gradients of each."""
    config = parse_config({"sessions": {"resident": 64}})
    assert (memory.tile(config, False), memory.tile(config, True)) == (512, 1024)
    geometry = Geometry(layer=0, rank=64, seed=0, hidden=4096, attention=4096, feed_forward=12288, layers=36, keys=1024)
    geometry = replace(geometry, modules=("o_proj", "down_proj"))
    small, large = (memory.step_bytes(geometry, config, 2, 2048, cuda) for cuda in (False, True))
    assert small < large
    # A step of 1,024 tokens of two sessions took 4.12 GiB on an H200 (loadtests/bench_step.py); four have two more gradients,
    # and B, of 113 MB each.
    taken = 4.12 * 2**30 + 2 * geometry.bytes
    assert taken < large < 1.2 * taken
    longer = memory.step_bytes(geometry, config, 2, 4096, True)
    assert longer - large == 2048 * 3 * 2 * (1024 + 4096) * 2
