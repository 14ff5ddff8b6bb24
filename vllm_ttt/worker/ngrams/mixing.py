"""The model's logits with a session's cache mixed in: (1 - w) p_model + w p_cache, before anything else is made of them.

Only tokens that the cache knows move, up to a constant that no softmax sees: what is served costs one pass over the logits, to
add them up, and every token that the session has not sent keeps the very logit of the model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vllm_ttt.worker.ngrams.index import Index
from vllm_ttt.worker.ngrams.ngrams import STEPS
from vllm_ttt.worker.ngrams.stream import Tokens

_STEPS: list[float] = STEPS.tolist()


def mix(
    logits_NV: Tensor, rows: Sequence[int], befores: Sequence[Tokens], index: Index, shares: Sequence[Sequence[float]]
) -> None:
    """Mix the cache of one session into some rows, in place.

    Args:
        logits_NV: float32, on the host. rows: those of the session.
        befores: the tokens before each, of which the last ones count.
        shares: of the cache, by length of the context from 1, and by how sure the model is.
    """
    known = [(row, found) for row, before in zip(rows, befores, strict=True) if (found := index.followers(before)).length]
    if not known:
        return
    picked = logits_NV[[row for row, _ in known]] if len(known) > 1 else logits_NV[known[0][0]][None]
    values_NV, sums, highest = logits_NV.numpy(), picked.logsumexp(-1).tolist(), picked.amax(-1).tolist()
    for (row, found), total, high in zip(known, sums, highest, strict=True):
        share = shares[found.length - 1][bisect_left(_STEPS, total - high)]
        model = 1 - share * (1 - found.rest)  # what is left to the model; the rest of 1 is spread over `found.tokens`
        p = np.exp(values_NV[row, found.tokens].astype(np.float64) - total) * model + share * found.shares
        values_NV[row, found.tokens] = np.log(p) + (total - math.log(model))
