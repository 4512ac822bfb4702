"""The recurrent Transformer: one network, called again and again, with as much computation as HRM of the same config.

Source: a baseline of HRM, arXiv:2506.21734 (the figure on depth), with HRM's blocks, embedding, fixed initial state
and deep supervision, so that the two levels and their two speeds are all that differs:

    z <- net(z + x)      C times a segment; the answer is read from z

HRM runs N (T L + H) blocks a segment (N H_cycles, T L_cycles, L L_layers, H H_layers). Here the network has b blocks
and is called C times with b C = N (T L + H); b is the largest divisor of that number that is not above L + H, HRM's
own blocks. With L = H and N (T + 1) even, as in all recipes here, b = L + H: the same parameters and, the 1-step
gradient reaching b blocks, the same backward pass.

Departures: the paper does not spell its baseline out, so the arithmetic above is ours. z is z_H, the state that agents
read; z_L stays the initial one and costs nothing.

Initial scale: z and x have unit variance each (the fixed initial state, the scaled embedding, and later the last norm
of the network), so the network sees variance 2 in every call, as HRM's f_H does; the post-norm makes it 1 again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_rl.core.config import CoreConfig
from hrm_rl.core.recurrent import Inputs, RecurrentCore


class RecurrentTransformerCore(RecurrentCore):
    """z_H <- net(z_H + x), so often that a segment runs as many blocks as HRM's."""

    kind = "recurrent_transformer"

    def build(self, generator: torch.Generator | None) -> None:
        blocks, calls = depth_and_calls(self.config)
        self.net = self.level(blocks, generator)
        self.calls = ("net",) * calls

    def call(self, which: str, z_H: Tensor, z_L: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        injection, *positional = inputs
        return self.net(z_H + injection, *positional), z_L


def depth_and_calls(config: CoreConfig) -> tuple[int, int]:
    """(blocks of the network, calls a segment), whose product is the number of blocks that HRM runs in a segment."""
    c = config
    total = c.H_cycles * (c.L_cycles * c.L_layers + c.H_layers)
    blocks = max(b for b in range(1, c.L_layers + c.H_layers + 1) if total % b == 0)
    return blocks, total // blocks
