"""Halt where going on is not worth its price: Q_halt + cost >= Q_continue, in values (probabilities of reward).

Source: optimal stopping with a price for each further segment (value of computation). With cost 0 it is HRM's rule
but for ties, since the sigmoid keeps the order.
"""

from __future__ import annotations

from torch import Tensor, nn

from agents import q_targets
from agents.q_halting import QHaltingAgent
from hrm_rl.errors import UserError


class AdvantageAgent(QHaltingAgent):
    """Halts where sigmoid(q_halt) + cost >= sigmoid(q_continue).

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        bootstrap: Where the continue target of training comes from (`agents.q_targets`); not none.
        cost: What one more segment must bring at least, in exact accuracy.
        epsilon: Probability of an exploration floor in training, as in `QHaltingAgent`.
        q_bias: Where both Q-logits start.
    """

    strict = False

    def __init__(
        self, core: nn.Module, max_steps: int, bootstrap: q_targets.Bootstrap = "shared_prefix", cost: float = 0.01,
        epsilon: float = 0.1, q_bias: float = -5.0,
    ):  # fmt: skip
        if bootstrap == "none":
            raise UserError("agent advantage compares with q_continue, which bootstrap=none does not train")
        super().__init__(core, max_steps, bootstrap, epsilon=epsilon, q_bias=q_bias, threshold=-cost)

    def rule(self, q_logits: Tensor) -> Tensor:
        values = q_logits.float().sigmoid()
        return values[:, 0] - values[:, 1]
