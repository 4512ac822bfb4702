"""Halt at segment k, whatever happens: the supervised-only arm, and the curve every rule must beat."""

from __future__ import annotations

from torch import Tensor

from agents.base import HaltingAgent, View
from hrm_rl.errors import UserError


class FixedAgent(HaltingAgent):
    """Halts at step k.

    Args:
        max_steps: The budget of the episodes.
        k: The segment to halt at; 0 stands for max_steps.
    """

    capturable = True

    def __init__(self, max_steps: int, k: int = 0):
        if not 0 <= k <= max_steps:
            raise UserError(f"agent.k must be between 1 and max_steps={max_steps} (or 0 for max_steps), not {k}")
        super().__init__(threshold=k or max_steps)  # no budget of its own: the k that was asked for is the one

    @property
    def k(self) -> int:
        return self.threshold

    def score(self, view: View) -> Tensor:
        return view.steps.float()
