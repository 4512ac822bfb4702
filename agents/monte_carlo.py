"""Monte-Carlo Q: the target of CONTINUE is what the episode earned in the end. Nothing is bootstrapped.

Source: Sutton & Barto, Reinforcement Learning (2018), section 5.4 (on-policy control), every visit; the limit
lambda = 1 of PQN's returns (arXiv:2407.04811, section 3). Departures: those of `agents.lambda_return`.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from agents.lambda_return import LambdaAgent


class MonteCarloAgent(LambdaAgent):
    """Halts where q_halt > q_continue; learns q_continue from the reward at the end of the episode.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        epsilon: Probability of an exploration floor in training, as in `QHaltingAgent`.
        exploration: Draw the floor once an episode or at every step.
        q_bias: Where both Q-logits start.
        threshold: Halt where q_halt - q_continue is larger than this.
    """

    def __init__(
        self, core: nn.Module, max_steps: int, epsilon: float = 0.1,
        exploration: Literal["per_step", "per_episode"] = "per_step", q_bias: float = -5.0, threshold: float = 0.0,
    ):  # fmt: skip
        super().__init__(core, max_steps, 1.0, epsilon, exploration, q_bias, threshold)
