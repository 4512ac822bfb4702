"""The HRM core: N high-level cycles of T low-level steps on a latent state, with the 1-step gradient.

Source: HRM, arXiv:2506.21734, sections 2 and 3, and the released code (github.com/sapientinc/HRM).

Departures from the released code, each of them on purpose:
- the Q-head is not here: halting belongs to the agent (`agents/`), the core only reasons;
- the puzzle embedding is an ordinary parameter (the release trains it by its own sign-SGD optimiser);
- token mixing by an MLP (TRM) or by the geometry of a grid, and relative grid positions, stand beside attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_rl.core.config import CoreConfig
from hrm_rl.core.recurrent import Inputs, RecurrentCore

__all__ = ["CoreConfig", "HRMCore"]


class HRMCore(RecurrentCore):
    """Two networks at two speeds: f_L is called T times, then f_H once, N times over.

    The gradient flows through the last low-level and the last high-level call only (the 1-step gradient,
    section 2.2 of the paper) unless `config.gradient` says otherwise.
    """

    kind = "hrm"

    def build(self, generator: torch.Generator | None) -> None:
        c = self.config
        self.H_level = self.level(c.H_layers, generator)
        self.L_level = self.level(c.L_layers, generator)
        self.calls = (*("L",) * c.L_cycles, "H") * c.H_cycles

    def call(self, which: str, z_H: Tensor, z_L: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        injection, *positional = inputs
        if which == "L":
            return z_H, self.L_level(z_L + (z_H + injection), *positional)
        return self.H_level(z_H + z_L, *positional), z_L
