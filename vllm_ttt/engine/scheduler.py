"""vLLM's scheduler with sessions: attaches the delta, holds a request until its session has learned, tells the worker."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_ttt import plugin, support
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.limits import repetitive
from vllm_ttt.engine.probe import ProbeReading, pieces
from vllm_ttt.errors import RequestError
from vllm_ttt.patches import engine as engine_patches
from vllm_ttt.types import ADAPTER_PATH, Knobs, RequestPlan, SessionKey, StepPlan, StepReport, Trial

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Child of a request with n > 1: index and parent (vllm/v1/engine/parallel_sampling.py).
_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)


@dataclass(slots=True)
class Attached:
    """A request of a session, while it is in the engine."""

    session: Session
    knobs: Knobs
    #: whether its prompt is learned, by itself or, with n > 1, by the first of its siblings
    prompt_learned: bool
    #: order of arrival; the children of a request with n > 1 share it
    arrival: int
    prompt: int
    #: the largest scale of the delta that it is served with
    ceiling: float | None = None
    #: ranges of its pairs that repeat themselves
    repetitive: list[tuple[int, int]] = field(default_factory=list)
    started: bool = False
    #: tokens that have been generated
    outputs: int = 0
    #: the version that serves its first token
    version: int = 0


class TTTScheduler(AsyncScheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine_patches.install()
        config = plugin.config_of(self.vllm_config)
        assert config is not None
        assert self.lora_config is not None
        self.ttt_config = config
        additional = self.vllm_config.additional_config
        assert isinstance(additional, dict)
        self.ttt_http: bool = additional[plugin.NAME]["http"]
        limit = support.max_sessions(self.vllm_config.model_config.hf_text_config, config)
        self.ttt_ledger = Ledger(self.lora_config.max_loras + 1, limit, config.sessions.per_key, config.observe.recent_chunks)
        self.ttt_probe = ProbeReading(pieces(config.guard, self.vllm_config), self.ttt_ledger.reserve())
        self.ttt_requests: dict[str, Attached] = {}
        self.ttt_refused: list[tuple[Request, RequestError]] = []
        self.ttt_arrivals = 0
        self.ttt_parents: dict[str, int] = {}
        self.ttt_report = StepReport()
        self.ttt_ended: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            try:
                self._attach(request)
            except RequestError as error:
                # The front end checks names and knobs; this is for what only the engine can know, and for offline use.
                self.ttt_refused.append((request, error))
                return
        super().add_request(request)

    def _attach(self, request: Request) -> None:
        params = request.sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        wire = request.session_id
        if wire is None and not self.ttt_http and (name := extra.get("session_id")) is not None:
            wire = f"-/{name}"
        if wire is None or params is None:
            return
        knobs = Knobs.parse(extra, learn_output=self.ttt_config.learn.tokens == "all")
        session = self.ttt_ledger.open(SessionKey.from_wire(wire))
        knobs = self._permitted(session, request, knobs)
        prompt_learned = knobs.learn
        arrival, knobs = self._arrive(request, knobs)
        request.lora_request = LoRARequest(f"ttt:{session.adapter}", session.adapter, f"{ADAPTER_PATH}{session.adapter}")
        attached = Attached(session, knobs, prompt_learned, arrival, request.num_prompt_tokens)
        attached.ceiling = self._ceiling(session, request, learns=knobs.learn)
        self.ttt_requests[request.request_id] = attached
        session.requests.add(request.request_id)
        if knobs.learn:
            guard = self.ttt_config.guard
            attached.repetitive = repetitive(request.prompt_token_ids or [], self.ttt_config.learn.chunk, guard.min_ratio)
            # A token read from the prefix cache has no activations to learn from.
            request.skip_reading_prefix_cache = True
            session.open[request.request_id] = arrival
            session.tokens_seen += max(0, attached.prompt - 1)
        for reading in self.ttt_probe.begin(request):
            super().add_request(reading)

    def _permitted(self, session: Session, request: Request, knobs: Knobs) -> Knobs:
        """What is left of the wish to learn where the session is frozen, or has used up its hour."""
        pairs, child = max(0, request.num_prompt_tokens - 1), _CHILD.fullmatch(request.request_id)
        if child is not None and child.group(1) != "0":  # as the first of its siblings
            first = self.ttt_requests.get(f"0_{child.group(2)}")
            return knobs if first is None or first.prompt_learned else Knobs(learn=False)
        if not knobs.learn:
            return knobs
        if session.frozen is None and session.allowance.take(pairs, self.ttt_config.guard.hourly_tokens):
            return knobs
        session.refuse(pairs, "frozen" if session.frozen else "limit")
        return Knobs(learn=False)

    def _ceiling(self, session: Session, request: Request, learns: bool) -> float | None:
        """How far the prompt is like what the session sent before; it joins that where it is learned."""
        learn, ids = self.ttt_config.learn, request.prompt_token_ids
        sibling = (child := _CHILD.fullmatch(request.request_id)) is not None and child.group(1) != "0"
        if len(learn.scales) == 1 or ids is None or sibling:
            return None
        ceiling = session.past.ceiling(ids, learn.familiar, learn.scales[-1])
        if learns:
            session.past.note(ids)
        return ceiling

    def _arrive(self, request: Request, knobs: Knobs) -> tuple[int, Knobs]:
        """The arrival number; of n samples of one prompt, which arrive as one, the first alone learns."""
        self.ttt_arrivals += 1
        child = _CHILD.fullmatch(request.request_id)
        if child is None:
            return self.ttt_arrivals, knobs
        index, parent = child.groups()
        if index == "0":
            self.ttt_parents[parent] = self.ttt_arrivals
            return self.ttt_arrivals, knobs
        return self.ttt_parents.get(parent, self.ttt_arrivals), Knobs(learn=False)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not super()._handle_blocked_waiting_request(request):
            return False
        attached = self.ttt_requests.get(request.request_id)
        if attached is None:
            return request.request_id not in self.ttt_probe.open or self._has_slot(self.ttt_probe.adapter)
        return self._may_start(attached)

    def _may_start(self, attached: Attached) -> bool:
        session = attached.session
        if self.ttt_config.schedule.consistency == "read-your-writes":
            first = next(iter(session.open.values()), attached.arrival)
            if first < attached.arrival:
                return False
        pending = self.ttt_report.pending
        if attached.knobs.learn and pending and pending + attached.prompt > self.ttt_config.schedule.backlog_tokens:
            return False
        return self._has_slot(session.adapter)

    def _has_slot(self, adapter: int) -> bool:
        # vLLM counts the adapters of requests that this step schedules; one that runs but is not scheduled now keeps its slot.
        running = {r.lora_request.lora_int_id for r in self.running if r.lora_request}
        assert self.lora_config is not None
        return adapter in running or len(running) < self.lora_config.max_loras

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        plan = StepPlan(ended=self.ttt_ended)
        self.ttt_ended = {}
        if self.ttt_requests or self.ttt_probe.open:
            for request_id in output.num_scheduled_tokens:
                attached = self.ttt_requests.get(request_id)
                if attached is None:
                    if request_id in self.ttt_probe.open:
                        self.ttt_probe.plan(self.requests[request_id], plan)
                    continue
                plan.sessions = True
                if not attached.started:
                    attached.started = True
                    plan.started[request_id] = RequestPlan(
                        attached.session.adapter,
                        attached.prompt,
                        attached.knobs.learn,
                        attached.knobs.learn_output,
                        attached.ceiling,
                        repetitive=attached.repetitive,
                    )
        output.ttt = plan  # type: ignore[attr-defined]  # a plain dataclass: extra attributes travel with it
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        report: StepReport | None = getattr(model_runner_output, "ttt", None)
        if report is not None:
            self._read(report)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.ttt_requests or self.ttt_probe.open:
            for per_client in outputs.values():
                for output in per_client.outputs:
                    self._answer(output)
        self._refuse(outputs)
        return outputs

    def _read(self, report: StepReport) -> None:
        self.ttt_report = report
        for request_id, version in report.began.items():
            if (attached := self.ttt_requests.get(request_id)) is not None:
                attached.version = version
        by_adapter = self.ttt_ledger.by_adapter
        for chunk in report.chunks:
            if (session := by_adapter.get(chunk.session)) is not None:
                session.record(chunk)
                session.version = chunk.version
        for trial in report.trials:
            if (session := by_adapter.get(trial.session)) is not None:
                self._tried(session, trial)
        for request_id, adapter in report.settled:
            if (session := by_adapter.get(adapter)) is not None:
                session.open.pop(request_id, None)

    def _tried(self, session: Session, trial: Trial) -> None:
        """The guard has tried the session's delta; where it was bad, nothing that has not begun is learned any more."""
        session.probe_regression = trial.regression
        if trial.back_to is None:
            return
        session.version = trial.back_to
        session.frozen = (
            f"at version {trial.version} its delta made the guard's text worse by {trial.regression:.3f} nats per token "
            f"(guard.max_regression {self.ttt_config.guard.max_regression:g}); it is back at version {trial.back_to}"
        )
        logger.warning("vllm-ttt: session %s learns no more: %s", session.key.wire(), session.frozen)
        for request_id in list(session.requests):
            attached = self.ttt_requests[request_id]
            if attached.knobs.learn and not attached.started:
                attached.knobs, attached.prompt_learned = Knobs(learn=False), False
                session.open.pop(request_id, None)
                session.refuse(max(0, attached.prompt - 1), "frozen", seen=True)

    def _answer(self, output: EngineCoreOutput) -> None:
        """Every output of a session's request says what the answer's ``ttt`` object needs."""
        if output.finish_reason is not None:
            self.ttt_probe.open.pop(output.request_id, None)
        attached = self.ttt_requests.get(output.request_id)
        if attached is None:
            return
        attached.outputs += len(output.new_token_ids)
        if attached.knobs.learn_output:
            attached.session.tokens_seen += len(output.new_token_ids)
        answer = {"version": attached.version, "tokens_learned": self._accepted(attached)}
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), "ttt": answer}
        if output.finish_reason is not None:
            self._detach(output.request_id)

    def _accepted(self, attached: Attached) -> int:
        """Tokens of the request that have been accepted for learning so far; their steps may be pending."""
        learn = self.ttt_config.learn
        accept = lambda n: n - n % learn.chunk * (n % learn.chunk < learn.min_chunk)  # noqa: E731
        tokens = accept(attached.prompt - 1) if attached.prompt_learned else 0
        tokens -= sum(end - first for first, end in attached.repetitive if attached.prompt_learned)
        return tokens + (accept(attached.outputs) if attached.knobs.learn_output else 0)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._detach(request.request_id)
        return finished

    def _detach(self, request_id: str) -> None:
        """The request leaves the engine. One that never started has nothing that could settle."""
        attached = self.ttt_requests.pop(request_id, None)
        if attached is None:
            return
        attached.session.requests.discard(request_id)
        if not attached.started:
            attached.session.open.pop(request_id, None)
        elif attached.knobs.learn:
            if attached.knobs.learn_output:
                attached.session.allowance.spend(attached.outputs)
            self.ttt_ended[request_id] = attached.prompt - 1 + attached.outputs
        if (child := _CHILD.fullmatch(request_id)) is not None and child.group(1) == "0":
            self.ttt_parents.pop(child.group(2), None)

    def _refuse(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for request, error in self.ttt_refused:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=FinishReason.ABORT,
                kv_transfer_params={"ttt": {"status": error.status, "message": error.message}},
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        self.ttt_refused.clear()

    def has_requests(self) -> bool:
        return super().has_requests() or self.ttt_report.busy or bool(self.ttt_refused)
