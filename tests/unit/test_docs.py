"""What the documents say is what the code does: the reference, the register of patches, the metrics, the links."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
import yaml

from vllm_ttt.config import TTTConfig, constants, load_config
from vllm_ttt.metrics import METRICS, PREFIX, REASONS
from vllm_ttt.types import ChunkReason, Knobs, check_session_id

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
REGISTER = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")


def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def documents() -> list[Path]:
    """The Markdown files, wherever the sources came from."""
    found = [*ROOT.glob("*.md"), *(p for d in ("docs", "patches", "demo", "configs") for p in (ROOT / d).rglob("*.md"))]
    assert len(found) >= 6
    return sorted(found)


# Configuration


def reference() -> Any:
    """The module that writes docs/reference.md."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    text = reference().render()
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == text, "run `make docs`"
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert set(REASONS) <= named, "each reason has its row"
    for key in ("ttt_learn", "ttt_learn_output", "ttt_interleave", "ttt_cache"):
        assert key in named
        Knobs.parse({key: 1})


def test_readmes_table_of_models_is_what_the_check_knows() -> None:
    assert reference().readme(README) == README, "run `make docs`"


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1200


def test_default_yaml_is_every_key_and_its_default() -> None:
    file = ROOT / "configs" / "default.yaml"
    settings = TTTConfig().model_dump(mode="json")
    for section, name in (key.split(".") for key in constants()):
        del settings[section][name]
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == {section: keys for section, keys in settings.items() if keys}
    assert load_config(file) == TTTConfig()
    settings = [line for line in file.read_text(encoding="utf-8").splitlines() if re.match(r"  \w+:", line)]
    assert all(" # " in line for line in settings), "each setting has its comment"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.name)
def test_configs_load(file: Path) -> None:
    load_config(file)
    assert file.name in {"default.yaml"} or load_config(file) != TTTConfig(), "a file that changes nothing is not needed"


# The register of patches


def wrapped(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Full names of all functions that the modules of vllm_ttt/patches would wrap or add."""
    from vllm_ttt import patches
    from vllm_ttt.patches import _contract

    names: set[str] = set()

    def record(owner: Any, name: str, *_: Any) -> None:
        home = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
        names.add(f"{home}.{name}")

    monkeypatch.setattr(_contract, "wrap", record)
    monkeypatch.setattr(_contract, "add", record)
    for info in pkgutil.iter_modules(patches.__path__, f"{patches.__name__}."):
        install = getattr(importlib.import_module(info.name), "install", None)
        if install is not None:
            install(*[() for _ in inspect.signature(install).parameters])
    return names


def test_every_patch_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    names = wrapped(monkeypatch)
    assert len(names) >= 10
    rows = set(re.findall(r"^\| `(vllm\.[\w.]+)` \|", REGISTER.partition("## Classes")[0], re.MULTILINE))
    assert rows == names, f"missing: {sorted(names - rows)}; no longer patched: {sorted(rows - names)}"


def subclasses() -> set[str]:
    """Classes of the engine's and the worker's side that extend one of vLLM's."""
    found = set()
    for file in [*(ROOT / "vllm_ttt" / "engine").rglob("*.py"), *(ROOT / "vllm_ttt" / "worker").rglob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "vllm"]
        vllm = {alias.asname or alias.name for n in imports for alias in n.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in vllm for b in node.bases):
                found.add(node.name)
    return found


def test_every_subclass_has_its_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", REGISTER.partition("## Classes")[2], re.MULTILINE))
    assert rows == subclasses()


def test_every_custom_op_is_registered() -> None:
    for file in (ROOT / "vllm_ttt").rglob("*.py"):
        for name in re.findall(r'op_name="(\w+)"', file.read_text(encoding="utf-8")):
            assert f"`vllm::{name}`" in REGISTER


# Metrics


def metrics_table() -> str:
    rows = ["| metric | kind | label | meaning |", "| --- | --- | --- | --- |"]
    for metric in METRICS:
        label = f"`{metric.label}`: {', '.join(f'`{v}`' for v in metric.values)}" if metric.label else ""
        rows.append(f"| `{PREFIX}{metric.name}` | {metric.kind} | {label} | {metric.help} |")
    return "\n".join(rows)


def test_every_metric_is_in_the_table() -> None:
    expected = metrics_table()
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    assert expected in text, f"docs/observability.md: replace the table of metrics by\n\n{expected}\n"


def test_reasons_are_the_same_everywhere() -> None:
    """Why something is not learned: the worker's type, the metrics' labels, the reference, the routes."""
    from vllm_ttt.frontend.models import ChunkLoss

    text = (ROOT / "docs" / "reference.template").read_text(encoding="utf-8")
    rows = text.partition("| in `tokens_skipped` | what happened |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == set(REASONS)
    page = (ROOT / "vllm_ttt" / "frontend" / "static" / "ttt.js").read_text(encoding="utf-8")
    assert set(re.findall(r"(\w+): \"", page.partition("const WHY = {")[2].partition("}")[0])) == set(REASONS)
    said = ChunkLoss.model_fields["skipped"].description or ""
    assert set(re.findall(r"`(\w+)`", said)) == set(get_args(ChunkReason))


# What the documents promise


@pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "docs" / "usage.md"], ids=lambda p: p.name)
def test_bodies_of_the_examples_are_accepted(file: Path) -> None:
    bodies = re.findall(r"-d '(.+?)'", file.read_text(encoding="utf-8"), re.DOTALL)
    assert len(bodies) >= 1
    for text in bodies:
        body = json.loads(text)
        Knobs.parse(body.get("vllm_xargs"))
        if "session_id" in body:
            check_session_id(body["session_id"])


def test_figures_of_the_demo_are_those_of_its_run() -> None:
    """Each cell of README's table, and what is bold in it: the best of the row."""
    run = json.loads((ROOT / "loadtests" / "results" / "2026-11-29-demo.json").read_text(encoding="utf-8"))
    sessions, accepted, later = run["sessions"]["p2"], run["characters"]["p2"], run["about"]["later"]
    losses = {arm: [fmean(row) for row in sessions[arm]] for arm in ("frozen", "retrieval", "context", "ttt")}
    rows = {f"{i + 1}{'nd' if i == 1 else 'th'}": [(losses[arm][i], accepted[arm][i]) for arm in losses] for i in (1, 3, 5)}
    rows["2nd to 6th"] = [(later[arm]["nats"], later[arm]["characters_pooled"]) for arm in losses]
    table = README.partition("| | frozen model | BM25 retrieval | last documents in the context | session |\n")[2]
    shown = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table.splitlines()[1:5]}
    assert [head.removesuffix(" document of the session") for head in shown] == list(rows)
    for cells, figures in zip(shown.values(), rows.values(), strict=True):
        best = f"{min(loss for loss, _ in figures):.3f}", f"{max(characters for _, characters in figures):.2f}"
        texts = [(f"{loss:.3f}", f"{characters:.2f}") for loss, characters in figures]
        bold = [tuple(f"**{x}**" if x == b else x for x, b in zip(text, best, strict=True)) for text in texts]
        assert cells == [" / ".join(text) for text in bold]


def test_figures_of_the_gains_are_those_of_their_run() -> None:
    """README's second table, and the same columns of docs/algorithm.md."""
    results = ROOT / "loadtests" / "results"
    p2, long = (
        json.loads((results / f"2026-11-28-smollm2-h100-{name}.json").read_text(encoding="utf-8"))["measures"][name]
        for name in ("p2", "long")
    )
    algorithm = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    arms = {
        "BM25 retrieval": "retrieval", "the last 7 documents in the context": "context",
        "the session's own n-grams, mixed in": "ngrams", "the session's delta alone": "ttt",
        "**session**, delta and n-grams": "ttt_ngrams",
    }  # fmt: skip
    for label, arm in arms.items():
        first, all_, last = (
            f"{of['mean']:+.3f}" for of in (p2[arm]["gain"], long[arm]["gain, requests 2 to 40"], long[arm]["gain, 31 to 40"])
        )
        harmed = f"{100 * p2[arm]['harmed']['mean']:.0f} %"
        assert f"| {label} | {first} | {harmed} | {last} |" in README
        assert f"| {label} | {first} | {harmed} | {all_} | {last} |" in algorithm
    served = json.loads((results / "2026-11-29-smollm2-h200.json").read_text(encoding="utf-8"))["runs"]["deep and cache"]
    gain = fmean(x for gains in served.values() for x in gains[1:])
    assert f"[{gain:+.3f}](loadtests/results/2026-11-29-smollm2-h200.md)" in README


def test_make_targets_and_commands_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = set(re.findall(r"^def (\w+)\(|command\(\"(\w+)\"", (ROOT / "vllm_ttt/cli.py").read_text(), re.MULTILINE))
    commands = {a or b for a, b in commands} | {"sessions", "audit"}
    from vllm_ttt.cli import app

    assert {group.name for group in app.registered_groups} == {"sessions", "audit"}
    for file in documents():
        text = file.read_text(encoding="utf-8")
        code = "\n".join([*re.findall(r"^```sh\n(.+?)^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)])
        for target in re.findall(r"^make (\w+)", code, re.MULTILINE):
            assert target in targets, f"{file.name}: make {target}"
        for command in re.findall(r"^(?:\.venv/bin/)?vllm-ttt (\w+)", code, re.MULTILINE):
            assert command in commands, f"{file.name}: vllm-ttt {command}"


def test_the_map_has_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for file in (ROOT / "vllm_ttt").rglob("*.py"):
        if file.name != "__init__.py" and file.parent.name not in ("eval", "patches"):
            assert re.search(rf"\b{file.name}\b", text), f"{file.relative_to(ROOT)} is not on the map"


def imported(file: Path) -> set[Path]:
    """Modules of the engine core that a module of it imports when it runs: not for type hints alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hints = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in hints for inner in ast.walk(node)}
    names = {
        f"{node.module}.{alias.name}".replace(".", "/") if (ROOT / node.module.replace(".", "/")).is_dir() else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped
        for alias in node.names
    }
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.replace(".", "/").startswith("vllm_ttt/engine/")}
    return {found for found in files if found.is_file()}


def test_no_module_of_the_engine_imports_one_above_its_layer() -> None:
    engine = ROOT / "vllm_ttt" / "engine"
    text = (
        (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("| layer | modules |")[2].partition("\n\n")[0]
    )
    layers = [re.findall(r"`([\w/.]+)`", row) for row in text.splitlines()[2:]]
    place = {name: number for number, names in enumerate(layers) for name in names}

    def layer(file: Path) -> int:
        name = str(file.relative_to(engine))
        return place[name] if name in place else place[f"{name.partition('/')[0]}/"]

    files = [file for file in engine.rglob("*.py") if file.name != "__init__.py"]
    assert all((engine / name).exists() for name in place)
    imports = {file: imported(file) for file in files}
    assert sum(map(len, imports.values())) > 50
    wrong = [(str(a), str(b)) for a, names in imports.items() for b in names if layer(b) > layer(a)]
    assert wrong == []
    while leaves := [file for file, names in imports.items() if not names & imports.keys()]:
        for file in leaves:
            del imports[file]
    assert not imports, "these import one another"


def test_tests_that_are_named_exist() -> None:
    for file in documents():
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", file.read_text(encoding="utf-8")):
            assert (ROOT / path).is_file(), f"{file.name}: {path}"
            assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), f"{file.name}: {path}::{name}"


@pytest.mark.parametrize("file", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(h) for h in headings}, f"{target}: no such heading"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_no_place_of_one_machine_is_named() -> None:
    """No absolute path of somebody's machine, no host of a package registry."""
    machine = re.compile(r"(?<![\w.}])/(?:work|home|root|Users|mnt)/\w")
    registry = re.compile(r"pypi\.(?:org|python)|pythonhosted|download\.pytorch|registry\.npmjs|(?:docker|ghcr|quay|nvcr)\.io")
    texts = ROOT / "demo" / "texts"  # documents that others wrote
    for file in tracked():
        if file == Path(__file__).resolve() or texts in file.parents:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (machine, registry):
            assert not (found := pattern.search(text)), f"{file.relative_to(ROOT)}: {found.group()}"
