"""The configuration: defaults, presets, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_ttt import engine_args
from vllm_ttt.config import EXPERIMENTS, PRESETS, TTTConfig, load_config, parse_config
from vllm_ttt.errors import ConfigError

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    preset = parse_config(None, name)
    assert preset.adapt.preset == name
    shown = preset.model_dump(mode="json")
    for section, values in PRESETS[name].items():
        assert {key: shown[section][key] for key in values} == values
    changed = parse_config({"learn": {"rate": 0.01}}, name)
    assert (changed.learn.rate, changed.learn.decay) == (0.01, preset.learn.decay)
    assert parse_config({"adapt": {"preset": name}}) == preset


def test_what_is_adapted() -> None:
    """In the order in which a layer applies them, however they are given; gate and up are two of the step's modules."""
    assert parse_config(None).adapt.letters == "od"
    assert parse_config(None, "last").adapt.letters == "ogud"
    swapped = parse_config({"adapt": {"modules": ["down_proj", "gate_up_proj"]}})
    assert (swapped.adapt.modules, swapped.adapt.letters) == (("gate_up_proj", "down_proj"), "gud")
    assert parse_config({"adapt": {"modules": ["gate_up_proj", "down_proj"]}}) == swapped


def test_nothing_given_is_all_defaults() -> None:
    assert parse_config(None) == parse_config({}) == parse_config({"learn": None}) == TTTConfig()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"lern": {}}, "lern: unknown key"),
        ({"learn": {"ratio": 1}}, "learn.ratio: unknown key"),
        ({"learn": {"rate": 0}}, "learn.rate: Input should be greater than or equal to 0.00001 (got 0)"),
        ({"learn": {"rate": 0.2}}, "learn.rate: Input should be less than or equal to 0.1 (got 0.2)"),
        ({"learn": {"adapt_rate": -1}}, "learn.adapt_rate"),
        ({"learn": {"scales": [1]}}, "learn.scales: unknown key"),
        ({"learn": {"chunk": 1024}}, "schedule.tokens_per_step 512 is less than learn.chunk 1024"),
        ({"learn": {"rate": "fast"}}, "learn.rate"),
        ({"learn": {"fp8": "both"}, "adapt": {"preset": "last"}}, "learn.fp8 both is for the preset deep, and not for last"),
        ({"learn": {"chunk": 8}}, "learn.chunk: Input should be greater than or equal to 16 (got 8)"),
        ({"learn": {"tokens": "none"}}, "learn.tokens: Input should be 'prompt' or 'all' (got 'none')"),
        ({"adapt": {"rank": 100}}, "adapt.rank: rank 100 is not one that vLLM's LoRA slots can hold"),
        ({"adapt": {"layers": "most"}}, "adapt.layers"),
        ({"adapt": {"preset": "last", "layers": 2}}, "adapt.layers: layers must be 1 with the preset last"),
        ({"adapt": {"preset": "last", "layers": "all"}}, "adapt.layers: layers must be 1 with the preset last"),
        ({"adapt": {"modules": []}}, "adapt.modules: modules must be one or more of o_proj, gate_up_proj and down_proj"),
        ({"adapt": {"modules": ["o_proj", "o_proj"]}}, "adapt.modules: modules must be one or more of"),
        ({"adapt": {"modules": ["q_proj"]}}, "adapt.modules"),
        ({"adapt": {"preset": "first"}}, "preset 'first' is not available; allowed: deep, last"),
        ({"schedule": {"max_slowdown": 0.9}}, "schedule.max_slowdown"),
        (
            {"schedule": {"max_slowdown": 1.0}},
            "max_slowdown must be at least 1.01: with no time of its own learning would wait",
        ),
        ({"schedule": {"max_slowdown": 1}}, "schedule.max_slowdown: "),
        ({"sessions": {"resident": 0}}, "sessions.resident"),
        ({"learn": []}, "learn"),
        ({"learn": {"rate": float("nan")}}, "learn.rate"),
        ([], "must be a mapping of sections, not list"),
        ("text", "must be a mapping of sections, not str"),
    ],
)
def test_refusals(data: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(data)
    assert says in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({"learn": {"rate": 7, "chunk": 1}, "adapt": {"x": 1}})
    assert all(key in str(error.value) for key in ("learn.rate", "learn.chunk", "adapt.x"))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (
            {"adapt": {"layers": 0}},
            "adapt.layers: Input should be greater than or equal to 1, or Input should be 'all' (got 0)",
        ),
        ({"learn": {"filter": ["a", 5]}}, "learn.filter: Input should be a valid string (got 5)"),
        (
            {"learn": {"fp8": "both"}, "adapt": {"preset": "last"}},
            "learn.fp8 both is for the preset deep, and not for last; leave it out",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_name_of_its_setting(data: Any, line: str) -> None:
    """Whatever kinds of value the setting takes; one that is several settings' shows no other setting."""
    with pytest.raises(ConfigError) as error:
        parse_config(data)
    assert str(error.value) == f"the config is not valid:\n  {line}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "ttt.yaml"
    with pytest.raises(ConfigError, match=f"--ttt-config {file}: No such file"):
        load_config(file)
    for text in ("learn: {rate: [", "a: b: c", "\t- x"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not YAML"):
            load_config(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(file)
    file.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(file)
    file.write_text("learn: {rte: 1}")
    with pytest.raises(ConfigError, match=r"(?s)--ttt-config .*ttt.yaml is not valid:.*learn.rte: unknown key"):
        load_config(file)
    file.write_text("")
    assert load_config(file) == TTTConfig()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        TTTConfig().learn.rate = 1.0  # type: ignore[misc]


def test_engine_args_take_what_users_have(tmp_path: Path) -> None:
    file = tmp_path / "ttt.yaml"
    file.write_text("adapt: {rank: 32}")
    expected = engine_args(config={"adapt": {"rank": 32}})
    assert expected["additional_config"]["ttt"]["config"]["adapt"]["rank"] == 32
    assert engine_args(config=str(file)) == engine_args(config=parse_config({"adapt": {"rank": 32}})) == expected
    with pytest.raises(ConfigError, match="unknown key"):
        engine_args(config={"learn": {"rte": 1}})
    with pytest.raises(ConfigError, match="allowed: deep, last"):
        engine_args(preset="everything")


def test_a_config_file_cannot_change_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "ttt.yaml").write_text("learn: {decay: 0.5, tokens: all, chunk: 512}\nguard: {min_ratio: 0}\n")
    with pytest.raises(ConfigError, match=r": learn\.decay, guard\.min_ratio cannot be changed"):
        load_config(file)
    monkeypatch.setenv(EXPERIMENTS, "1")
    assert load_config(file).learn.decay == 0.5


def test_a_config_file_may_name_constants_as_they_are(tmp_path: Path) -> None:
    """Those of its preset: a file that somebody wrote with all that is known of a preset is not refused for that."""
    (file := tmp_path / "ttt.yaml").write_text(
        "adapt:    {preset: deep, layers: all, modules: [o_proj, down_proj], rank: 64, seed: 0}\n"
        "learn:    {tokens: prompt, chunk: 512, rate: 0.012, adapt_rate: 20, decay: 0.015, max_norm: 0.35, max_loss: 0.7,\n"
        "           history: skip, min_chunk: 8, interleave: false}\n"
        "schedule: {tokens_per_step: 512, max_slowdown: 1.25, backlog_tokens: 65536, consistency: read-your-writes}\n"
        "sessions: {resident: 64, host_gib: 8, state_dir: null, ttl: 30d, per_key: 1000}\n"
    )
    assert load_config(file) == parse_config({"sessions": {"per_key": 1000}})
    file.write_text("adapt: {preset: last}\nlearn: {rate: 0.008}")
    assert load_config(file) == parse_config(None, "last")
    file.write_text("adapt: {preset: last}\nlearn: {rate: 0.012}")
    with pytest.raises(ConfigError, match=r"learn\.rate cannot be changed: .* with the preset last on learn\.rate 0\.008 \("):
        load_config(file)
    file.write_text("adapt: {modules: [o_proj]}")
    with pytest.raises(ConfigError, match=r"with the preset deep on adapt\.modules \[o_proj, down_proj\] \("):
        load_config(file)
