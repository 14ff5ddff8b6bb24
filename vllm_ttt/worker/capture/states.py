"""What the preset `head` keeps of each token of a batch: the last hidden state, which the model runner has anyway."""

from __future__ import annotations

import torch
from torch import Tensor


class States:
    """In the place of `Capture`: ``h_ND`` are the states of the batch that has run, without any delta; without one, no rows."""

    def __init__(self, hidden: int, max_tokens: int, dtype: torch.dtype, device: torch.device, copies: bool = False):
        """``copies``: the runner's may be overwritten while it samples, where a drafter runs graphs of its own."""
        self.copies = copies
        self.none = torch.zeros(0, hidden, dtype=dtype, device=device)
        self.h_ND, self.a_NQ = self.none, torch.zeros(max_tokens, 0, dtype=dtype, device=device)

    def ran(self, state: object) -> None:
        """The forward of a batch has been launched; ``state`` is the runner's until it has sampled."""
        states: Tensor | None = getattr(state, "hidden_states", None)
        self.h_ND = self.none if states is None else states.clone() if self.copies else states

    def taken(self) -> None:
        """What is to be learned of the batch has been copied, or nothing is."""
        self.h_ND = self.none
