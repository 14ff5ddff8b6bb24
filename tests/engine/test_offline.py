"""A script that uses `LLM` with a state dir, and ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import forked
import pytest

from vllm_ttt.sessions.offline import Offline

pytestmark = pytest.mark.engine

MODEL = Path(__file__).parents[2] / "demo" / "model"
PROGRAM = """
import inspect, statistics
from vllm import LLM, SamplingParams
import vllm_ttt

def main():
    config = {"sessions": {"state_dir": FOLDER}}
    flags = {"max_model_len": 2048, "kv_cache_memory_bytes": 2**28, "enforce_eager": True, "dtype": "float32"}
    llm = LLM(model=MODEL, **flags, **vllm_ttt.engine_args(config=config))
    text = inspect.getsource(statistics)
    texts = [text[2000 + 2500 * i :][:2500] for i in range(12)]
    params = [SamplingParams(max_tokens=1, extra_args={"session_id": f"s{i}"}) for i in range(len(texts))]
    answers = llm.generate(texts, params, use_tqdm=False)
    print("ACCEPTED", sum(a.kv_transfer_params["ttt"]["tokens_learned"] for a in answers), flush=True)
    END

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("how", ["the script ends", "the object goes", "in one process"])
def test_a_script_saves_all_that_it_sent(stage: Any, tmp_path: Path, how: str) -> None:
    """More than is learned within the five seconds that vLLM gives an engine core."""
    stage.stop()
    folder, script = tmp_path / "state", tmp_path / "script.py"
    end = "del llm; import gc; gc.collect()" if how == "the object goes" else ""
    script.write_text(PROGRAM.replace("FOLDER", repr(str(folder))).replace("MODEL", repr(str(MODEL))).replace("END", end))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    if how == "in one process":
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    code, output = forked.run([sys.executable, str(script)], tmp_path / "log", environment)
    assert code == 0, output[-3000:]
    (accepted,) = [int(line.split()[1]) for line in output.splitlines() if line.startswith("ACCEPTED")]
    sessions = Offline(folder).list(all_keys=True)
    assert len(sessions) == 12
    assert sum(s["tokens_learned"] for s in sessions) == accepted > 8000
    assert "tokens are still to be learned" in output
