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
    values_NV = logits_NV.numpy()
    for row, before in zip(rows, befores, strict=True):
        if not (found := index.followers(before)).length:
            continue
        values_V = values_NV[row]
        high = values_V.max().item()
        # In numpy, whose sums are the same beside any other rows and with any number of threads: so do ranks sample alike.
        total = high + math.log(np.exp(values_V - high).sum(dtype=np.float64))
        share = shares[found.length - 1][bisect_left(_STEPS, total - high)]
        model = 1 - share * (1 - found.rest)  # what is left to the model; the rest of 1 is spread over `found.tokens`
        p = np.exp(values_V[found.tokens].astype(np.float64) - total) * model + share * found.shares
        values_V[found.tokens] = np.log(p) + (total - math.log(model))
