"""Halt-only binary cross entropy: one logit learns whether the answer is right, and nothing else.

Source: TRM, arXiv:2510.04871, section 4.6 (no continue loss, hence no second pass), as a loss of its own: a head of
one output and the weight 0.5 of the release, whatever halt_weight says. Departure: a padded slot trains nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents import exploration
from agents.base import AgentLoss, Transition, View
from agents.checks import check_score
from agents.halt_logit import HaltLogitAgent
from envs.actions import CONTINUE, HALT
from hrm_rl.errors import UserError


class HaltBCEAgent(HaltLogitAgent):
    """Halts where the probability that the answer is right is larger than `threshold`.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        epsilon: Probability of an exploration floor in training, drawn at every step, as in `QHaltingAgent`.
        weight: Of the loss in the run's total.
        bias: Where the logit starts.
        threshold: A probability.
    """

    def __init__(
        self, core: nn.Module, max_steps: int, epsilon: float = 0.1, weight: float = 0.5, bias: float = -5.0,
        threshold: float = 0.5,
    ):  # fmt: skip
        super().__init__(core, max_steps, bias, threshold)
        if not 0 <= epsilon <= 1:
            raise UserError(f"agent.epsilon must be between 0 and 1, not {epsilon}")
        self.epsilon, self.weight = epsilon, weight

    def score(self, view: View) -> Tensor:
        return self.halt_logits(view.z_H).sigmoid()

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        self.last_score = check_score(view, self.score(view))
        halts = self.halts(view, self.last_score)
        if explore:
            floor = exploration.floor(view.key, view.steps, self.max_steps, self.epsilon, per_step=True)
            halts = halts & ((view.steps >= floor) | (view.steps >= self.max_steps))
        return torch.where(halts, HALT, CONTINUE)

    def loss(self, transition: Transition) -> AgentLoss:
        view = transition.view
        target = transition.is_correct.float()
        each = F.binary_cross_entropy_with_logits(self.halt_logits(view.z_H), target, reduction="none")
        bce = (each * view.valid).sum() / len(view.steps)
        return AgentLoss(self.weight * bce, {"bce": bce})
