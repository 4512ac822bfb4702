"""TRM's halting rule on the Q-head: halt where q_halt alone says that the answer is right.

Source: TRM, arXiv:2510.04871, which drops the continue loss: train it with bootstrap=none for the rule as
published. On a Q-head that was trained with both losses it reads one of the two outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from agents import q_targets
from agents.q_halting import QHaltingAgent


class TRMAgent(QHaltingAgent):
    """Halts where the logit q_halt > tau.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        bootstrap: Where the continue target of training comes from (`agents.q_targets`); the rule reads q_halt only.
        tau: Threshold of the logit; 0 is a probability of one half.
        epsilon: Probability of an exploration floor in training, as in `QHaltingAgent`.
        q_bias: Where both Q-logits start.
    """

    def __init__(
        self, core: nn.Module, max_steps: int, bootstrap: q_targets.Bootstrap = "none", tau: float = 0.0,
        epsilon: float = 0.1, q_bias: float = -5.0,
    ):  # fmt: skip
        super().__init__(core, max_steps, bootstrap, epsilon=epsilon, q_bias=q_bias, threshold=tau)

    def rule(self, q_logits: Tensor) -> Tensor:
        return q_logits[:, 0]
