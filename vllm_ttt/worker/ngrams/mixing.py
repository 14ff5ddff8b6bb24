"""The model's logits with a session's cache mixed in: (1 - w) p_model + w p_cache, before anything else is made of them.

Only tokens that the cache knows move, up to a constant that no softmax sees: what is served costs one pass over the logits, to
add them up, and every token that the session has not sent keeps the very logit of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    sums = logits_NV[[row for row, _ in known]].logsumexp(-1).tolist()
    for (row, found), total in zip(known, sums, strict=True):
        share = shares[found.length - 1]
        model = 1 - share * (1 - found.rest)  # what is left to the model; the rest of 1 is spread over `found.tokens`
        tokens = torch.from_numpy(found.tokens)
        p = (logits_NV[row, tokens].double() - total).exp() * model + share * torch.from_numpy(found.shares)
        logits_NV[row, tokens] = (p.log() - torch.tensor(model, dtype=torch.float64).log() + total).float()
