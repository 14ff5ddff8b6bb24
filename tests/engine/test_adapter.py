"""An exported session is a PEFT adapter: peft and stock vLLM serve with it what the session is served with, its cache aside."""

from __future__ import annotations

import io
import json
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import MODEL, Stage, running
from served import SCORED, Documents, Served, logprobs

from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.storage.database import connect, create
from vllm_ttt.engine.storage.identity import config_hash, identity, weights_hash
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.state_dir import StateDir
from vllm_ttt.worker.deltas import delta_file

pytestmark = pytest.mark.engine

#: Nats per token, float32 on either side: what rounding may differ by.
TOLERANCE = 0.001
#: Uses the session's delta alone, as an adapter has it.
READ: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0, "ttt_cache": 0}, **SCORED}


@pytest.fixture(scope="session")
def exported(stage: Stage, documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A session at full depth, float32: its adapter's folder, the single file, and what it is served with."""
    served = stage.get("cached")
    name = served.fresh("adapter")
    for text in documents["man2"][:3]:
        served.complete(text[:1025], name)
    served.settle()
    probe = documents["man2"][3][:200]
    answer = served.complete(probe, name, **READ)
    base = served.complete(probe, **SCORED)
    folder = tmp_path_factory.mktemp("adapter")
    tar = served.http.get(f"/v1/ttt/sessions/{name}/adapter", params={"format": "tar"})
    assert tar.status_code == 200, tar.text
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        archive.extractall(folder, filter="data")
    file = served.http.get(f"/v1/ttt/sessions/{name}/adapter")
    assert int(file.headers["content-length"]) == len(file.content)
    (folder / "one.safetensors").write_bytes(file.content)
    again = served.complete(probe, name, **READ)
    mixed = served.complete(probe, name, vllm_xargs={"ttt_learn": 0}, **SCORED)
    return {
        "folder": folder, "probe": probe, "served": logprobs(answer), "base": logprobs(base), "again": logprobs(again),
        "mixed": logprobs(mixed),
        "tokens": answer["choices"][0]["logprobs"]["tokens"], "delta": served.delta(name),
        "version": served.session(name)["version"],
    }  # fmt: skip


def test_the_tar_and_the_file_are_the_same_adapter(cached: Served, exported: dict[str, Any]) -> None:
    folder: Path = exported["folder"]
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
        "one.safetensors",
    }
    one, two = (safetensors.torch.load((folder / f"{n}.safetensors").read_bytes()) for n in ("one", "adapter_model"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with safetensors.safe_open(folder / "one.safetensors", "pt") as file:
        metadata = json.dumps(file.metadata())
        assert json.loads(file.metadata()["adapter_config"]) == json.loads((folder / "adapter_config.json").read_text())
        told = [json.loads(file.metadata()["provenance"]), json.loads((folder / "provenance.json").read_text())]
    assert exported["again"] == exported["served"], "to export it changes nothing"
    for text in ((folder / "adapter_config.json").read_text(), metadata):
        assert str(MODEL.parent) not in text, "the server's folders are nobody's business"
    assert all(t.pop("exported").endswith("Z") for t in told)
    session = cached.session(told[0]["session_id"])
    for t in told:
        assert (t["version"], t["tokens_learned"]) == (exported["version"], session["tokens_learned"])
        assert t["digest_sha256"] == delta_file.digest(exported["delta"])
        assert t["rate"] == pytest.approx(session["rate"], abs=1e-7)
        assert t["base_model"]["weights_sample_sha256"] == weights_hash(MODEL)
        assert t["base_model"]["config_sha256"] == config_hash(MODEL)
        assert (t["base_model"]["name"], t["base_model"]["dtype"]) == ("demo", "float32")
        assert (t["vllm_ttt"], t["adapt"]["rank"]) == (version("vllm-ttt"), 64)
    assert [t["requests"] for t in told] == [4, 4], "three that were learned, and the probe"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "demo", "what clients call the model"


def test_peft_loads_it(cached: Served, exported: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, exported["folder"])
    ids = torch.tensor([exported["probe"]])
    with torch.no_grad():
        scores = adapted(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    served, base = (torch.tensor(exported[key][: len(scores)]) for key in ("served", "base"))
    assert (served - base).abs().max() > 0.3, "the delta changes nothing: the comparison would prove nothing"
    assert (scores - served).abs().max() < TOLERANCE
    mixed = torch.tensor(exported["mixed"][: len(scores)])
    assert mixed.mean() > scores.mean() + 0.01, "the session answers with its cache, too, which no adapter has"


def test_stock_vllm_loads_it(exported: dict[str, Any], stage: Stage) -> None:
    stage.stop()
    flags = ["--dtype", "float32", "--enable-lora", "--max-lora-rank", "64", "--lora-modules", f"mine={exported['folder']}"]
    with running(stage.folder / "lora.log", "vllm.entrypoints.cli.main", flags, {"VLLM_PLUGINS": ""}) as stock:
        answer = stock.complete(exported["probe"], model="mine", logprobs=1, max_tokens=8, ignore_eos=True)
    choice = answer["choices"][0]
    assert choice["logprobs"]["tokens"] == exported["tokens"]
    served = torch.tensor(exported["served"][-8:])
    assert (torch.tensor(choice["logprobs"]["token_logprobs"]) - served).abs().max() < TOLERANCE


def test_import_brings_it_back(exported: dict[str, Any], tmp_path: Path) -> None:
    """B in a state dir is the delta that was served, and the version is the one that it was exported at."""
    from vllm.engine.arg_utils import EngineArgs

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "served_model_name": ["acme/model-1", "other"]}
    vllm_config = EngineArgs(model=str(MODEL), max_model_len=256, **options).create_engine_config()
    folder = StateDir(tmp_path / "state")
    folder.create()
    create(connect(folder.database), identity(vllm_config, TTTConfig()))
    offline = Offline(folder.root)
    for name, source in (("one", exported["folder"] / "one.safetensors"), ("two", exported["folder"])):
        offline.bring_in(name, source)
        assert offline.show(name)["version"] == exported["version"]
        offline.export(name, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "acme/model-1"
        data = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        found = safetensors.torch.load(data)
        original = safetensors.torch.load((exported["folder"] / "one.safetensors").read_bytes())
        assert found.keys() == original.keys()
        for key, value in original.items():  # A is drawn anew: another number of threads may round it otherwise
            assert torch.equal(found[key], value) if "lora_B" in key else (found[key] - value).abs().max() < 1e-6
    parts = {tuple(key.split(".")[-5:-2]): value.flatten() for key, value in found.items() if "lora_B" in key}
    modules = {"o": ("self_attn", "o_proj"), "d": ("mlp", "down_proj")}
    assert len(parts) == len(exported["delta"]) == 16
    for i in range(8):
        for short, path in modules.items():
            assert torch.equal(parts[str(i), *path], exported["delta"][f"{i or ''}{short}"])
    assert offline.fsck()["problems"] == []
