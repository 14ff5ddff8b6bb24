"""What `schedule.kv_epoch` trades: the loss of a text after a prefix whose keys and values were cached some commits ago.

python loadtests/stale_prefix.py demo/model demo/texts
python loadtests/stale_prefix.py demo/real/smollm2 demo/texts --domains kjv,man2,py_sympy

Of each domain a session learns one document, another one's first 512 tokens are cached, and the session learns on. After 1,
2, 4, 8 and 16 further chunks the next 512 tokens are scored with the cached prefix and with a prefix computed anew. The oracle
does it, without vLLM. Printed: how far the delta has moved at most, as `schedule.kv_epoch` counts it; the mean difference of
the loss, the largest of any domain, and how far single tokens move.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import torch

from vllm_ttt.config import parse_config
from vllm_ttt.eval.oracle import KV, Oracle, load_model, stack_nll
from vllm_ttt.eval.texts import read_texts

PREFIX, TEXT, CHUNKS = 512, 512, (1, 2, 4, 8, 16)


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
    parser.add_argument("--domains", help="comma-separated; default: all")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer, model, config = AutoTokenizer.from_pretrained(args.model), load_model(args.model), parse_config(None, "deep")
    found: dict[int, list[torch.Tensor]] = {n: [] for n in CHUNKS}
    moved: dict[int, list[float]] = {n: [] for n in CHUNKS}
    domains = read_texts(args.texts)
    for texts in [domains[name] for name in (args.domains or ",".join(domains)).split(",")]:
        documents = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
        first, reader, *rest = [ids[:1025] for ids in documents if len(ids) > 1025]
        stream = [ids[i : i + 513] for ids in rest for i in (0, 512)]
        oracle, path = Oracle(model, config), 0.0
        oracle.learn(first)
        cached = prefix(oracle, reader)
        for n in range(1, max(CHUNKS) + 1):
            oracle.learn(stream[(n - 1) % len(stream)])
            norm = max(b.norm().item() / oracle.norms[i][k] for i, layer in enumerate(oracle.B) for k, b in layer.items())
            path += oracle.rate + config.learn.decay * norm
            if n in CHUNKS:
                moved[n].append(path)
                found[n].append(after(oracle, reader, cached) - after(oracle, reader, prefix(oracle, reader)))
    print("| chunks | moved, at most | loss: mean | worst domain | a token, root mean square |")
    print("| --- | --- | --- | --- | --- |")
    for n, differences in found.items():
        means = [d.mean().item() for d in differences]
        size = torch.cat(differences).square().mean().sqrt()
        print(f"| {n} | {fmean(moved[n]):.3f} | {fmean(means):+.4f} | {max(means, key=abs):+.4f} | {size:.3f} |")


if __name__ == "__main__":
    main()
