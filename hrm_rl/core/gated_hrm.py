"""HRM whose networks merge their inputs by a learned gate in place of addition.

Source: HRM, arXiv:2506.21734, section 2, where inputs are merged by element-wise addition and gating is named as what
might do better and left for the future. The form is ours. With s the state that a call updates and i what comes from
outside (z_H + x for f_L, z_L for f_H):

    g = sigmoid(W [s, i] + b)          one gate a position and feature, W (D, 2D), b (D), of its own for f_L and f_H
    merged = 2 (g s + (1 - g) i)

The 2 makes addition the middle of the range: W = 0 and b = 0 at the start, so g = 1/2, merged = s + i, and an
untrained gated HRM is HRM number for number (tests hold it to that). Without the 2 the sum would be halved, which the
norm at the end of a sub-block hides but the logits of attention, which are quadratic in it, do not. Gradient reaches W
at once, since s and i differ. What a network sees grows to twice one input at most (g = 0 or 1), and the post-norm
makes its variance 1 again.

Departures from HRM: the gates, 4 D^2 + 2 D parameters and 4 D^2 multiplications a position and pair of calls; nothing
else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrm_rl.core.hrm import HRMCore
from hrm_rl.core.recurrent import Inputs


class Gate(nn.Module):
    """2 (g s + (1 - g) i), g = sigmoid(W [s, i] + b), for s and i of (..., D); addition at the start."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, 2 * dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, state: Tensor, injection: Tensor) -> Tensor:
        both = torch.cat((state, injection), dim=-1)
        g = F.linear(both, self.weight.to(both.dtype), self.bias.to(both.dtype)).sigmoid()
        return 2 * (g * state + (1 - g) * injection)


class GatedHRMCore(HRMCore):
    """HRM with a `Gate` in front of each of its networks."""

    kind = "gated_hrm"

    def build(self, generator: torch.Generator | None) -> None:
        super().build(generator)
        self.H_gate = Gate(self.config.hidden_size)
        self.L_gate = Gate(self.config.hidden_size)

    def call(self, which: str, z_H: Tensor, z_L: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        injection, *positional = inputs
        if which == "L":
            return z_H, self.L_level(self.L_gate(z_L, z_H + injection), *positional)
        return self.H_level(self.H_gate(z_H, z_L), *positional), z_L
