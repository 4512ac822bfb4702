"""The Tiny Recursive Model: one network for both roles, and the gradient of a whole recursion.

Source: TRM, arXiv:2510.04871, its pseudocode, and the released code
(github.com/SamsungSAILMontreal/TinyRecursiveModels). With x the embedded puzzle, y the answer's features and z the
latent ones, T = H_cycles recursions a segment of n = L_cycles latent steps each:

    z <- net(x + y + z)      n times
    y <- net(y + z)          once; then all of it again, T times in all

The gradient flows through the last recursion, all n + 1 calls of it, and T - 1 recursions run without (gradient=auto,
which is gradient=last_k with gradient_k = L_cycles + 1); the answer is read from y. Here y is z_H and z is z_L, and
the network, of L_layers blocks, goes by the release's name L_level; H_layers has no effect. Mixing positions by an MLP
(token_mixing=mlp, positions=none; the paper's best on Sudoku) or by attention, the running average of the weights
(optim.ema, 0.999 in the paper) and halting at q_halt > 0 without a continue loss (bootstrap=none, agent trm) are
settings of every core.

Departures: those of `hrm.py` (no Q-head inside, puzzle embedding an ordinary parameter), and the sizes, which are
whatever the configuration says (paper: 512 features, 2 blocks, n = 6, T = 3).

Initial scale: as in HRM. x, y and z have unit variance each, so the network sees variance 3 in a latent step and 2 in
the answer's; the post-norm makes either 1 again. The missing x is how one network tells its two roles apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_rl.core.recurrent import Inputs, RecurrentCore


class TRMCore(RecurrentCore):
    """n latent steps and one of the answer by the same network, T times over; gradient through the last time."""

    kind = "trm"

    def build(self, generator: torch.Generator | None) -> None:
        c = self.config
        self.L_level = self.level(c.L_layers, generator)
        self.calls = (*("z",) * c.L_cycles, "y") * c.H_cycles

    def call(self, which: str, z_H: Tensor, z_L: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        injection, *positional = inputs
        if which == "z":
            return z_H, self.L_level(z_L + (z_H + injection), *positional)
        return self.L_level(z_H + z_L, *positional), z_L

    @property
    def published(self) -> int:
        return self.config.L_cycles + 1
