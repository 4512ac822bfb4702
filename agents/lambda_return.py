"""Q(lambda): the target of CONTINUE is the lambda-return of the episode, with no target network and no replay.

Source: PQN, arXiv:2407.04811, section 3 (parallelised Q-learning with lambda-returns). Departures, each on purpose:
- binary cross entropy on sigmoid(Q), as HRM has it, in place of the squared error; gamma = 1;
- the rollout of a slot is one whole episode (at most max_steps segments), learned from once, where it ends;
- HALT is trained at every step, since what it would have earned is known, CONTINUE on the return;
- HRM's exploration (floors) in place of epsilon-greedy;
- no layer normalisation is added: the core normalises its state itself.

The gradient of q_halt reaches the core at every step, that of q_continue through the segment which ends an episode
at the budget alone: the others are past. It costs no segment more than acting does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from agents import q_targets, returns
from agents.base import HaltingAgent, Transition
from agents.episode import remember
from agents.q_halting import QHaltingAgent
from hrm_rl.errors import UserError


class LambdaAgent(QHaltingAgent):
    """Halts where q_halt > q_continue; learns q_continue from lambda-returns.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        lam: Weight of the longer return: 0 bootstraps from the next step alone, 1 waits for the episode's end.
        epsilon: Probability of an exploration floor in training, as in `QHaltingAgent`.
        exploration: Draw the floor once an episode or at every step.
        q_bias: Where both Q-logits start.
        threshold: Halt where q_halt - q_continue is larger than this.
    """

    bootstraps = False  # from the episode's own later steps, not from one more segment

    def __init__(
        self, core: nn.Module, max_steps: int, lam: float = 0.65, epsilon: float = 0.1,
        exploration: Literal["per_step", "per_episode"] = "per_step", q_bias: float = -5.0, threshold: float = 0.0,
    ):  # fmt: skip
        if not 0 <= lam <= 1:
            raise UserError(f"agent.lam must be between 0 and 1, not {lam}")
        super().__init__(core, max_steps, "next_observation", epsilon, exploration, q_bias, threshold)
        self.lam = lam

    def loss(self, transition: Transition) -> q_targets.QLosses:
        return lambda_losses(self, transition, self.lam)


def lambda_losses(
    agent: HaltingAgent, transition: Transition, lam: float, gamma: float = 1.0, ponder_cost: float = 0.0,
    loss: q_targets.Loss = "bce", value: Callable[[Tensor], Tensor] | None = None,
) -> q_targets.QLosses:  # fmt: skip
    """Losses under the lambda-return, slot by slot: HALT at every step, CONTINUE where the episode ends.

    value: (K, 1, D) -> (K, 2) q_logits that the return bootstraps from (a target network); None: the agent's own.
    Call it once in every `loss`: it keeps the episode in the agent's memory.
    """
    view, episode = transition.view, remember(agent, transition)
    tokens = episode.z_H.flatten(0, 1)
    q_logits = agent.scores(tokens).unflatten(0, episode.ran.shape)  # (B, M, 2)
    valued_by = q_logits if value is None else value(tokens).unflatten(0, episode.ran.shape)
    price = ponder_cost * (episode.ran & ~episode.now)
    rewards = episode.is_correct * episode.now - price  # HALT earns its reward where the episode ends
    next_values = returns.greedy_next_values(valued_by, loss)
    target = returns.lambda_returns(rewards, next_values, episode.now, lam, gamma)
    at_limit = view.steps >= agent.max_steps  # there CONTINUE counts as HALT (`q_targets.grounded_target`)
    learned = episode.ran & (~episode.now | at_limit[:, None]) & episode.done[:, None]
    q_continue = q_logits[..., 1]
    each = q_targets.element_losses(q_continue, target, loss)
    td_error = (target - q_targets.q_values(q_continue.detach(), loss)).abs() * learned
    target_halt, nowhere = q_targets.halt_target(transition.is_correct), torch.zeros_like(at_limit)
    here = q_targets.q_losses(transition.q_logits, target_halt, target_halt, view.valid, nowhere, loss)
    return here._replace(
        cont=(each * learned).sum(1), td_error_continue=td_error.sum(1) / learned.sum(1).clamp(min=1),
        has_continue=learned.any(1),
    )  # fmt: skip
