"""The configuration: one frozen pydantic model, read from YAML, refused when a key is unknown or a value out of range.

It travels to the engine core and the workers in ``VllmConfig.additional_config["ttt"]``.
"""

from __future__ import annotations

import math
import os
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from vllm_ttt.automaton import Automaton
from vllm_ttt.errors import ConfigError

#: How sure a model is, in steps: its probability of the likeliest token.
CACHE_SURE = (0.95, 0.8, 0.5, 0.25)
#: Share of the session's cache before anything was seen, by length of the longest context that it knows, from 1, and by how
#: sure the model is; worth so many tokens of experience (docs/cache.md).
CACHE_PRIOR = (
    (0.0003, 0.0006, 0.0012, 0.003, 0.004),
    (0.002, 0.004, 0.007, 0.012, 0.025),
    (0.007, 0.01, 0.02, 0.035, 0.055),
    (0.03, 0.04, 0.055, 0.08, 0.1),
    (0.06, 0.08, 0.12, 0.15, 0.18),
    (0.15, 0.25, 0.4, 0.5, 0.55),
    (0.2, 0.35, 0.5, 0.6, 0.65),
    (0.25, 0.4, 0.55, 0.65, 0.7),
)
CACHE_PRIOR_TOKENS = 10
#: Length of the longest context where nobody has chosen another.
CACHE_ORDERS = 6

#: The ranks that vLLM's LoRA configuration can hold (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

#: What a preset means where the config says nothing else (docs/algorithm.md).
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "deep": {"adapt": {"layers": "all", "modules": ["o_proj", "down_proj"], "rank": 64}, "learn": {"rate": 0.012}},
    "last": {
        "adapt": {"layers": 1, "modules": ["o_proj", "gate_up_proj", "down_proj"], "rank": 128},
        "learn": {"rate": 0.008},
    },
    "head": {"adapt": {"layers": 1, "modules": ["lm_head"], "rank": 512}, "learn": {"rate": 0.012}},
}

Module = Literal["o_proj", "gate_up_proj", "down_proj", "lm_head"]
#: Modules as the step names them; gate and up, one tensor of vLLM's, are two there. In the order in which a layer applies them.
#: The delta of lm_head is on its input, the last hidden state y.
LETTERS: dict[str, str] = {"o_proj": "o", "gate_up_proj": "gu", "down_proj": "d", "lm_head": "y"}


#: What only the experiments of this project can choose. The code and the oracle read it as they read settings; a config file
#: may not change it, unless EXPERIMENTS is set.
CONSTANT = Field(json_schema_extra={"constant": True})
EXPERIMENTS = "VLLM_TTT_EXPERIMENTS"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class AdaptConfig(_Model):
    """Which layers carry a delta, and how large it is."""

    preset: Literal["deep", "last", "head"] = "deep"
    """`deep` adapts every layer, or the last `layers`; `last` the last one; [`head`](head.md) the last hidden state."""
    layers: Annotated[int, Field(ge=1, le=1024)] | Literal["all"] = "all"
    """How many layers are adapted, counted from the end, or `all`. `last` has one; with `head` it is 1, and none is meant."""
    modules: Annotated[tuple[Module, ...], CONSTANT] = ("o_proj", "down_proj")
    """The linear layers that get a delta. With `last` these and gate_up_proj, with `head` lm_head alone."""
    rank: int = 64
    """Rank of a delta; `last` has 128 by default, `head` 512, and at most the hidden size. A higher rank gains more, and each
    session takes more memory."""
    seed: Annotated[int, Field(ge=0, lt=2**63), CONSTANT] = 0
    """Seed of the fixed projections A. Deltas learned under one seed mean nothing under another."""

    @field_validator("rank")
    @classmethod
    def _rank(cls, rank: int) -> int:
        if rank not in RANKS:
            raise ValueError(f"rank {rank} is not one that vLLM's LoRA slots can hold; allowed: {RANKS}")
        return rank

    @field_validator("layers")
    @classmethod
    def _layers(cls, layers: int | str, info: ValidationInfo) -> int | str:
        if (preset := info.data.get("preset")) in ("last", "head") and layers != 1:
            raise ValueError(f"layers must be 1 with the preset {preset}; the preset deep takes more")
        return layers

    @field_validator("modules")
    @classmethod
    def _modules(cls, modules: tuple[Module, ...], info: ValidationInfo) -> tuple[str, ...]:
        head = info.data.get("preset") == "head"
        if modules != ("lm_head",) if head else "lm_head" in modules:
            raise ValueError("modules must be lm_head alone with the preset head, and lm_head has a delta with no other")
        if not modules or len(set(modules)) != len(modules):
            raise ValueError("modules must be one or more of o_proj, gate_up_proj and down_proj, each once")
        return tuple(m for m in LETTERS if m in modules)

    @property
    def letters(self) -> str:
        """The modules as the step names them: a part of "ogud", or "y"."""
        return "".join(LETTERS[m] for m in self.modules)

    @property
    def in_slots(self) -> bool:
        """Whether deltas are served from vLLM's LoRA slots: a session's request then has an adapter of vLLM's."""
        return self.preset != "head"


class LearnConfig(_Model):
    """The micro-step: what is learned and how fast (docs/algorithm.md)."""

    tokens: Literal["prompt", "all"] = "prompt"
    """What is learned of a request that does not say: its prompt, or (`all`) its answer too."""
    chunk: Annotated[int, Field(ge=16, le=4096), CONSTANT] = 512
    """Tokens per step of the optimiser."""
    rate: Annotated[float, Field(ge=1e-5, le=0.1), CONSTANT] = 0.012
    """Length of a session's first step, relative to the norm of the weight (`last`: 0.008). Then the rate sets itself."""
    adapt_rate: Annotated[float, Field(ge=0, le=1000), CONSTANT] = 20.0
    """How strongly the rate follows the agreement of a chunk's gradient with the update before it. 0: the rate is fixed."""
    decay: Annotated[float, Field(ge=0, lt=1), CONSTANT] = 0.015
    """Share of the delta that each step forgets."""
    max_norm: Annotated[float, Field(gt=0, le=10), CONSTANT] = 0.35
    """Trust region: the delta's norm relative to the weight's never exceeds this."""
    max_loss: Annotated[float, Field(gt=0, le=2), CONSTANT] = 0.7
    """A chunk whose loss exceeds this times ln(vocabulary) is not learned: it is noise."""
    min_chunk: Annotated[int, Field(ge=1, le=1024), CONSTANT] = 8
    """A chunk shorter than this is not learned."""
    filter: tuple[str, ...] = ()
    """Regular expressions. Text of a prompt that matches one is not learned ([operators.md](operators.md#filter))."""
    history: Annotated[Literal["skip", "learn"], CONSTANT] = "skip"
    """Whether the history of a prompt is skipped, or learned again."""
    fp8: Literal["none", "back", "both"] = "none"
    """`deep` on CUDA: on its way back, or both ways, the step multiplies with weights in FP8 ([deep.md](deep.md#fp8))."""
    interleave: bool = False
    """`true`: a prompt is read in chunks, each learned before the next one is read. A request can say otherwise."""

    @field_validator("filter")
    @classmethod
    def _filter(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if len(patterns) > 64 or any(not 0 < len(p) <= 500 for p in patterns):
            raise ValueError("filter takes up to 64 patterns of 1 to 500 characters")
        Automaton(patterns)
        return patterns


class ScheduleConfig(_Model):
    """When the micro-steps run."""

    tokens_per_step: Annotated[int, Field(ge=16, le=65536), CONSTANT] = 512
    """Most tokens that are learned between two iterations of the engine; on a GPU twice as many while nobody is served."""
    max_slowdown: Annotated[float, Field(ge=1.01, le=100)] = 1.25
    """How much longer serving may take because of learning. 1.25: learning takes at most a quarter of the serving time,
    apart from what cannot wait: answers that are learned, in a full backlog, and prompts longer than it."""
    backlog_tokens: Annotated[int, Field(ge=1024, le=2**24)] = 65536
    """Tokens of all sessions together that may wait to be learned. They take memory of the device."""
    consistency: Literal["read-your-writes", "eventual"] = "read-your-writes"
    """Whether a session's next request waits until its earlier requests have been learned."""
    kv_epoch: Annotated[float, Field(ge=0, le=10), CONSTANT] = 0.05
    """`deep`: how far a delta may move, relative to its weights, before cached keys and values are computed anew."""

    @field_validator("max_slowdown", mode="before")
    @classmethod
    def _max_slowdown(cls, factor: Any) -> Any:
        if isinstance(factor, int | float) and factor < 1.01:
            raise ValueError(
                "max_slowdown must be at least 1.01: with no time of its own learning would wait until nobody is served, and "
                "so would each session's next request. To serve without learning, send ttt_learn: 0"
            )
        return factor


class SessionsConfig(_Model):
    """How many sessions, and where they live."""

    resident: Annotated[int, Field(ge=1, le=1024)] = 64
    """Sessions that can be served at the same time. Each takes one of vLLM's LoRA slots."""
    host_gib: Annotated[float, Field(gt=0, le=65536)] = 8.0
    """GiB of host memory for sessions without a slot, each counted twice where the guard is on. Others move to the state dir;
    without one, a new session is a 429."""
    state_dir: str | None = None
    """Folder in which sessions outlive the server (`--ttt-state-dir`). null: they end with it."""
    shared: bool = False
    """Several servers use the state dir at once, and each session is [in one of them](scale.md#several-servers)."""
    autosave: Annotated[float, Field(ge=0.1, le=86400)] = 30.0
    """Seconds within which the save of a session that has learned begins, four at a time. A crash loses what was not saved."""
    keep_versions: Annotated[int, Field(ge=1, le=1000)] = 3
    """Earlier versions of each session that are kept for a rollback: this many in memory, and this many on disk. Besides
    them, the last one that the guard found good."""
    disk_gib: Annotated[float, Field(gt=0, le=2**20)] = 100.0
    """GiB that the state dir may take. When it is full, older versions are removed first; then a new session is a 429."""
    ttl: Annotated[str, Field(pattern=r"^([1-9][0-9]{0,5}[smhd]|never)$")] = "30d"
    """A session that nobody has used for this long is removed, with its files."""
    admin_key_file: str | None = None
    """File with an API key that may list the sessions of all keys."""
    per_key: Annotated[int | None, Field(ge=1, le=10**9)] = None
    """Sessions that one API key may have; one more is a 429. null: as many as its share of the room allows."""
    key_share: Annotated[float, Field(gt=0, le=1), CONSTANT] = 0.5
    """Where there are several API keys: the share of the room (its own sessions and what is free) that one key may take."""
    held_per_session: Annotated[int, Field(ge=1, le=10**6), CONSTANT] = 1000
    """Requests of one session that may wait for it; one more is a 429."""
    version_every: Annotated[int, Field(ge=1, le=10**6), CONSTANT] = 16
    """Updates between two versions that are kept in memory."""
    versions_gib: Annotated[float, Field(ge=0, le=65536), CONSTANT] = 2.0
    """GiB of memory for kept versions. When it is full, the session with the most of them loses its oldest. 0: none is kept."""
    key_file: str | None = None
    """File with the 32-byte key that encrypts the state dir; null: no encryption. Without that key the sessions are lost."""
    audit_log: str | None = None
    """File of the [audit log](operators.md#audit-log). A name without a folder is in the state dir. null: no audit log."""

    @property
    def audit_path(self) -> Path | None:
        """Where the audit log is. Raises ConfigError where that is a state dir, and there is none."""
        if self.audit_log is None or Path(self.audit_log).is_absolute():
            return None if self.audit_log is None else Path(self.audit_log)
        if self.state_dir is None:
            raise ConfigError(f"sessions.audit_log {self.audit_log} is in the state dir, and there is none: name a full path")
        return Path(self.state_dir).absolute() / self.audit_log

    @property
    def ttl_seconds(self) -> float:
        """``ttl`` in seconds; infinite for `never`."""
        units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
        return math.inf if self.ttl == "never" else float(int(self.ttl[:-1]) * units[self.ttl[-1]])


class GuardConfig(_Model):
    """What keeps a session from being spoiled, and from spoiling what the model knows."""

    every: Annotated[int, Field(ge=0, le=10**6)] = 16
    """Updates of a session after which the guard tries its delta on the probe. 0: never, so that the guard is off."""
    max_regression: Annotated[float, Field(gt=0, le=100), CONSTANT] = 0.5
    """Nats per token by which a delta may make the probe worse. A worse delta is rolled back, and its session is frozen."""
    probe: str | None = None
    """File of the probe, plain text that no session sends. null: the text that comes with vllm-ttt."""
    probe_tokens: Annotated[int, Field(ge=64, le=65536), CONSTANT] = 2048
    """Most tokens of the probe that are used. Their activations stay on the device."""
    min_ratio: Annotated[float, Field(ge=0, lt=1), CONSTANT] = 0.15
    """A chunk of a prompt that zlib compresses below this share of its size repeats itself, and is not learned. 0: no limit."""
    hourly_tokens: Annotated[int, Field(ge=0, le=10**12)] = 1000000
    """Tokens that a session may learn within an hour. A request beyond that is answered and not learned. 0: no limit."""
    hourly_tokens_per_key: Annotated[int, Field(ge=0, le=10**12)] = 100000000
    """The same for all sessions of an API key together, deleted and reset ones included. 0: no limit."""


class CacheConfig(_Model):
    """The session's own n-grams, mixed with what the model says (docs/cache.md)."""

    orders: Annotated[int, Field(ge=0, le=len(CACHE_PRIOR))] | Literal["auto"] = "auto"
    """Length of the longest n-gram context, in tokens. 0: no cache. `auto`: 6, or 0 where [none can be served](cache.md)."""
    tokens: Annotated[int, Field(ge=512, le=2**20), CONSTANT] = 65536
    """Most tokens of a session that its cache remembers; the oldest go first."""

    @property
    def longest(self) -> int:
        """``orders`` as a number. A server has put one in the place of `auto` when it starts (support.settle_cache)."""
        return CACHE_ORDERS if self.orders == "auto" else self.orders

    @property
    def bytes(self) -> int:
        """What a session that has as many tokens takes in memory, and in a file, if it was sent in the shortest pieces."""
        return 9 * self.tokens if self.longest else 0

    @property
    def index_bytes(self) -> int:
        """What it takes besides while it is being served."""
        return 12 * self.longest * self.tokens


class ObserveConfig(_Model):
    """What is measured for people to look at."""

    recent_chunks: Annotated[int, Field(ge=1, le=4096), CONSTANT] = 64
    """How many chunk losses `GET /v1/ttt/sessions/{id}` shows."""


class TTTConfig(_Model):
    """Everything that can be configured. See configs/default.yaml for a file with every key."""

    adapt: AdaptConfig = AdaptConfig()
    learn: LearnConfig = LearnConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sessions: SessionsConfig = SessionsConfig()
    guard: GuardConfig = GuardConfig()
    cache: CacheConfig = CacheConfig()
    observe: ObserveConfig = ObserveConfig()

    @model_validator(mode="after")
    def _chunks(self) -> TTTConfig:
        if self.schedule.tokens_per_step < self.learn.chunk:
            raise ValueError(
                f"schedule.tokens_per_step {self.schedule.tokens_per_step} is less than learn.chunk {self.learn.chunk}, and a "
                "chunk is learned in one step"
            )
        return self

    @model_validator(mode="after")
    def _fp8(self) -> TTTConfig:
        if self.learn.fp8 != "none" and self.adapt.preset != "deep":
            raise ValueError(
                f"learn.fp8 {self.learn.fp8} is for the preset deep, and not for {self.adapt.preset}; leave it out"
            )
        return self


def parse_config(data: dict[str, Any] | None, preset: str | None = None, source: str = "the config") -> TTTConfig:
    """Validate ``data``, with the defaults of its preset filled in.

    Args:
        data: the config as YAML gives it; None or empty means all defaults.
        preset: overrides ``adapt.preset``.
        source: what to call ``data`` in an error.
    Raises:
        ConfigError: a key is unknown, a value out of range, or the preset unknown.
    """
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{source} must be a mapping of sections, not {type(data).__name__}")
    merged = dict(data or {})
    adapt = merged.get("adapt") or {}
    name = preset or (adapt.get("preset") if isinstance(adapt, dict) else None) or "deep"
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not available; allowed: {', '.join(PRESETS)}")
    for section, defaults in {**PRESETS[name], "adapt": {**PRESETS[name]["adapt"], "preset": name}}.items():
        given = merged.get(section)
        if given is None:
            given = {}
        if isinstance(given, dict):
            merged[section] = {**defaults, **given, **({"preset": name} if section == "adapt" else {})}
    try:
        return TTTConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(f"  {line}" for line in _explain(error))) from None


def load_config(path: str | Path, preset: str | None = None) -> TTTConfig:
    """Read a YAML file. Raises ConfigError, also where the file cannot be read or is not YAML."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--ttt-config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ttt-config {path} is not YAML: {error}") from None
    config = parse_config(data, preset, source=f"--ttt-config {path}")
    settled = parse_config(None, config.adapt.preset)
    changed = [name for name in constants() if attrgetter(name)(config) != attrgetter(name)(settled)]
    if changed and not os.environ.get(EXPERIMENTS):
        values = ", ".join(f"{name} {_shown(attrgetter(name)(settled))}" for name in changed)
        raise ConfigError(
            f"--ttt-config {path}: {', '.join(changed)} cannot be changed: experiments have settled it, with the preset "
            f"{config.adapt.preset} on {values} (to run experiments of your own, start with {EXPERIMENTS}=1)"
        )
    return config


def constants() -> list[str]:
    """``section.name`` of what no config file may change."""
    return [
        f"{section}.{name}"
        for section, outer in TTTConfig.model_fields.items()
        for name, field in type(outer.default).model_fields.items()
        if (field.json_schema_extra or {}) == {"constant": True}
    ]


def _shown(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


def _explain(error: ValidationError) -> list[str]:
    """One line for each value that is wrong."""
    told: dict[tuple[str, str], list[str]] = {}
    for e in error.errors():
        # After section and name comes the kind of value that was tried. Without both, the message has the names.
        name = ".".join(map(str, e["loc"][:2]))
        unknown = e["type"] == "extra_forbidden"
        message = "unknown key" if unknown else e["msg"].removeprefix("Value error, ")
        given = "" if unknown or not name else f" (got {e['input']!r})"
        told.setdefault((name, given), []).append(message)
    return [(name and f"{name}: ") + ", or ".join(dict.fromkeys(said)) + given for (name, given), said in told.items()]
