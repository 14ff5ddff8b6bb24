"""The hooks in vLLM's worker, for every device and model runner. Serving never fails because of them: each is guarded."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import RequestError
from vllm_ttt.log import logger_of
from vllm_ttt.plugin import config_of
from vllm_ttt.support import geometry_of, served_name
from vllm_ttt.types import NO_ADAPTERS, StepPlan
from vllm_ttt.vault import Vault
from vllm_ttt.worker import memory
from vllm_ttt.worker.answers import Answers
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.kv_cache import KVCache
from vllm_ttt.worker.capture.past import PastSource
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.files import Files
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.budget import Budget, tile_sizes
from vllm_ttt.worker.learn.device_times import DeviceTimes, Load
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.memory import SMALLEST_SHARE
from vllm_ttt.worker.ngrams.caches import Caches
from vllm_ttt.worker.ranks import ranks_of
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.signals import leave_with_the_engine
from vllm_ttt.worker.sites import site_of
from vllm_ttt.worker.step.tail import TailModules, step_dtype

logger = logger_of(__name__)

#: Seconds before the end of a step in which the host launches the next one; it takes a few milliseconds. Until then it looks
#: every so many whether the step has ended: a small one takes less than is known of it.
AHEAD, PAUSE = 0.012, 0.001


class TTTWorkerMixin(Answers):
    """Goes before a vLLM worker class. ``load_model`` builds everything; nothing is allocated for good afterwards."""

    device: Any
    model_runner: Any
    vllm_config: Any
    #: a bool tensor on the host, as `ttt_idle_flag` says; None with the preset head
    idle: Tensor | None = None
    #: whether sessions are kept on disk, and none has come yet
    untouched = False

    # What differs between devices and model runners.

    def ttt_idle_flag(self, modules: TailModules) -> Tensor:
        """A bool tensor on the host: whether the batch that runs has no row of a session. Make the LoRA path ours, too."""
        raise NotImplementedError

    def ttt_view(self, ran: Any, wanted: Any) -> list[Rows]:
        """Rows of the batch that has just run, of the requests in ``wanted``; ``ran`` is what `ttt_batch` returned."""
        raise NotImplementedError

    def ttt_batch(self, scheduler_output: Any) -> Any:
        """What `ttt_view` needs of the batch whose forward has been launched; called before ``sample_tokens``."""
        raise NotImplementedError

    def ttt_mix(self, caches: Caches) -> None:
        """Serve what the sessions' caches say, mixed with the model's logits."""
        raise NotImplementedError

    def ttt_head_slots(self, deltas: Deltas, slots: int) -> HeadSlots:
        """Of the preset head."""
        raise NotImplementedError

    def ttt_adapt(self, slots: HeadSlots) -> None:
        """Let the model runner serve with them."""
        raise NotImplementedError

    def ttt_adapters(self) -> None:
        """Make vLLM's LoRA, of adapters that are no sessions', what it should be; before the model computes anything."""

    def ttt_memory_left(self) -> int:
        """Bytes that vLLM may still use on the device once the model is loaded, KV cache included."""
        raise NotImplementedError

    # vLLM's entry points.

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        config = config_of(self.vllm_config)
        assert config is not None, "a TTT worker needs additional_config['ttt']"
        self.untouched = config.sessions.state_dir is not None
        model, max_tokens = self.vllm_config.model_config, self.vllm_config.scheduler_config.max_num_batched_tokens
        self.ranks, geometry = ranks_of(self.vllm_config), geometry_of(model, config)
        own = geometry.shard(self.ranks.size, model.get_head_size())
        site = site_of(self, geometry, config)
        left, products = self.ttt_memory_left(), step_dtype(model.dtype, self.device)
        if products != model.dtype:
            logger.warning(
                "vllm-ttt: this CPU has no fast products in %s. The step works in float32; --dtype float32 would make the "
                "serving faster too",
                model.dtype,
            )
        cuda = self.device.type == "cuda"
        tokens = -(-model.get_vocab_size() // self.ranks.size)
        sizes = (model.dtype.itemsize, tokens, model.max_model_len, products.itemsize, cuda)
        needs = memory.needs(own, config, max_tokens, *sizes, site.copied(products))
        step = memory.step_bytes(own, config, products.itemsize, model.max_model_len, cuda)
        packed = memory.packed_bytes(own, config, products.itemsize, model.max_model_len, cuda)
        if site.attentions and cuda:
            needs["what such a step attends to, where no graph fits (--max-model-len)"] = packed
            needs["the graphs of such steps"] = memory.GRAPHS
        if below := site.below(geometry.rank, products):
            needs["A beside each weight that has a delta (adapt.rank, adapt.layers)"] = below
        if site.rounded:
            needs["the weights of the adapted layers in FP8 (learn.fp8)"] = site.rounded
        memory.check(needs, left)
        tail, self.capture = site.build()
        dtype, device = model.dtype, tail.head_VD.device
        pages = memory.pages(config)
        buffers = self.capture.h_ND, self.capture.a_NQ
        self.backlog = Backlog(pages, config.learn.chunk, config.learn.min_chunk, *buffers, model.get_vocab_size())
        deltas = Deltas(tail, config.sessions.resident, config.learn.rate)
        assert deltas.bytes_per_session() == own.bytes, "the model's configuration and its weights disagree"
        slots = site.slots(deltas)
        #: what the step attends to; None where it does not
        self.cache = KVCache(site.attentions, dtype) if site.attentions else None
        tried = config.guard.probe_tokens if config.guard.every else 1
        self.probe = Probe(tried, self.capture.h_ND, self.capture.a_NQ, self.cache)
        self.trainer = Trainer(
            tail, config, self.backlog, deltas, slots, self.probe, self.cache, memory.past_rows(model.max_model_len)
        )
        vault = Vault.of(config.sessions.key_file)
        self.files = Files(self.trainer, geometry, served_name(model), vault, config.cache)
        if self.trainer.caches.on:
            self.ttt_mix(self.trainer.caches)
        site.serve(slots)
        self.clock = self.trainer.clock
        self.budget = Budget(memory.tile(config, cuda), config.schedule.max_slowdown)
        self.times = DeviceTimes(self.clock, self.budget)
        #: (before the forward, after sampling) of iterations whose times are not known yet
        self.iterations: deque[tuple[Any, Any]] = deque()
        self.ran: Any = None
        #: before the forward of the iteration that runs
        self.start: Any = None
        #: when the step under way should be done, by `time.perf_counter`
        self.ends = 0.0
        self.began: dict[str, int] = {}
        #: keeps room on the device: until vLLM has its KV cache, for the graphs of the step; until the first step, for what one
        #: without a graph attends to
        self.reserve: list[Tensor] = []
        if self.cache is None:
            self.ttt_warm_up(config)
        elif device.type == "cuda":
            self.reserve = [torch.empty(size, dtype=torch.uint8, device=device) for size in (packed, step + memory.GRAPHS)]
        logger.info(
            "vllm-ttt: adapting %s; rank %d, %d resident sessions of %.1f MB, backlog of %d tokens, %.2f GiB in all",
            "the last hidden state" if geometry.head else f"{', '.join(config.adapt.modules)} of {geometry.layers} layers",
            geometry.rank, config.sessions.resident,
            deltas.bytes_per_session() / 1e6, pages * config.learn.chunk, (left - self.ttt_memory_left()) / 2**30,
        )  # fmt: skip

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        if self.cache is None:
            return
        config = config_of(self.vllm_config)
        assert config is not None
        with torch.inference_mode():
            self.cache.bind(kv_cache_config.kv_cache_groups)
        if self.reserve:
            self.reserve.pop()
            torch.cuda.empty_cache()  # at start only
        self.ttt_warm_up(config)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        plan: StepPlan = getattr(scheduler_output, "ttt", None) or StepPlan()
        if self.untouched and plan.started:
            self.untouched = False
            leave_with_the_engine()
        serving = scheduler_output.total_num_scheduled_tokens > 0
        self.ranks.note(scheduler_output.total_num_scheduled_tokens)  # one that has missed a decision lags behind from then on
        if plan.files or not self.files.idle:
            self.files.step(plan.files)
        # Guarded one by one: a request whose start or end is missed would keep its session waiting for ever.
        self._guard(self._preempt, (*(scheduler_output.preempted_req_ids or ()), *plan.lost))
        self._guard(self._resume, scheduler_output.scheduled_new_reqs)
        self._guard(self._finish, scheduler_output, plan)
        self.trainer.stopped.difference_update(plan.stopped)
        self.trainer.still, self.trainer.shares.awaited = set(plan.still), frozenset(plan.awaited)
        self._guard(self._between, serving, plan.urgent)
        self._guard(self._start, plan)
        self._guard(self._note_blocks, scheduler_output)
        self.start = self.clock.mark()
        with self.ranks.alike("vLLM's part of an iteration failed"):  # it would hear of the first rank alone
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        if serving:
            self.ran = self.ttt_batch(scheduler_output) if plan.sessions else None
            if self.ran is not None:
                self.capture.ran(self.model_runner.execute_model_state)
        elif output is not None:
            output = copy.copy(output)  # vLLM shares one empty output
            output.ttt = self._guard(self._report)
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        with self.ranks.alike("vLLM's part of an iteration failed"):
            output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self.start is not None:
            self.iterations.append((self.start, self.clock.mark()))
            self.start = None
        if self.ran is not None:
            self._guard(self._take)
        if output is not None:
            getattr(output, "model_runner_output", output).ttt = self._guard(self._report)
        return output

    # Called through collective_rpc.

    def add_lora(self, lora_request: Any) -> bool:
        """vLLM's, for adapters from outside. What a session is served with does not come this way."""
        if self.idle is not None:  # sessions have vLLM's slots
            raise RequestError(NO_ADAPTERS, param="model")
        return super().add_lora(lora_request)  # type: ignore[misc]

    # Between iterations.

    @torch.inference_mode()
    def ttt_warm_up(self, config: TTTConfig) -> None:
        """Run steps of each size: measures what they cost, loads the kernels that they use, and captures their graphs."""
        most = self.budget.tokens_per_step
        sizes = tile_sizes(most, config.learn.chunk)
        source = None if self.cache is None else PastSource(self.cache, ())
        sessions = [min(-(-tokens // config.learn.chunk), config.sessions.resident) for tokens in sizes]
        shapes = [(S, min(-(-tokens // S), config.learn.chunk)) for S, tokens in zip(sessions, sizes, strict=True)]
        many = min(memory.most_sessions(config), config.sessions.resident)
        if many > 1 and self.clock.cuda:
            shapes.append((many, min(SMALLEST_SHARE, config.learn.chunk)))  # many sessions with a little to learn each
        for tokens, seconds in zip(sizes, self.trainer.compute.warm_up(shapes, self._timed, source), strict=False):
            self.budget.calibrate(tokens, seconds)
        logger.info("vllm-ttt: %d tokens are learned in %.1f ms", most, 1e3 * self.budget.costs[most])

    def _timed(self, run: Any) -> float:
        times = []
        for _ in range(3 if self.clock.cuda else 1):  # a CPU has nothing to load, and its steps take long
            first = self.clock.mark()
            run()
            last = self.clock.mark()
            self.clock.wait(last)
            times.append(self.clock.seconds(first, last))
        return min(times)

    def _preempt(self, requests: Iterable[str]) -> None:
        """Before anything is learned: the batch that follows may be given the blocks that these requests had."""
        for request in sorted(requests) if self.cache is not None else ():  # vLLM's is a set, whose order differs between ranks
            self.backlog.preempt(request)

    def _resume(self, requests: Iterable[Any]) -> None:
        """Those that begin, or run again. (Model runner V1, which has no part in this, knows nothing of what runs ahead.)"""
        for request in requests:
            if request.prefill_token_ids is not None:
                self.backlog.resume(request.req_id, len(request.prefill_token_ids) - 1)

    def _note_blocks(self, scheduler_output: Any) -> None:
        """Which blocks of the KV cache vLLM has given to requests that learn."""
        if self.cache is None or not self.backlog.readings:
            return
        group, cached = self.cache.group, scheduler_output.scheduled_cached_reqs
        for new in scheduler_output.scheduled_new_reqs:
            self.backlog.note_blocks(new.req_id, new.block_ids[group], anew=True)
        for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if blocks is not None:
                self.backlog.note_blocks(request, blocks[group], anew=request in cached.resumed_req_ids)

    def _finish(self, scheduler_output: Any, plan: StepPlan) -> None:
        for request in sorted(scheduler_output.finished_req_ids):  # a set, too
            self.backlog.finish(request, plan.ended.get(request))
            self.trainer.caches.finish(request)
            self.trainer.slots.finish(request)
            self.probe.finish(request)

    def _start(self, plan: StepPlan) -> None:
        for request, request_plan in plan.started.items():
            if request_plan.probe:
                self.probe.start(request, request_plan)
                continue
            self.trainer.start(request, request_plan)
            self.trainer.caches.start(request, request_plan)
            self.trainer.slots.start(request, request_plan.session)
            self.began[request] = self.trainer.deltas.session(request_plan.session).served

    def _between(self, serving: bool, urgent: list[str]) -> None:
        """Before an iteration: learn what the budget allows, or all that may be where nobody is served; then the slots.

        Args:
            urgent: requests that are learned in any case, whoever is served.
        """
        self._read_times()
        if self.backlog.queues or self.trainer.guard.busy:
            self.reserve.clear()
            if serving:
                self._learn_beside(urgent)
            else:
                self._learn_alone()
        self.trainer.sync()
        if not serving:
            self.trainer.collect(wait=not self.backlog.queues)

    def _learn_beside(self, urgent: list[str]) -> None:
        """What must be learned, and what the time that serving has taken allows."""
        if urgent:
            enough, tokens = lambda: not self.backlog.waits(urgent), self.budget.tokens_per_step
            self._learn(lambda: self.trainer.make_room(enough, tokens), "serving")
        if tokens := self.trainer.ranks.agree("how much is learned", self.budget.tokens):
            self.budget.spend(self._learn(lambda: self.trainer.learn(tokens), "serving"))

    def _learn_alone(self) -> None:
        """One step at a time, so that a request that comes now waits for one only. The next one is launched just before it
        ends, and what came of it is taken in while that runs."""
        under_way = self.trainer.marks()
        while under_way and not self.clock.done(under_way[-1]) and (left := self.ends - AHEAD - time.perf_counter()) > 0:
            time.sleep(min(left, PAUSE))
        begins = time.perf_counter()
        learned = self._learn(lambda: self.trainer.learn(self.budget.tokens_per_step), "idle")
        for mark in under_way:
            if not self.clock.done(mark):
                self.clock.wait(mark)
                begins = time.perf_counter()
        self.ends = begins + self.budget.cost(learned)

    def _learn(self, learn: Callable[[], int | None], load: Load) -> int:
        """How many tokens ``learn`` has launched. How long the device takes for them is known later."""
        self.trainer.began = None
        tokens = learn() or 0
        if self.trainer.began is not None:
            self.times.under_way.append((self.trainer.began, self.clock.mark(), tokens, load))
        return tokens

    def _read_times(self) -> None:
        """Tell the budget of what is over."""
        self.times.read()
        while self.iterations and self.clock.done(self.iterations[0][1]):
            seconds = self.clock.seconds(*self.iterations.popleft())
            self.budget.served(seconds)
            self.times.serving += seconds

    def _take(self) -> None:
        """After an iteration: keep the rows that are to be learned, before the next one overwrites them."""
        ran, self.ran = self.ran, None
        captured = self.backlog.wanted()
        wanted = {**captured, **self.probe.reading}
        try:
            if wanted:
                self._keep(ran, wanted)
        except Exception:
            self.trainer.failed("_take failed; what the sessions of the batch have waiting is given up")
            for key in {reading.plan.session for reading in captured.values()}:
                self.trainer.lose(key, "error")
        finally:
            self.capture.taken()

    def _keep(self, ran: Any, wanted: dict[str, Any]) -> None:
        view = self.ttt_view(ran, wanted)
        if self.probe.reading:
            self.probe.take([r for r in view if r.request in self.probe.reading], self.capture.h_ND, self.capture.a_NQ)
            view = [rows for rows in view if rows.request not in self.probe.reading]
        needed = self.backlog.pages_needed(view)
        self.trainer.ranks.note(needed, self.backlog.room)
        if self.backlog.room < needed:
            self.backlog.begin(view)  # what is learned now is not what this batch has read them with
            self.trainer.make_room(lambda: self.backlog.room >= needed, self.budget.tokens_per_step)
        while lacking := self.backlog.lacking(view):
            self.trainer.lose(self.backlog.readings[lacking[0]].plan.session, "full")
        self.backlog.take(view, self.capture.h_ND, self.capture.a_NQ)

    def _report(self) -> Any:
        report = self.trainer.take_report()
        report.began, self.began = self.began, {}
        report.files = self.files.take_reports()
        return report

    def _guard(self, hook: Any, *args: Any) -> Any:
        try:
            return hook(*args)
        except Exception:
            self.trainer.failed(f"{hook.__name__} failed")
            return None
