"""Halt at segment k, whatever happens: the supervised-only arm, and the curve every rule must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from agents.base import HaltingAgent, View
from envs.actions import CONTINUE, HALT
from hrm_rl.errors import UserError


class FixedAgent(HaltingAgent):
    """Halts at step k.

    Args:
        max_steps: The budget of the episodes.
        k: The segment to halt at; 0 stands for max_steps.
    """

    def __init__(self, max_steps: int, k: int = 0):
        super().__init__()
        if not 0 <= k <= max_steps:
            raise UserError(f"agent.k must be between 1 and max_steps={max_steps} (or 0 for max_steps), not {k}")
        self.k = k or max_steps

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        return torch.where(view.steps >= self.k, HALT, CONTINUE)
