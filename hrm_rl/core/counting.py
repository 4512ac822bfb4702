"""A core whose answers are known in closed form, for tests and for learning how the pieces fit.

It counts its segments inside z_H and answers rightly exactly in the segments it is told to, so that
every reward, end and Q-value of the decision process can be written down by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hrm_rl.core.base import CoreOutput, State


class CountingCore(nn.Module):
    """Right from segment `right_from` on (and, if `right_until` is given, up to that segment).

    solve: maps tokens (B, S) to the right tokens (B, S); the core cannot know them by itself.
    z_H holds the number of segments run in feature 0 of every position and a one-hot code of that
    number in the rest, so that a linear Q-head can represent any value function over steps.
    """

    def __init__(
        self, seq_len: int, vocab_size: int, solve: Callable[[Tensor], Tensor], right_from: int,
        right_until: int | None = None, max_count: int = 16,
    ):  # fmt: skip
        super().__init__()
        self.num_positions = seq_len
        self.hidden_size = max_count + 2
        self.vocab_size = vocab_size
        self.solve = solve
        self.right_from = right_from
        self.right_until = right_until
        self.max_count = max_count
        self.calls = 0

    def initial_state(self, batch_size: int) -> State:
        zero = torch.zeros(batch_size, self.num_positions, self.hidden_size)
        return State(zero, zero)

    def forward(self, tokens: Tensor, state: State) -> CoreOutput:
        self.calls += 1
        count = state.z_H[:, 0, 0].long() + 1
        right = count >= self.right_from
        if self.right_until is not None:
            right &= count <= self.right_until
        answer = self.solve(tokens)
        wrong = (answer - 1) % (self.vocab_size - 2) + 2  # another digit in every cell
        shown = torch.where(right[:, None], answer, wrong)
        code = nn.functional.one_hot(count.clamp(max=self.max_count), self.max_count + 1).float()
        features = torch.cat((count[:, None].float(), code), dim=-1)
        z = features[:, None].expand(-1, self.num_positions, -1).contiguous()
        return CoreOutput(State(z, z), nn.functional.one_hot(shown, self.vocab_size).float() * 10)
