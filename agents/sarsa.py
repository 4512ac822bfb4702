"""SARSA: the target of CONTINUE is the value of the action that is really taken next, exploration included.

Source: Sutton & Barto, Reinforcement Learning (2018), section 6.4, equation 6.7. Departures: binary cross entropy on
sigmoid(Q) as HRM has it; HALT is trained at every step, since what it would have earned is known; a step's CONTINUE
is learned one update late, when the next action is known, from the state kept (so its gradient does not reach the
core but at the budget, where CONTINUE counts as HALT; that of q_halt does everywhere).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from agents import q_targets, returns
from agents.base import Transition
from agents.q_halting import QHaltingAgent


class SarsaAgent(QHaltingAgent):
    """Halts where q_halt > q_continue; learns q_continue on-policy.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        epsilon: Probability of an exploration floor in training, as in `QHaltingAgent`.
        exploration: Draw the floor once an episode or at every step.
        q_bias: Where both Q-logits start.
        threshold: Halt where q_halt - q_continue is larger than this.
    """

    bootstraps = False

    def __init__(
        self, core: nn.Module, max_steps: int, epsilon: float = 0.1,
        exploration: Literal["per_step", "per_episode"] = "per_step", q_bias: float = -5.0, threshold: float = 0.0,
    ):  # fmt: skip
        super().__init__(core, max_steps, "next_observation", epsilon, exploration, q_bias, threshold)

    def loss(self, transition: Transition) -> q_targets.QLosses:
        view, q_logits = transition.view, transition.q_logits
        z_H = view.z_H[:, :1].float()
        before = self.recall("z_H", view, torch.zeros_like(z_H))
        self.keep("z_H", z_H)
        at_limit, goes_on = view.steps >= self.max_steps, view.valid & (view.steps > 1)
        losses = q_targets.q_losses(
            q_logits, q_targets.halt_target(transition.is_correct),
            q_targets.halt_target(transition.is_correct), view.valid, at_limit,
        )  # fmt: skip
        target = returns.sarsa_target(q_logits, transition.actions)
        q_continue = self.scores(before)[:, 1].float()
        late = F.binary_cross_entropy_with_logits(q_continue, target, reduction="none") * goes_on
        td_error = (target - q_continue.detach().sigmoid()).abs() * goes_on + losses.td_error_continue.abs()
        count = goes_on.int() + losses.has_continue.int()  # two at the budget: the step before's and its own
        return losses._replace(
            cont=losses.cont + late, td_error_continue=td_error / count.clamp(min=1), has_continue=count > 0
        )
