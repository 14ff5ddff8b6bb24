"""`vllm-ttt eval` of a server with sessions' caches and of one without: gains, whole lines and accepted characters.

    python loadtests/cache_eval.py demo/real/smollm2 demo/real/texts --domains vllm_models vllm_v1

Starts both servers itself, one after the other. Protocol p2, one session of each domain. The greedy continuations that are
counted are those of what is served: with the cache, of the mixture.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cache_gain import parser_of
from runs import HERE, about, exactly, save, served

from vllm_ttt.eval.texts import read_texts


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--name", default="cache-eval")
    args = parser.parse_args()
    flags = [args.model, "--served-model-name", "model", "--max-model-len", "2048", *exactly(), "--ttt-preset", args.preset]
    told = about("cache_eval.py", {str(texts): texts.name for texts in args.texts if texts.is_absolute()})
    told["server"], parts = f"vllm serve {' '.join(flags)} --plugin ttt", []
    with tempfile.TemporaryDirectory() as folder:
        for texts in args.texts:
            for domain, documents in read_texts(texts).items():
                if args.domains and domain not in args.domains:
                    continue
                (Path(folder) / domain).mkdir()
                for number, document in enumerate(documents):
                    (Path(folder) / domain / f"{number:04}.txt").write_text(document, encoding="utf-8")
        for orders in (0, 6):
            config: dict[str, Any] = {"cache": {"orders": orders}}
            with served(flags, config) as url:
                what = ["--texts", folder, "--base-url", url, "--protocol", "p2", "--baselines", "none"]
                what += ["--sessions-per-domain", "1", "--interactions", str(args.requests)]
                command = [sys.executable, "-m", "vllm_ttt.cli", "eval", *what]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            parts.append(f"cache.orders {orders}:\n\n```\n{done.stdout.strip()}\n```")
            told[f"orders {orders}"] = done.stdout
            print(done.stdout, flush=True)
    save("Sessions with and without their caches", told, "\n\n".join(parts), HERE / "results", args.name)


if __name__ == "__main__":
    main()
