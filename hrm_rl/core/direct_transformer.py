"""The direct-prediction Transformer: one pass over the puzzle, no recurrence.

Source: the baseline "direct prediction" of HRM, arXiv:2506.21734: a Transformer with HRM's blocks and HRM's size
(H_layers + L_layers blocks, so the same parameters) that answers at once:

    z_H = net(x)

The state it is given is ignored, so a second segment gives the first one's answer, and halting is worth nothing after
the first: a control for everything that recursion is said to do. z_H holds its features, so that agents and
environments work on it as they stand; z_L stays the initial one. H_cycles and L_cycles have no effect.

Departures: none that we know of, the paper giving no more than its size. Trained like all others here; with
`--max-steps 1` every segment shows a puzzle that is new, where otherwise one is shown until the agent halts.

Initial scale: the embedding has unit variance, and the post-norm of each block keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_rl.core.recurrent import Inputs, RecurrentCore


class DirectTransformerCore(RecurrentCore):
    """z_H = net(x), whatever the state."""

    kind = "direct_transformer"

    def build(self, generator: torch.Generator | None) -> None:
        self.net = self.level(self.config.H_layers + self.config.L_layers, generator)
        self.calls = ("net",)

    def call(self, which: str, z_H: Tensor, z_L: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        injection, *positional = inputs
        return self.net(injection, *positional), z_L
