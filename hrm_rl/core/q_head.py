"""The Q-head: a linear map from the first position of z_H to (q_halt, q_continue) logits.

Source: HRM (arXiv:2506.21734), section 2.2; weights 0 and bias -5 as in the released code, so that both
values start out near 0 and nothing halts early by accident. It belongs to the agent; it stands among the
layers so that an environment can show a trained head's values without knowing any agent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QHead(nn.Module):
    """z_H (B, P + S, D) -> q_logits (B, 2) float32, in the order (HALT, CONTINUE)."""

    def __init__(self, hidden_size: int, bias: float = -5.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, hidden_size))
        self.bias = nn.Parameter(torch.full((2,), float(bias)))

    def forward(self, z_H: Tensor) -> Tensor:
        return F.linear(z_H[:, 0].float(), self.weight, self.bias)
