"""What the session's own cache adds to losses that were measured before: docs/cache.md, in seconds and without a model.

    python loadtests/cache_losses.py losses.npz

`loadtests/cache_gain.py --losses` writes such a file: ``domains`` [D], ``token_ids`` [requests, D, T], and ``frozen`` and
``session`` [requests, D, T - 1], losses of token_ids[..., 1:] under the frozen model and under a session that learned, beside
those of the model's first choices. Gains over the frozen model, nats per token, mean of requests 2 and later, of their last
three quarters: of the baseline of `vllm-ttt eval`, which also knows what of the request came before each token, and of the
cache as it is served, which learns a request when it is over.
"""

from __future__ import annotations

import sys

import numpy as np

from vllm_ttt.eval.measures import Reading
from vllm_ttt.eval.ngrams import Mixture
from vllm_ttt.eval.session_cache import SessionCache

VOCABULARY = 49152


def main(path: str) -> None:
    data = np.load(path)
    table = []
    for number, domain in enumerate(data["domains"]):
        windows = data["token_ids"][:, number].tolist()
        frozen, session = (data[name][:, number].astype(float) for name in ("frozen", "session"))
        scored = frozen.shape[1] // 4
        row = [_gain(frozen, session, scored)]
        for name, losses in (("frozen", frozen), ("session", session)):
            tops = data[f"{name}, likeliest"][:, number].astype(float).tolist()
            mixture, cache = Mixture(vocabulary=VOCABULARY), SessionCache(orders=6)
            baseline = [mixture.read(ids, Reading(x)).losses for ids, x in zip(windows, losses.tolist(), strict=True)]
            served = []
            for ids, x, top in zip(windows, losses.tolist(), tops, strict=True):
                served.append(cache.read(ids, x, top))
                cache.learn(ids, x, top)
            row += [_gain(frozen, np.array(found), scored) for found in (baseline, served)]
        table.append(row)
        _show(domain, row)
    _show("mean", np.mean(table, 0).tolist())


def _gain(frozen: np.ndarray, found: np.ndarray, scored: int) -> float:
    return float((frozen - found)[1:, scored:].mean())


def _show(name: str, row: list[float]) -> None:
    heads = ("session", "frozen + baseline", "frozen + cache", "session + baseline", "session + cache")
    print(f"{name:16}", "  ".join(f"{head} {gain:+.4f}" for head, gain in zip(heads, row, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1])
