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

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from agents import q_targets, returns
from agents.base import Transition
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
        view, episode = transition.view, remember(self, transition)
        q_logits = self.scores(episode.z_H.flatten(0, 1)).unflatten(0, episode.ran.shape)  # (B, M, 2)
        rewards = episode.is_correct * episode.now  # HALT earns its reward where the episode ends
        target = returns.lambda_returns(rewards, returns.greedy_next_values(q_logits), episode.now, self.lam)
        at_limit = view.steps >= self.max_steps  # there CONTINUE counts as HALT (`q_targets.grounded_target`)
        learned = episode.ran & (~episode.now | at_limit[:, None]) & episode.done[:, None]
        q_continue = q_logits[..., 1].float()
        each = F.binary_cross_entropy_with_logits(q_continue, target, reduction="none")
        td_error = ((target - q_continue.detach().sigmoid()).abs() * learned).sum(1) / learned.sum(1).clamp(min=1)
        target_halt = q_targets.halt_target(transition.is_correct)
        here = q_targets.q_losses(transition.q_logits, target_halt, target_halt, view.valid, torch.zeros_like(at_limit))
        return here._replace(cont=(each * learned).sum(1), td_error_continue=td_error, has_continue=learned.any(1))
