"""Losses of some rows under several multiples of one delta, in one batch: the forward of `micro_step` with s B for B.

Dimension suffixes as there, and K scales. The attention output of the first adapted layer is the only input that no scale has
touched. With one layer, o_proj and its low-rank product are computed once, and what follows them for each scale, as further
rows of the same products. With several, a session is as many sessions as there are scales, whose pasts are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ttt.worker.micro_step import Delta, Tail, forward, last_norm, token_losses
from vllm_ttt.worker.qkv import Past

#: Every so manyth row of a chunk is measured.
STRIDE = 2


def stacked_losses(
    tail: Tail, delta: Delta, scales_K: Tensor, h_SCD: Tensor, a_SCQ: Tensor, t_SC: Tensor, w_SC: Tensor, past: Past
) -> Tensor:
    """As `scaled_losses`, through several layers; of all rows, every STRIDEth alone has a weight.

    Args:
        past: of S K sessions, those of one after another's: what they were served with, under every scale.
    """
    (S, C, D), K, dt = h_SCD.shape, len(scales_K), tail.wo_DQ.dtype
    every = lambda x: x.unsqueeze(1).expand(S, K, *x.shape[1:]).flatten(0, 1)  # noqa: E731
    scaled = Delta(*((scales_K.view(K, 1, 1) * x.unsqueeze(1)).flatten(0, 1).to(dt) for x in delta.tensors()))
    r_TD, *_ = forward(tail, scaled, every(h_SCD), every(a_SCQ), past, grad=False)
    y_TD, _ = last_norm(tail, r_TD.view(S * K, C, D)[:, ::STRIDE].flatten(0, 1))
    t_T, w_T = (every(x[:, ::STRIDE]).flatten() for x in (t_SC, w_SC))
    return token_losses(tail, y_TD, t_T, w_T).view(S, K, -1).sum(2)


def scaled_losses(
    tail: Tail, delta: Delta, scales_K: Tensor, h_SCD: Tensor, a_SCQ: Tensor, t_SC: Tensor, w_SC: Tensor
) -> Tensor:
    """Weighted losses under each of ``scales_K`` times ``delta``, of one layer.

    Args:
        delta: B without any scale, in the tail's dtype. scales_K: float32, on the device.
        h_SCD, a_SCQ, t_SC, w_SC: as for `micro_step.accumulate`.
    Returns:
        [S, K] float32, nats; each the sum over a session's rows.
    """
    S, C, D = h_SCD.shape
    K, dt = len(scales_K), tail.wo_DQ.dtype
    T = S * K * C
    scale_K11 = scales_K.view(K, 1, 1)
    # [S, K, C, out] as rows; one bmm per module, since the K copies of a session's rows share its B.
    lora = lambda x_TR, b_SOR: (  # noqa: E731
        scale_K11 * torch.bmm(x_TR.view(S, K * C, -1), b_SOR.transpose(1, 2)).view(S, K, C, -1).float()
    )
    a_NQ = a_SCQ.reshape(S * C, -1).to(dt)
    base_S1CD = (h_SCD.float() + (a_NQ @ tail.wo_DQ.T).float().view(S, C, D)).unsqueeze(1)
    if tail.bo_D is not None:
        base_S1CD = base_S1CD + tail.bo_D
    own_S1CD = torch.bmm((a_NQ @ tail.ao_RQ.T).view(S, C, -1), delta.o.transpose(1, 2)).float().unsqueeze(1)
    r1_TD = (base_S1CD + scale_K11 * own_S1CD).reshape(T, D)
    x_TD = (r1_TD * torch.rsqrt(r1_TD.square().mean(-1, keepdim=True) + tail.eps) * tail.ln_D).to(dt)
    gu_T2F = (x_TD @ tail.wgu_2FD.T).float() + lora(x_TD @ tail.ai_RD.T, delta.gu).view(T, -1)
    if tail.bgu_2F is not None:
        gu_T2F += tail.bgu_2F
    g_TF, u_TF = gu_T2F.chunk(2, -1)
    z_TF = (g_TF * torch.sigmoid(g_TF) * u_TF).to(dt)
    r2_TD = r1_TD + (z_TF @ tail.wd_DF.T).float() + lora(z_TF @ tail.ad_RF.T, delta.d).view(T, D)
    if tail.bd_D is not None:
        r2_TD += tail.bd_D
    y_TD, _ = last_norm(tail, r2_TD)
    every = lambda x_SC: x_SC.unsqueeze(1).expand(S, K, C).reshape(T)  # noqa: E731
    return token_losses(tail, y_TD, every(t_SC), every(w_SC)).view(S, K, C).sum(2)
