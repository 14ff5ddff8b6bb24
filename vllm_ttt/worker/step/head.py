"""The step of the preset `head`: y' = y + B A y on the last hidden state, after the final norm and before lm_head.

Nothing of the model but lm_head takes part in it, so it is the same for every architecture. Dimension suffixes as in
micro_step.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.step.attention import Attention, SDPAAttention
from vllm_ttt.worker.step.loss import cross_entropy, workspace
from vllm_ttt.worker.step.pointwise import Flow
from vllm_ttt.worker.step.products import add_outer
from vllm_ttt.worker.step.update import Norms

#: Rows of lm_head that an export multiplies at once, in float32.
EXPORTED_ROWS = 4096


@dataclass
class Head:
    """What `Tail` is for the other presets. ``head_VD`` [V, D] is lm_head without padding, ``bias_V`` its bias,
    ``ay_RD`` the fixed projection A."""

    head_VD: Tensor
    ay_RD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    ranks: Ranks = ALONE
    first_token: int = 0

    def __post_init__(self) -> None:
        self.logits, self.softmax_rows = workspace(self.head_VD)
        self.modules = "y"
        #: the norm of the identity, which the delta is added to
        self.norms = Norms(self.modules, [{"y": math.sqrt(self.head_VD.shape[1])}], self.head_VD.device)
        #: no step attends to anything
        self.kernel: Attention = SDPAAttention()

    @property
    def rank(self) -> int:
        return self.ay_RD.shape[0]

    @property
    def vocabulary(self) -> int:
        return self.head_VD.shape[0]

    def entering(self, h: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the step begins with: the states as captured."""
        return h, None

    @property
    def projections(self) -> dict[int, Tensor]:
        """A by the number of its inputs."""
        return {self.ay_RD.shape[1]: self.ay_RD}

    def exported(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """``delta``, B by name on the host, as an adapter of PEFT has it: W (y + B A y) = W y + (W B) A y."""
        rows = self.head_VD.split(EXPORTED_ROWS)
        b = {name: x.to(self.head_VD.device, torch.float32) for name, x in delta.items()}
        return {name: torch.cat([(w.float() @ x).cpu() for w in rows]) for name, x in b.items()}

    def zeros(self, sessions: int, dtype: torch.dtype = torch.float32) -> Delta:
        """The delta of so many fresh sessions."""
        D, device = self.head_VD.shape[1], self.head_VD.device
        return Delta.zeros(self.modules, 1, sessions, D, 0, self.rank, dtype, device)


def accumulate(
    head: Head, delta: Delta, y_SCD: Tensor, t_SC: Tensor, w_SC: Tensor, grad: Delta | None, rows_2SC: Tensor | None = None
) -> Tensor:
    """As micro_step.py's; ``y_SCD`` is the last hidden state as the model gave it, before any delta."""
    S, C, D = y_SCD.shape
    dt, b_SDR = head.head_VD.dtype, delta.layer(0).y
    assert b_SDR is not None
    ya_SCR = y_SCD.to(dt) @ head.ay_RD.T
    moved_TD = (y_SCD.float() + torch.bmm(ya_SCR, b_SDR.transpose(1, 2))).view(S * C, D)
    top_T = None if rows_2SC is None else rows_2SC[1].view(-1)
    loss_T, dy_TD = cross_entropy(head, moved_TD.to(dt), t_SC.reshape(-1), w_SC.reshape(-1), grad is not None, top_T)
    if rows_2SC is not None:
        rows_2SC[0].copy_(loss_T.view(S, C))
    if grad is not None:
        assert dy_TD is not None
        add_outer(grad.layer(0).y, Flow(dy_TD, dy_TD.to(dt)), ya_SCR.view(S * C, -1), S)
    return loss_T.view(S, C).sum(1)
