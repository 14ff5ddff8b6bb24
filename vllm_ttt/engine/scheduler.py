"""vLLM's scheduler with sessions: attaches the delta, holds a request until its session has learned, tells the worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_ttt import plugin, support
from vllm_ttt.engine.counts import EngineCounts
from vllm_ttt.engine.guarded import Guarded
from vllm_ttt.engine.hold.holding import Holding, HoldingScheduler
from vllm_ttt.engine.hold.room import Room
from vllm_ttt.engine.ledger import Ledger, Open, Session
from vllm_ttt.engine.life.alarm import Alarm
from vllm_ttt.engine.life.ending import Ending
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.limits.admission import check_adapter, check_owner, knobs_of, other_model, refuse
from vllm_ttt.engine.limits.probe import KEY as PROBE
from vllm_ttt.engine.limits.probe import ProbeReading, pieces
from vllm_ttt.engine.limits.quotas import Quotas
from vllm_ttt.engine.limits.stops import Stops
from vllm_ttt.engine.limits.trust import Trust
from vllm_ttt.engine.prefix.held_blocks import HeldBlocks
from vllm_ttt.engine.prefix.keys import BlockKeys
from vllm_ttt.engine.requests import Arrivals, Attached, accept, distinct, sample_of
from vllm_ttt.engine.storage.store import open_store
from vllm_ttt.errors import RequestError
from vllm_ttt.log import logger_of
from vllm_ttt.patches import engine as engine_patches
from vllm_ttt.types import ChunkReport, Reason, RequestPlan, SessionKey, StepPlan, StepReport, Trial

logger = logger_of(__name__)


class TTTScheduler(HoldingScheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine_patches.install()
        config = self.ttt_config = plugin.config_of_engine(self.vllm_config)
        additional = self.vllm_config.additional_config
        assert isinstance(additional, dict)
        self.ttt_http: bool = additional[plugin.NAME]["http"]
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        limit = support.max_sessions(self.vllm_config.model_config.hf_text_config, config, ranks)
        self.ttt_store = open_store(self.vllm_config, config)
        places = limit if self.ttt_store is None else support.max_saved(self.vllm_config.model_config.hf_text_config, config)
        share = config.sessions.key_share if additional[plugin.NAME].get("keys", 0) > 1 else 1.0
        quotas = Quotas(places, config.sessions.per_key, share, self.ttt_store)
        self.ttt_ledger = Ledger(config.sessions.resident + 1, limit, quotas, config.observe.recent_chunks, self.ttt_store)
        #: the guard calls what must not end serving
        self.ttt_counts, self.ttt_guard = EngineCounts(), Guarded()
        self.ttt_tiers = Tiers(self.ttt_ledger, config.sessions, self.ttt_store, self._give_up, self.ttt_counts, self.ttt_guard)
        self.ttt_holding = Holding(
            self.ttt_tiers,
            self._may_start,
            slots=config.sessions.resident,
            most=config.sessions.held_per_session if self.ttt_http else 0,
            wait=config.schedule.consistency == "read-your-writes",
            priority=self.policy == SchedulingPolicy.PRIORITY,
        )
        self.ttt_tiers.on_ready = self.ttt_holding.woke
        self.ttt_blocks = BlockKeys(config)
        self.ttt_held = HeldBlocks(self.kv_cache_manager.block_pool)
        self.ttt_trust, self.ttt_stops = Trust(config, self.vllm_config.model_config), Stops(self.vllm_config.model_config)
        self.ttt_probe = ProbeReading(pieces(config.guard, self.vllm_config), self.ttt_ledger.reserve(), config.adapt.in_slots)
        self.ttt_room, self.ttt_ending = Room(config.schedule.backlog_tokens, config.learn.chunk), Ending(self)
        self.ttt_alarm: Alarm | None = None
        self.ttt_requests, self.ttt_interleaved = dict[str, Attached](), dict[str, Attached]()
        self.ttt_refused: list[tuple[Request, RequestError]] = []
        self.ttt_arrivals = Arrivals(config.adapt.in_slots)
        self.ttt_report, self.ttt_ended = StepReport(), dict[str, int]()

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            try:
                self._attach(request)
            except Exception as failure:
                # The front end checks names and knobs; this is for what only the engine can know, and for offline use.
                error = self.ttt_guard.refusal(failure)
                self._detach(request.request_id)
                self.ttt_arrivals.leave(request, error)
                self.ttt_counts.add("refused_requests_total", 1, str(error.status))
                self.ttt_refused.append((request, error))
                return
        super().add_request(request)

    def _attach(self, request: Request) -> None:
        check_adapter(request, self.ttt_config.adapt.in_slots)
        params = request.sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        wire = request.session_id
        if wire is None and not self.ttt_http and (name := extra.get("session_id")) is not None:
            wire = f"-/{name}"
        if wire is None or params is None:
            return
        knobs = knobs_of(params, self.ttt_config.learn, self.vllm_config)
        key = SessionKey.from_wire(wire)
        check_owner(key, self.vllm_config)
        self.ttt_holding.admit(key, self.ttt_arrivals.arriving(request))
        session = self.ttt_ledger.open(key, knobs.learn)
        stuck = not session.life.placed and self.ttt_tiers.stuck
        if refused := other_model(session, request) or (self.ttt_tiers.no_room(session) if stuck else None):
            self.ttt_tiers.left(session)
            raise refused
        self.ttt_tiers.changes(session)
        if session.frozen and knobs.learn:
            if (sample := sample_of(request)) is None or sample.number == 0:
                session.refuse(pairs := max(0, request.num_prompt_tokens - 1), "frozen")
                self.ttt_counts.skipped(pairs, "frozen")
            knobs = knobs.without_learning
        attached = self.ttt_arrivals.attach(request, session, knobs)
        attached.take_adapter()
        self.ttt_requests[request.request_id] = attached
        session.requests.add(request.request_id)
        self.ttt_counts.add("session_requests_total", 1, "yes" if attached.knobs.learn else "no")
        if attached.knobs.learn:
            session.open[request.request_id] = Open(attached.arrival, sent := max(0, attached.prompt - 1))
            session.tokens_seen += sent
            if attached.knobs.interleave:
                self.ttt_interleaved[request.request_id] = attached
        for reading in self.ttt_probe.begin(request):
            super().add_request(reading)

    def _whose(self, request: Request) -> tuple[SessionKey, Attached | None] | None:
        if (attached := self.ttt_requests.get(request.request_id)) is not None:
            return attached.session.key, attached
        return (PROBE, None) if request.request_id in self.ttt_probe.open else None

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not super()._handle_blocked_waiting_request(request):
            return False
        self.ttt_held.asks = request.request_id
        attached = self.ttt_requests.get(request.request_id)
        if attached is not None and not attached.started and self.ttt_config.learn.history == "skip":
            attached.look_back()
        return True

    def _may_start(self, attached: Attached) -> bool:
        """Whether the backlog has room for what the request is to have learned; it is taken then."""
        if self.ttt_config.learn.history == "skip":
            attached.look_back()
        return not attached.knobs.learn or self.ttt_room.takes(attached, self.ttt_report.queued)

    def _beside(self, attached: Attached) -> Iterator[Attached]:
        """The other requests of its session."""
        return (self.ttt_requests[name] for name in attached.session.requests if name != attached.request.request_id)

    def _get_local_prefix_cache_hit(self, request: Request, *limit: Any) -> tuple[KVCacheBlocks, int, int, bool]:
        """A token read from the prefix cache has no activations to learn from: what is to be learned is computed.
        ``limit``: the most that may be read, or None, in vLLM 0.33."""
        attached = self.ttt_requests.get(request.request_id)
        if attached is None:
            return super()._get_local_prefix_cache_hit(request, *limit)
        learns = request.request_id in attached.session.open
        if self.ttt_blocks.on:
            alone = not attached.session.open or (learns and len(attached.session.open) == 1)
            served = attached.session.adapter not in self.ttt_report.behind
            exact = alone and served and not attached.started and not attached.knobs.interleave
            self.ttt_blocks.enter(request, attached.session, exact)
        if not learns:
            return super()._get_local_prefix_cache_hit(request, *limit)
        cache = self.kv_cache_manager
        if not cache.prefix_cache_lookup_enabled(request):
            return cache.empty_kv_cache_blocks, 0, 0, False
        most = min(tokens for tokens in (attached.start, *limit) if tokens is not None)
        blocks, tokens, _ = cache.coordinator.find_longest_cache_hit(request.block_hashes, most)
        return cache.create_kv_cache_blocks(blocks), tokens, 0, False

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Called for every request that could be scheduled: where vLLM, too, makes a part of a prompt shorter."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if self.ttt_interleaved and (attached := self.ttt_interleaved.get(request.request_id)) is not None:
            whole = self.scheduler_config.disable_chunked_mm_input
            return attached.readable(tokens, num_computed_tokens, self.ttt_config.learn.chunk, whole)
        return tokens

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.ttt_tiers.check()
        output = super().schedule(throttle_prefills)
        plan = StepPlan(ended=self.ttt_ended, stopped=self.ttt_trust.take_stopped(), files=self.ttt_tiers.take_orders())
        plan.urgent, plan.lost, plan.still = self.ttt_held.urgent(output), self.ttt_held.take_lost(), self.ttt_arrivals.still()
        plan.awaited, self.ttt_ended = self.ttt_holding.learn_first(), {}
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
                    self.ttt_arrivals.begin(attached)
                    if attached.held is not None:
                        self.ttt_counts.observe("held_seconds", time.monotonic() - attached.held)
                    plan.started[request_id] = self._plan(attached)
                if request_id in attached.session.open:
                    self.ttt_blocks.moves(attached, self._beside(attached))
        output.ttt = plan  # type: ignore[attr-defined]  # a plain dataclass: extra attributes travel with it
        return output

    def _plan(self, attached: Attached) -> RequestPlan:
        session, request, start = attached.session, attached.request, attached.start
        tokens = request.prompt_token_ids or []
        opened = session.open.get(request.request_id)
        if opened is not None and (reason := self.ttt_trust.refuses(session, attached.prompt - 1 - start)) is not None:
            opened = self._learn_not(attached, reason)
        if opened is not None:
            opened.learned = opened.done = start
            attached.look_at(self.ttt_trust, tokens, start)
            learned = start + accept(attached.prompt - 1 - start, self.ttt_config.learn)
            attached.prefixes = session.history.add_prompt(distinct(request, tokens), start, learned)
            opened.prefixes += attached.prefixes
            if start:
                session.tokens_skipped["history"] += start
                self.ttt_counts.skipped(start, "history")
        knobs = attached.knobs
        return RequestPlan(
            session.adapter, attached.prompt, knobs.learn, knobs.learn_output, start, knobs.interleave,
            cache=knobs.cache and self.ttt_config.cache.longest > 0, repetitive=attached.repetitive,
            filtered=attached.filtered,
        )  # fmt: skip

    def _learn_not(self, attached: Attached, reason: Reason) -> None:
        """A request that was to learn, and has not begun to, is answered and not learned."""
        attached.knobs, attached.prompt_learned = attached.knobs.without_learning, False
        attached.session.open.pop(attached.request.request_id, None)
        self.ttt_holding.changed(attached.session)
        self.ttt_interleaved.pop(attached.request.request_id, None)
        self.ttt_room.leave(attached.request.request_id)
        attached.session.refuse(pairs := max(0, attached.prompt - 1), reason, seen=True)
        self.ttt_counts.skipped(pairs, reason)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self.ttt_tiers.check()
        report: StepReport | None = getattr(model_runner_output, "ttt", None)
        if report is not None:
            self._read(report)
            self.ttt_held.read(scheduler_output.ttt, report)  # type: ignore[attr-defined]
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
        counted = 0
        for file in report.files:
            if file.outcome == "taken":  # what was learned later is not in the snapshot
                self._count(report.chunks[counted : file.chunks])
                counted = file.chunks
            self.ttt_guard(self.ttt_tiers.read, file)
        self._count(report.chunks[counted:])
        by_adapter = self.ttt_ledger.by_adapter
        for trial in report.trials:
            if (session := by_adapter.get(trial.session)) is not None:
                self._tried(session, trial)
        for request_id, adapter in report.settled:
            session = by_adapter.get(adapter)
            if session is not None and (opened := session.open.pop(request_id, None)) is not None:
                session.history.settle(opened.prefixes, opened.learned, session.version)
                self.ttt_holding.changed(session)
                self.ttt_guard(self.ttt_tiers.left, session)

    def _count(self, chunks: list[ChunkReport]) -> None:
        for chunk in chunks:
            self.ttt_counts.chunk(chunk)
            if (session := self.ttt_ledger.by_adapter.get(chunk.session)) is not None:
                self.ttt_blocks.learned(session, chunk)
                self.ttt_ledger.record(session, chunk)
                self.ttt_tiers.changes(session)
                self.ttt_trust.counted(session, chunk, attached := self.ttt_requests.get(chunk.request))
                if attached is not None:
                    attached.note(chunk)

    def _tried(self, session: Session, trial: Trial) -> None:
        """The guard has tried the session's delta; where it was bad, nothing more of what it has sent is learned."""
        self.ttt_counts.tried(trial)
        reason = self.ttt_trust.tried(session, trial)
        self.ttt_tiers.changes(session)
        if reason is None:
            return
        logger.warning("vllm-ttt: session %s learns no more: %s", session.key.wire(), reason)
        self.ttt_tiers.audit.note("freeze", session, by="guard", tried=trial.version, version=session.version)
        for request_id in session.requests & set(session.open):
            if (attached := self.ttt_requests[request_id]).started:
                attached.stop(session.version)
            else:
                self._learn_not(attached, "frozen")
        if self.ttt_tiers.saves is not None:
            self.ttt_guard(self.ttt_tiers.save, session)

    def _answer(self, output: EngineCoreOutput) -> None:
        """Every output of a session's request says what the answer's ``ttt`` object needs."""
        if output.finish_reason is not None and self.ttt_probe.open.pop(output.request_id, None) is not None:
            self.ttt_holding.leave(output.request_id)
        attached = self.ttt_requests.get(output.request_id)
        if attached is None:
            return
        before = attached.shown
        attached.outputs += len(output.new_token_ids)
        self.ttt_room.leave(output.request_id)
        if attached.knobs.learn_output:
            self.ttt_guard(self.ttt_stops.look, attached)
            attached.session.tokens_seen += attached.shown - before
        answer = {"version": attached.version, "tokens_learned": attached.accepted(self.ttt_config.learn)}
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), "ttt": answer}
        if output.finish_reason is not None:
            self._detach(output.request_id)

    def _free_request_blocks(self, request: Request) -> None:
        """Of a request that leaves the engine, or is preempted. What of it is still to be learned reads them."""
        attached = self.ttt_requests.get(request.request_id)
        learns = attached is not None and attached.started and request.request_id in attached.session.open
        if self.ttt_blocks.on and learns and request.is_finished():
            self.ttt_held.hold(request.request_id, self.kv_cache_manager.pop_blocks_for_free(request))
            return
        super()._free_request_blocks(request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests:
            self.ttt_held.give_up()
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def finish_requests(self, request_ids: Any, finished_status: RequestStatus) -> list[Request]:
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._detach(request.request_id)
        return finished

    def _detach(self, request_id: str) -> None:
        """The request leaves the engine. One that never started has nothing that could settle."""
        self.ttt_holding.leave(request_id)
        attached = self.ttt_requests.pop(request_id, None)
        if attached is None:
            self.ttt_probe.lost(request_id)
            return
        attached.session.requests.discard(request_id)
        self.ttt_tiers.audit.served(attached)
        self.ttt_interleaved.pop(request_id, None)
        self.ttt_room.leave(request_id)
        if not attached.started:
            attached.session.open.pop(request_id, None)
        elif attached.knobs.learn:
            self.ttt_ended[request_id] = attached.prompt - 1 + attached.shown
            if attached.request.status == RequestStatus.FINISHED_ABORTED:
                self.ttt_guard(self.ttt_stops.look, attached)
                if attached.stopped is None:
                    attached.session.history.give_up(attached.prefixes)
            if attached.knobs.learn_output and attached.shown:
                self.ttt_trust.spend(attached.session, attached.shown)
                attached.remember_answer()
        self.ttt_guard(self.ttt_tiers.left, attached.session)
        self.ttt_arrivals.leave(attached.request)

    def _refuse(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        refuse(self.ttt_refused, outputs, balanced=self.finished_req_ids_dict is not None)
        self.ttt_refused.clear()

    def has_requests(self) -> bool:
        # In a pause that keeps requests, learning keeps still too: a session whose prompt has been read in part is never done.
        learning = (self.ttt_report.busy or self.ttt_held.requests) and self.pause_state != PauseState.PAUSED_ALL
        return super().has_requests() or bool(learning or self.ttt_refused or self.ttt_tiers.busy)

    def _give_up(self, session: Session, error: RequestError) -> None:
        """Refuse the requests of a session that cannot be brought back, and of one that another server may have."""
        waiting = [self.requests[request_id] for request_id in session.requests if request_id in self.requests]
        self.finish_requests([request.request_id for request in waiting], RequestStatus.FINISHED_ABORTED)
        self.ttt_counts.add("refused_requests_total", len(waiting), str(error.status))
        self.ttt_refused += [(request, error) for request in waiting]

    def ttt_loop(self, engine: Any) -> None:
        """Called by the engine core whenever it may rest or end."""
        if self.ttt_store is None:
            return
        if not engine.is_running():
            self.ttt_guard(self.ttt_ending.step)
        elif self.ttt_alarm is None:
            self.ttt_alarm = Alarm(engine, self.ttt_config.sessions.autosave, self.ttt_tiers)

    def shutdown(self) -> None:
        self.ttt_guard(self.ttt_tiers.end)
        super().shutdown()
