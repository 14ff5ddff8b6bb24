"""Speculative decoding in vLLM's own scheduler: when drafts are run, what is counted of an answer, and where one is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deep_scheduler import PROMPT, Engine
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_ttt.worker.capture.states import States

pytestmark = pytest.mark.unit

DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}}


class Drafting(Engine):
    def answer(self, name: str, tokens: list[int], drafts: list[int] | None = None) -> tuple[SchedulerOutput, dict[str, Any]]:
        """A step that brings a request ``tokens``; ``drafts``: of what follows, None where nobody made any. What the answer's
        ``ttt`` object says then."""
        output = self.scheduler.schedule()
        done = ModelRunnerOutput([name], {name: 0}, [tokens])
        done.ttt, self.report = self.report, type(self.report)()  # type: ignore[attr-defined]
        found = self.scheduler.update_from_output(output, done)
        if drafts is not None:
            self.scheduler.update_draft_token_ids(DraftTokenIds([name], [drafts]))
        (said,) = [x for per_client in found.values() for x in per_client.outputs]
        assert said.kv_transfer_params is not None
        return output, said.kv_transfer_params["ttt"]


@pytest.mark.parametrize("preset", ["last", "deep", "head"])
def test_what_was_accepted_is_counted_up_to_the_end(preset: str) -> None:
    engine = Drafting(preset, DRAFTS)
    name = engine.send("s", outputs=8, learn=True, ttt_learn_output=1)
    output, said = engine.answer(name, [7], drafts=[7, 8])
    assert (output.num_scheduled_tokens, output.scheduled_spec_decode_tokens) == ({name: len(PROMPT)}, {})
    assert said["tokens_learned"] == len(PROMPT) - 1, "one token is too short to be learned"
    output, _ = engine.answer(name, [7, 8, 9], drafts=[])
    assert (output.num_scheduled_tokens, output.scheduled_spec_decode_tokens) == ({name: 3}, {name: [7, 8]})
    output, _ = engine.answer(name, [4])
    assert output.num_scheduled_tokens == {name: 1}
    output, _ = engine.answer(name, [5], drafts=[1, 2, 3])
    assert output.num_scheduled_tokens == {name: 1}, "nobody made a draft: what stands for one is not run"
    output, said = engine.answer(name, [1, 2, 3, 4])
    assert output.scheduled_spec_decode_tokens == {name: [1, 2, 3]}
    assert not engine.scheduler.requests, "eight tokens: the last two are beyond the end"
    assert said["tokens_learned"] == len(PROMPT) - 1 + 8
    assert engine.scheduler.ttt_ended == {name: len(PROMPT) - 1 + 8}


def test_an_answer_beside_drafts_on_cuda() -> None:
    """Its prompt is learned, and it is said what else there is."""
    engine = Drafting("head", DRAFTS)
    engine.config.device_config = SimpleNamespace(device_type="cuda")  # type: ignore[assignment]
    engine.send("s", learn=True, ttt_learn_output=1)
    ((_, refused),) = engine.scheduler.ttt_refused
    assert (refused.status, refused.param) == (400, "ttt_learn_output")
    assert refused.message.endswith("one that the client sends back in its next prompt is learned there; leave it out")
    engine.scheduler.ttt_refused.clear()
    name = engine.send("s", learn=True)
    _, said = engine.answer(name, [7])
    assert said["tokens_learned"] == len(PROMPT) - 1


@pytest.mark.parametrize("copies", [True, False])
def test_states_that_a_drafter_may_overwrite_are_copied(copies: bool) -> None:
    states, state = States(4, 8, torch.float32, torch.device("cpu"), copies), SimpleNamespace(hidden_states=torch.ones(3, 4))
    states.ran(state)
    state.hidden_states.zero_()
    assert bool(states.h_ND.any()) == copies
