"""The hooks in vLLM's worker, for every device and model runner. Each guards itself: serving never fails because of learning."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_ttt.plugin import config_of
from vllm_ttt.types import StepPlan
from vllm_ttt.worker.backlog import Backlog
from vllm_ttt.worker.budget import Budget
from vllm_ttt.worker.capture import Capture
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.micro_step import MODULES
from vllm_ttt.worker.slots import Slots
from vllm_ttt.worker.step_view import view_v1
from vllm_ttt.worker.tail import build_tail, find_modules
from vllm_ttt.worker.trainer import Trainer

logger = init_logger(__name__)


class TTTWorkerMixin:
    """Goes before a vLLM worker class. ``load_model`` builds everything; nothing is allocated for good afterwards."""

    model_runner: Any
    vllm_config: Any
    trainer: Trainer

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        config = config_of(self.vllm_config)
        assert config is not None, "a TTT worker needs additional_config['ttt']"
        runner = self.model_runner
        model = runner.get_model()
        modules = find_modules(model)
        tail = build_tail(model, modules, config.adapt.rank, config.adapt.seed)
        dtype, device = tail.head_VD.dtype, tail.head_VD.device
        max_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.capture = Capture(modules, max_tokens, dtype, device)
        pages = config.schedule.backlog_tokens // config.learn.chunk + config.sessions.resident
        self.backlog = Backlog(pages, config.learn.chunk, config.learn.min_chunk, self.capture.h_ND, self.capture.a_NQ)
        deltas = Deltas(tail, config.sessions.resident)
        slots = Slots(runner.lora_manager, modules, deltas, dtype)
        self.trainer = Trainer(tail, config, self.backlog, deltas, slots)
        self.budget = Budget(config.schedule.tokens_per_step, config.schedule.max_slowdown)
        self.ran: Any = None  # the SchedulerOutput whose rows are in the capture buffers
        self.serving_seconds = 0.0
        self.began: dict[str, int] = {}
        logger.info(
            "vllm-ttt: adapting %s; rank %d, %d resident sessions, %.1f MB each, backlog of %d tokens",
            ", ".join(modules.names.values()), config.adapt.rank, config.sessions.resident,
            deltas.bytes_per_session() / 1e6, pages * config.learn.chunk,
        )  # fmt: skip

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        plan: StepPlan = getattr(scheduler_output, "ttt", None) or StepPlan()
        serving = scheduler_output.total_num_scheduled_tokens > 0
        self._guard(self._between, scheduler_output, plan, serving)
        self.capture.active.fill_(plan.sessions)
        started = time.perf_counter()
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        self.serving_seconds = time.perf_counter() - started
        self.ran = scheduler_output if plan.sessions else None
        if output is not None and not serving:
            output = copy.copy(output)  # vLLM shares one empty output
            output.ttt = self._report()
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        started = time.perf_counter()
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        self.budget.served(self.serving_seconds + time.perf_counter() - started)
        if self.ran is not None:
            self._guard(self._take)
        output.ttt = self._report()
        return output

    def ttt_session(self, key: int) -> dict[str, Any]:
        """What the worker knows of a session; called through collective_rpc."""
        trainer = self.trainer
        session = trainer.deltas.sessions.get(key)
        norms = session.norms if session else [0.0] * len(MODULES)
        return {
            "tier": "slot" if trainer.slots.holds(key) else "memory",
            "bytes": trainer.deltas.bytes_per_session(),
            "norm": dict(zip(MODULES, norms, strict=True)),
        }

    @torch.inference_mode()
    def ttt_drop(self, key: int) -> None:
        """Reset a session that has no request in the engine; called through collective_rpc."""
        self.trainer.drop(key)

    def ttt_delta(self, key: int) -> dict[str, list[list[float]]]:
        """The master B of a session, by module; for tests and tools, through collective_rpc."""
        return {name: b[0].tolist() for name, b in self.trainer.deltas.read(key).parts()}

    def _between(self, scheduler_output: Any, plan: StepPlan, serving: bool) -> None:
        """Before an iteration: learn what the budget allows, or all that may be where nobody is served; then the slots."""
        for request in scheduler_output.finished_req_ids:
            self.backlog.finish(request)
        if self.backlog.queues:
            tokens = self.budget.tokens() if serving else self.budget.tokens_per_step
            if tokens:
                started = time.perf_counter()
                learned = self.trainer.learn(tokens)
                self.budget.learned(learned, time.perf_counter() - started)
        self.trainer.sync()
        for request, request_plan in plan.started.items():
            self.backlog.start(request, request_plan)
            self.began[request] = self.trainer.deltas.session(request_plan.session).served

    def _take(self) -> None:
        """After an iteration: keep the rows that are to be learned, before the next one overwrites them."""
        scheduler_output, self.ran = self.ran, None
        view = view_v1(self.model_runner, scheduler_output, self.backlog.readings)
        needed = self.backlog.pages_needed(sum(len(rows.next_tokens) for rows in view))
        while len(self.backlog.free) < needed and self.backlog.queues:
            self.trainer.learn(self.budget.tokens_per_step)  # the backlog is full: learning cannot yield any longer
        self.backlog.take(view, self.capture.h_ND, self.capture.a_NQ)

    def _report(self) -> Any:
        report = self.trainer.take_report()
        report.began, self.began = self.began, {}
        return report

    def _guard(self, hook: Any, *args: Any) -> None:
        try:
            hook(*args)
        except Exception:
            self.trainer.failed(f"{hook.__name__} failed; what waited to be learned is given up")
            for key in list(self.backlog.queues) + [r.plan.session for r in self.backlog.readings.values()]:
                self.backlog.drop_session(key)
