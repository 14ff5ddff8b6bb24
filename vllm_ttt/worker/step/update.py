"""The optimiser of the micro-step: a rate that sets itself, Newton-Schulz through the Gram matrix, decay and trust region.

The algorithm is docs/algorithm.md; `vllm_ttt.eval.oracle` is the plain loop that this file is held to. What passes over whole
matrices is plain torch here, and on CUDA four kernels (update_cuda.py), which read and write the masters where they are.
Suffixes as in delta.py; SMOR may be SNFR; P rows of the masters, of which ``rows_S`` are those of the sessions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.delta import MODULES, THIN, WIDE, Delta, State
from vllm_ttt.worker.ranks import ALONE, Ranks

#: Between which a rate stays, and by how much one chunk moves its logarithm at most (docs/algorithm.md).
RATES = 1e-5, 0.1
LARGEST_MOVE = 0.5
#: Into how many parts the rows of a matrix are cut for its Gram matrix, where they can be: few matrices would keep few
#: processors busy.
GRAM_PARTS = 8
#: What is divided by in the place of the norm of a weight that is all zero, as in layers that a model was widened by: its steps
#: have a length of 0, and its delta stays zero.
LEAST = 1e-12


class Norms:
    """Frobenius norms of the adapted weights, on the device: ``thin_M`` and ``wide_N``, ordered as in `Delta`; and the same to
    divide by."""

    def __init__(self, modules: str, layers: list[dict[str, float]], device: torch.device):
        """``layers``: of each layer, lowest first, the norms by MODULES."""
        kind = lambda letters: [norm[m] for norm in layers for m in MODULES if m in modules and m in letters]  # noqa: E731
        self.thin_M, self.wide_N = (torch.tensor(kind(letters), device=device) for letters in (THIN, WIDE))
        self.divisors = self.thin_M.clamp(min=LEAST), self.wide_N.clamp(min=LEAST)


def update(
    norms: Norms,
    masters: State,
    rows_S: Tensor,
    grad: Delta,
    loss_S: Tensor,
    share_S: Tensor,
    learn: LearnConfig,
    max_loss: float,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the optimiser for some sessions, in place.

    Args:
        masters: of P sessions. rows_S: int64, which of them; what may occur twice is a row whose gradient is 0.
        grad: the gradient of the chunk's mean loss, float32.
        loss_S: that loss in nats. share_S: the chunk's rows / rows of a full chunk.
        max_loss: nats; a session whose loss is larger keeps all as it is, and so does one whose gradient, or whose delta after
            the step, is not finite.
        ranks: each has the thin matrices whole, and its rows of the wide ones. Thin matrices, rates and decisions have the
            same bits on all.
    Returns:
        [S] bool, whether the session was updated; [S], its rate from now on; [modules, S], norms of B relative to W by adapted
        module, of the layer in which they are largest.
    """
    sums = [_sums(g, last, rows_S) for g, last in zip(grad.tensors(), masters.last.tensors(), strict=True)]
    loss_S = ranks.same(loss_S)
    # A gradient that is not finite stays what it is: all below is by session, and of that session nothing below is kept.
    before_S = masters.rate_S.index_select(0, rows_S)
    rate_S = ranks.same(_adapted(before_S, [squares for _, squares in sums], learn.adapt_rate, ranks))
    kept_S, told, steps = 1 - learn.decay * share_S, [loss_S, *(whole_S for whole_S, _ in sums)], []
    matrices = zip(masters.delta.tensors(), grad.tensors(), (norms.thin_M, norms.wide_N), (False, True), strict=True)
    for b, g, norm, wide in matrices:
        u = orthogonalise(g.flatten(0, 1), ranks).view_as(g) if wide else _shared(g, ranks)
        far = (rate_S * share_S)[:, None] * norm
        sizes_3SM = torch.stack(_lengths(b, rows_S, u, kept_S, far, ranks if wide else ALONE))
        length, stepped, before = sizes_3SM if wide else ranks.same(sizes_3SM)
        told.append(stepped.sum(1))
        steps.append((u, length, stepped, before))
    finite_S = torch.isfinite(torch.stack(told)).all(0)
    if ranks.size > 1:
        finite_S = ranks.gather(finite_S.float()).amin(0) > 0
    ok_S, sizes, writes = finite_S & (loss_S <= max_loss), [], []
    matrices = zip(masters.delta.tensors(), masters.last.tensors(), norms.divisors, steps, strict=True)
    for b, last, norm, (u, length, stepped, before) in matrices:
        excess = (stepped / (learn.max_norm * norm)).clamp(min=1.0)
        sizes.append(torch.where(ok_S[:, None], stepped / excess, before) / norm)
        writes.append((ok_S, b, rows_S, u, last, kept_S[:, None] / excess, length / excess))
    for write in writes:  # last, so that whatever fails before leaves all as it was
        _write(*write)
    rate_S = torch.where(ok_S, rate_S, before_S)
    masters.rate_S.index_copy_(0, rows_S, rate_S)
    return ok_S, rate_S, _largest(grad.modules, *sizes)


def picked(masters: Delta, rows_S: Tensor, dtype: torch.dtype) -> Delta:
    """A copy of some sessions' in ``dtype``, in the given order."""
    pick = _cuda().picked if rows_S.is_cuda else lambda x, rows, dtype: x.index_select(0, rows).to(dtype)
    return masters.by(*(pick(x, rows_S, dtype) for x in masters.tensors()))


def orthogonalise(g_BOR: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Newton-Schulz: five iterations that bring the singular values of each matrix near 1.

    They are polynomials of the Gram matrix G^T G, which is small: two large products instead of ten. It takes float64: the
    iterations multiply the smallest eigenvalues, and their errors, by up to 3.4445^10.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers (2024), with its coefficients.

    Args:
        ranks: each has some rows O of each matrix.
    """
    gram = ranks.sum(_gram(g_BOR)).double()
    trace_B11 = gram.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=1e-60)[:, None, None]
    s, eye = gram / trace_B11, torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    p = None
    for left in reversed(range(5)):
        t = 3.4445 * eye - 4.7750 * s + 2.0315 * (s @ s)
        p = t if p is None else t @ p
        s = t @ s @ t if left else s  # the last one nobody reads
    assert p is not None
    return torch.bmm(g_BOR, (p * trace_B11.rsqrt()).to(g_BOR.dtype))


def _gram(g_BOR: Tensor) -> Tensor:
    """G^T G, [B, R, R]."""
    parts = math.gcd(g_BOR.shape[1], GRAM_PARTS)
    g = g_BOR.unflatten(1, (parts, -1)).flatten(0, 1)
    return torch.bmm(g.transpose(1, 2), g).unflatten(0, (-1, parts)).sum(1)


def _shared(g_SMOR: Tensor, ranks: Ranks) -> Tensor:
    """`orthogonalise` of matrices that each rank has whole: each does some, where they can be dealt out."""
    if g_SMOR.shape[1] % ranks.size:
        return ranks.same(orthogonalise(g_SMOR.flatten(0, 1)).view_as(g_SMOR))
    own = ranks.part(g_SMOR, 1)
    return ranks.gather(orthogonalise(own.flatten(0, 1)).view_as(own)).transpose(0, 1).flatten(1, 2)


def _sums(g_SMOR: Tensor, last_PMOR: Tensor, rows_S: Tensor) -> tuple[Tensor, Tensor]:
    """Of a gradient and the last update: [S], the sum of g, which is not finite where g is not; [3, S, M], the sums of g², g u
    and u² over this rank's rows. Float32."""
    if g_SMOR.is_cuda:
        return _cuda().sums(g_SMOR, last_PMOR, rows_S)
    u = last_PMOR[rows_S].float()
    return g_SMOR.sum((1, 2, 3)), torch.stack((_squares(g_SMOR), (g_SMOR * u).sum((2, 3)), _squares(u)))


def _lengths(
    b_PMOR: Tensor, rows_S: Tensor, u_SMOR: Tensor, kept_S: Tensor, far_SM: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Before a step of length ``far_SM`` along -u from what is kept of b, [S, M] each: by what u is to be multiplied; the norm
    of b after the step, and before. Each rank has some rows of the matrices."""
    if u_SMOR.is_cuda:
        return _cuda().lengths(b_PMOR, rows_S, u_SMOR, kept_S, far_SM, ranks)
    b_SMOR = b_PMOR[rows_S]
    norm = lambda x: ranks.total(_squares(x)).sqrt()  # noqa: E731
    length_SM = far_SM / (norm(u_SMOR) + 1e-12)
    return length_SM, norm(_stepped(b_SMOR, u_SMOR, kept_S[:, None], length_SM)), norm(b_SMOR)


def _write(
    ok_S: Tensor, b_PMOR: Tensor, rows_S: Tensor, u_SMOR: Tensor, last_PMOR: Tensor, kept_SM: Tensor, length_SM: Tensor
) -> None:
    """Make b kept b - length u, and last u; of a session that is not ok they stay."""
    if u_SMOR.is_cuda:
        _cuda().write(ok_S, b_PMOR, rows_S, u_SMOR, last_PMOR, kept_SM, length_SM)
        return
    ok, b_SMOR = ok_S[:, None, None, None], b_PMOR[rows_S]
    b_PMOR.index_copy_(0, rows_S, torch.where(ok, _stepped(b_SMOR, u_SMOR, kept_SM, length_SM), b_SMOR))
    last_PMOR.index_copy_(0, rows_S, torch.where(ok, u_SMOR.to(last_PMOR.dtype), last_PMOR[rows_S]))


def _cuda() -> Any:
    from vllm_ttt.worker.step import update_cuda  # it needs Triton

    return update_cuda


def _stepped(b_SMOR: Tensor, u_SMOR: Tensor, kept_SM: Tensor, length_SM: Tensor) -> Tensor:
    return b_SMOR * kept_SM[..., None, None] - u_SMOR * length_SM[..., None, None]


def _squares(x_SMOR: Tensor) -> Tensor:
    """[S, M]: the squares of the Frobenius norms."""
    return torch.linalg.vector_norm(x_SMOR, dim=(2, 3)).square()


def _adapted(rate_S: Tensor, sums: list[Tensor], adapt_rate: float, ranks: Ranks = ALONE) -> Tensor:
    """The rate after a look at the gradient: larger where the last update was in the right direction, which is where its cosine
    with the gradient now is positive (B moved along the negative update). Without a last update it stays.

    Args:
        sums: of the thin matrices and of the wide ones, the second of what `_sums` returns.
    """
    cosines = []
    for squares_3SM, rows in zip(sums, (ALONE, ranks), strict=True):
        gg, gu, uu = rows.total(squares_3SM)
        cosines.append(gu / (gg.sqrt() * uu.sqrt()).clamp(min=1e-30))
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
