"""SARSA: the target of CONTINUE is the value of the action that is really taken next, exploration included.

Source: Sutton & Barto, Reinforcement Learning (2018), section 6.4, equation 6.7. Departures: binary cross entropy on
sigmoid(Q) as HRM has it; HALT is trained at every step, since what it would have earned is known; a step's CONTINUE
is learned one update late, when the next action is known, from the state kept (so its gradient does not reach the
core but at the budget, where CONTINUE counts as HALT; that of q_halt does everywhere).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from agents import q_targets, returns
from agents.base import HaltingAgent, Transition
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
        return sarsa_losses(self, transition)


def sarsa_losses(
    agent: HaltingAgent, transition: Transition, gamma: float = 1.0, ponder_cost: float = 0.0,
    loss: q_targets.Loss = "bce", value: Callable[[Tensor], Tensor] | None = None,
) -> q_targets.QLosses:  # fmt: skip
    """SARSA's losses, slot by slot: HALT at every step, CONTINUE of the step before from the action taken here.

    value: (B, T, D) -> q_logits (B, 2) that value this action (a target network); None: the agent's own.
    Call it once in every `loss`: it keeps the step before in the agent's memory.
    """
    view, q_logits = transition.view, transition.q_logits
    z_H = view.z_H[:, :1].float()
    before = agent.recall("z_H", view, torch.zeros_like(z_H))
    agent.keep("z_H", z_H)
    at_limit, goes_on = view.steps >= agent.max_steps, view.valid & (view.steps > 1)
    reward = q_targets.halt_target(transition.is_correct)
    losses = q_targets.q_losses(q_logits, reward, reward, view.valid, at_limit, loss)
    valued_by = q_logits if value is None else value(view.z_H)
    target = returns.sarsa_target(valued_by, transition.actions, gamma, ponder_cost, loss)
    q_continue = agent.scores(before)[:, 1]
    late = q_targets.element_losses(q_continue, target, loss) * goes_on
    td_error = (target - q_targets.q_values(q_continue.detach(), loss)).abs() * goes_on
    count = goes_on.int() + losses.has_continue.int()  # two at the budget: the step before's and its own
    return losses._replace(
        cont=losses.cont + late, has_continue=count > 0,
        td_error_continue=(td_error + losses.td_error_continue.abs()) / count.clamp(min=1),
    )  # fmt: skip
