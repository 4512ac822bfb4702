"""What agents with one halting logit have in common: the head, and how it is read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import HaltingAgent


class HaltHead(nn.Module):
    """z_H (..., T, D) -> logit (...) float32, from the first position, as HRM's Q-head reads it. Weights start at 0."""

    def __init__(self, hidden_size: int, bias: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.full((1,), float(bias)))

    def forward(self, z_H: Tensor) -> Tensor:
        return F.linear(z_H[..., 0, :].float(), self.weight, self.bias)[..., 0]


class HaltLogitAgent(HaltingAgent):
    """Owns a head with one logit: the chance of halting here, given that the episode came so far.

    Args:
        core: The recurrent core; read for its hidden size.
        max_steps: The budget of the episodes.
        bias: Where the logit starts.
        threshold: Halt where the score is larger than this.
    """

    learns = True
    capturable = True
    bootstraps = False
    strict = True

    def __init__(self, core: nn.Module, max_steps: int, bias: float = -2.0, threshold: float | None = None):
        super().__init__(max_steps, threshold)
        self.head = HaltHead(core.hidden_size, bias)

    def halt_logits(self, z_H: Tensor) -> Tensor:
        """(..., T, D) -> (...) float32."""
        return self.head(z_H)
