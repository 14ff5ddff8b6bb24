"""What `schedule.kv_epoch` trades: the loss of a text after a prefix whose keys and values were cached some commits ago.

python loadtests/stale_prefix.py demo/model demo/texts

Of each domain a session learns one document, another one's first 512 tokens are cached, and the session learns on. After 1, 2,
3, 8 and 16 further requests of 256 tokens, each half a chunk, the next 512 tokens are scored with the cached prefix and with a
prefix computed anew. The oracle does it, without vLLM. Printed: how far the deltas moved at most, as engine/prefix/keys.py
counts it, mean of the domains; the mean difference of the loss, the largest of any domain, and how far single tokens move.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch

from vllm_ttt.config import parse_config
from vllm_ttt.eval.oracle import KV, Oracle, load_model, stack_nll
from vllm_ttt.eval.texts import read_texts

PREFIX, TEXT, REQUESTS = 512, 512, (1, 2, 3, 8, 16)


@torch.no_grad()
def after(oracle: Oracle, ids: list[int], past: list[KV]) -> torch.Tensor:
    """NLL of the tokens after the prefix, whose keys and values are given."""
    h, a = oracle.activations(ids)
    rows, targets = slice(PREFIX, PREFIX + TEXT), torch.tensor(ids[PREFIX + 1 : PREFIX + TEXT + 1])
    return stack_nll(oracle.stack, oracle.A, oracle.B, h[rows], a[rows], targets, past)[0]


@torch.no_grad()
def prefix(oracle: Oracle, ids: list[int]) -> list[KV]:
    return [(k[:PREFIX], v[:PREFIX]) for k, v in oracle.served(ids)[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer, model, config = AutoTokenizer.from_pretrained(args.model), load_model(args.model), parse_config(None, "deep")
    learn = config.learn
    found: dict[int, list[torch.Tensor]] = {n: [] for n in REQUESTS}
    moved: dict[int, list[float]] = {n: [] for n in REQUESTS}
    for texts in read_texts(args.texts).values():
        documents = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
        first, reader, *rest = [ids[:1025] for ids in documents if len(ids) > 1025]
        stream = [ids[i : i + 257] for ids in rest for i in range(0, 1024, 256)]
        oracle = Oracle(model, config)
        oracle.learn(first)
        cached, way = prefix(oracle, reader), 0.0
        for n, request in enumerate(stream[: max(REQUESTS)], 1):
            version = oracle.version
            oracle.learn(request)
            if oracle.version != version:
                way += (oracle.rate + learn.decay * learn.max_norm) * (len(request) - 1) / learn.chunk
            if n in REQUESTS:
                found[n].append(after(oracle, reader, cached) - after(oracle, reader, prefix(oracle, reader)))
                moved[n].append(way)
    print("| requests | moved, at most | loss: mean | worst domain | a token, root mean square |")
    print("| --- | --- | --- | --- | --- |")
    for n, differences in found.items():
        means = [d.mean().item() for d in differences]
        size = torch.cat(differences).square().mean().sqrt()
        print(f"| {n} | {fmean(moved[n]):.3f} | {fmean(means):+.4f} | {max(means, key=abs):+.4f} | {size:.3f} |")


if __name__ == "__main__":
    main()
