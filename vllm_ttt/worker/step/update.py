"""The optimiser of the micro-step: a rate that sets itself, Newton-Schulz through the Gram matrix, decay and trust region.

The algorithm is docs/algorithm.md; `vllm_ttt.eval.oracle` is the plain loop that this file is held to. Suffixes as in delta.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.delta import MODULES, THIN, WIDE, Delta, State
from vllm_ttt.worker.ranks import ALONE, Ranks

#: Between which a rate stays, and by how much one chunk moves its logarithm at most (docs/algorithm.md).
RATES = 1e-5, 0.1
LARGEST_MOVE = 0.5


class Norms:
    """Frobenius norms of the adapted weights, on the device: ``thin_M`` and ``wide_N``, ordered as in `Delta`."""

    def __init__(self, modules: str, layers: list[dict[str, float]], device: torch.device):
        """``layers``: of each layer, lowest first, the norms by MODULES."""
        kind = lambda letters: [norm[m] for norm in layers for m in MODULES if m in modules and m in letters]  # noqa: E731
        self.thin_M, self.wide_N = (torch.tensor(kind(letters), device=device) for letters in (THIN, WIDE))


def update(
    norms: Norms,
    state: State,
    grad: Delta,
    loss_S: Tensor,
    share_S: Tensor,
    learn: LearnConfig,
    max_loss: float,
    ranks: Ranks = ALONE,
) -> tuple[State, Tensor, Tensor]:
    """One step of the optimiser for each session, as new tensors; nothing is changed in place.

    Args:
        grad: the gradient of the chunk's mean loss, float32.
        loss_S: that loss in nats. share_S: the chunk's rows / rows of a full chunk.
        max_loss: nats; a session whose loss is larger, or whose gradient is not finite, keeps all as it is.
        ranks: each has the thin matrices whole, and its rows of the wide ones. The first rank's thin matrices, rates and
            decisions are everybody's, bit for bit.
    Returns:
        the new state; [S] bool, whether the session was updated; [modules, S], norms of B relative to W by adapted module, of
        the layer in which they are largest.
    """
    finite_S = torch.isfinite(loss_S)
    for g in grad.tensors():
        finite_S = finite_S & torch.isfinite(g.sum((1, 2, 3)))
    if ranks.size > 1:
        loss_S = ranks.same(loss_S)
        finite_S = ranks.gather(finite_S.float()).amin(0) > 0
    ok_S = finite_S & (loss_S <= max_loss)
    grad = grad.by(*(torch.where(finite_S[:, None, None, None], g, 0.0) for g in grad.tensors()))
    rate_S = ranks.same(_adapted(state.rate_S, grad, state.last, learn.adapt_rate, ranks))
    chosen = lambda new, old: torch.where(ok_S.view(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
    new, last, sizes = [], [], []
    for b, g, old, norm, rows in zip(
        state.delta.tensors(), grad.tensors(), state.last.tensors(), (norms.thin_M, norms.wide_N), (ALONE, ranks), strict=True
    ):
        u = orthogonalise(g.flatten(0, 1), rows).view_as(g)
        length = (rate_S * share_S)[:, None] * norm / (_length(u, rows) + 1e-12)
        stepped = b * (1 - learn.decay * share_S)[:, None, None, None] - u * length[..., None, None]
        limit = learn.max_norm * norm
        excess = (_length(stepped, rows) / limit).clamp(min=1.0)
        own = chosen(stepped / excess[..., None, None], b), chosen(u.to(old.dtype), old)
        own = own if rows is ranks else tuple(map(ranks.same, own))
        for found, x in zip((new, last), own, strict=True):
            found.append(x)
        sizes.append(_length(new[-1], rows) / norm)
    return state.by(*new, *last, chosen(rate_S, state.rate_S)), ok_S, _largest(grad.modules, *sizes)


def orthogonalise(g_BOR: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Newton-Schulz: five iterations that bring the singular values of each matrix near 1.

    They are polynomials of the Gram matrix G^T G, which is small: two large products instead of ten. It takes float64: the
    iterations multiply the smallest eigenvalues, and their errors, by up to 3.4445^10.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers (2024), with its coefficients.

    Args:
        ranks: each has some rows O of each matrix.
    """
    gram = ranks.sum(torch.bmm(g_BOR.transpose(1, 2), g_BOR)).double()
    trace_B11 = gram.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=1e-60)[:, None, None]
    s, eye = gram / trace_B11, torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    p = eye
    for _ in range(5):
        t = 3.4445 * eye - 4.7750 * s + 2.0315 * (s @ s)
        p, s = t @ p, t @ s @ t
    return torch.bmm(g_BOR, (p * trace_B11.rsqrt()).to(g_BOR.dtype))


def _length(x_SMOR: Tensor, ranks: Ranks) -> Tensor:
    """[S, M]: the Frobenius norms of matrices of which each rank has some rows."""
    length = torch.linalg.vector_norm(x_SMOR, dim=(2, 3))
    return length if ranks.size == 1 else ranks.total(length.square()).sqrt()


def _adapted(rate_S: Tensor, grad: Delta, last: Delta, adapt_rate: float, ranks: Ranks = ALONE) -> Tensor:
    """The rate after a look at the gradient: larger where the last update was in the right direction, which is where its cosine
    with the gradient now is positive (B moved along the negative update). Without a last update it stays."""
    cosines = []
    for g, u, rows in zip(grad.tensors(), last.tensors(), (ALONE, ranks), strict=True):
        u = u.float()
        lengths = _length(g, rows) * _length(u, rows)
        cosines.append(rows.total((g * u).sum((2, 3))) / lengths.clamp(min=1e-30))
    c_S = torch.cat(cosines, 1).mean(1)
    return (rate_S * (adapt_rate * c_S).clamp(-LARGEST_MOVE, LARGEST_MOVE).exp()).clamp(*RATES)


def _largest(modules: str, thin_SM: Tensor, wide_SN: Tensor) -> Tensor:
    """[modules, S]: over the layers."""

    def by_module() -> Iterator[tuple[str, Tensor]]:
        for kind, sizes in ((THIN, thin_SM), (WIDE, wide_SN)):
            found = [m for m in modules if m in kind]
            yield from zip(found, sizes.unflatten(1, (-1, len(found))).amax(1).unbind(1), strict=True) if found else ()

    values = dict(by_module())
    return torch.stack([values[m] for m in modules])
