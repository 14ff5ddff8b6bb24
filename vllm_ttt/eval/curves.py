"""Curves of the oracle, without any server: what a correct engine must reproduce.

python -m vllm_ttt.eval.curves demo/model demo/texts --sessions-per-domain 1 --interactions 6 --json FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.eval import report, runner, texts
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.oracle import Oracle, load_model


class OracleScorer:
    """Scores and learns as a server would, one request at a time, each session an oracle of its own."""

    def __init__(self, folder: str | Path, config: TTTConfig | None = None, dtype: torch.dtype | None = None):
        self.folder, self.model, self.config = folder, load_model(folder, dtype), config or TTTConfig()
        self.max_model_len: int = self.model.config.max_position_embeddings  # pyright: ignore
        self.frozen, self.sessions = self._session(), dict[str, Oracle | HeadOracle]()

    async def tokenize(self, text: str) -> list[int]:
        return self._tokenizer(text, verbose=False)["input_ids"]

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    async def score(self, ids: list[int], session: str | None = None) -> list[float]:
        """NLL of every token but the first, under the delta that the request meets; then it is learned."""
        if session is None:
            return self.frozen.score(ids).tolist()
        if (oracle := self.sessions.get(session)) is None:
            oracle = self.sessions[session] = self._session()
        losses = oracle.score(ids).tolist()
        oracle.learn(ids)
        return losses

    def _session(self) -> Oracle | HeadOracle:
        return (HeadOracle if self.config.adapt.preset == "head" else Oracle)(self.model, self.config)

    async def forget(self, session: str) -> None:
        self.sessions.pop(session, None)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--domains", help="comma-separated; default: all")
    parser.add_argument("--sessions-per-domain", type=int, default=2)
    parser.add_argument("--interactions", type=int, default=10)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--protocols", default="p2,p3")
    parser.add_argument("--retrieval", action="store_true")
    parser.add_argument("--preset", default="deep", help="`deep` (default), `last` or `head`")
    parser.add_argument("--layers", type=int, help="adapted layers; default: what the preset says")
    parser.add_argument("--float32", action="store_true", help="load the model in float32 instead of its own dtype")
    parser.add_argument("--json")
    parser.add_argument("--reference", help="recorded curves to compare with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapt = {} if args.layers is None else {"layers": args.layers}
    config = parse_config({"adapt": adapt}, args.preset)
    scorer = OracleScorer(args.model, config, torch.float32 if args.float32 else None)
    found = texts.read_texts(args.texts)
    if args.domains:
        found = {domain: found[domain] for domain in args.domains.split(",")}
    counts = {name: {"p2": args.interactions, "p3": args.passes}[name] for name in args.protocols.split(",")}
    arms = ("frozen", "retrieval", "ttt") if args.retrieval else ("frozen", "ttt")
    docs, console = await texts.encode(found, scorer.tokenize), Console()
    results = await runner.run(scorer, docs, counts, args.sessions_per_domain, console, arms)
    console.print(report.table(results))
    if args.reference:
        console.print(report.compare(report.curves(results, args.preset), json.loads(Path(args.reference).read_text())))
    if args.json:
        command = f"python -m vllm_ttt.eval.curves {' '.join(sys.argv[1:])}"
        runner.write_json(args.json, results, {"command": command}, args.preset)


if __name__ == "__main__":
    asyncio.run(main())
