"""The model's logits with a session's cache mixed in: (1 - w) p_model + w p_cache, before anything else is made of them.

Only tokens that the cache knows move, up to a constant that no softmax sees: what is served costs one pass over the logits, to
add them up, and every token that the session has not sent keeps the very logit of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.stream import Tokens


def mix(logits_NV: Tensor, rows: Sequence[int], befores: Sequence[Tokens], index: Index, shares: Sequence[float]) -> None:
    """Mix the cache of one session into some rows, in place.

    Args:
        logits_NV: float32, on the host. rows: those of the session.
        befores: the tokens before each, of which the last ones count.
        shares: of the cache, by length of the context from 1.
    """
    known = [(row, found) for row, before in zip(rows, befores, strict=True) if (found := index.followers(before)).length]
    if not known:
        return
    picked = [row for row, _ in known]
    sums = logits_NV[picked if len(picked) > 1 else picked[0]].logsumexp(-1).view(-1).tolist()
    values_NV = logits_NV.numpy()
    for (row, found), total in zip(known, sums, strict=True):
        share = shares[found.length - 1]
        model = 1 - share * (1 - found.rest)  # what is left to the model; the rest of 1 is spread over `found.tokens`
        p = np.exp(values_NV[row, found.tokens].astype(np.float64) - total) * model + share * found.shares
        values_NV[row, found.tokens] = np.log(p) + (total - math.log(model))
