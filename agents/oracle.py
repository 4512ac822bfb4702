"""Halt at the first segment whose answer is exactly right: the upper bound of every rule, not a rule.

Source: the retrospective oracle of early-exit studies. It is the one agent that looks at the answer, through
`View.is_correct`: evaluation fills that for agents that ask for it, training refuses them.
"""

from __future__ import annotations

from torch import Tensor

from agents.base import HaltingAgent, View


class OracleAgent(HaltingAgent):
    """Halts where the answer is right, else at the budget.

    Args:
        max_steps: The budget of the episodes.
    """

    sees = ("is_correct",)
    threshold = 0.5

    def __init__(self, max_steps: int | None = None):
        super().__init__(max_steps)

    def score(self, view: View) -> Tensor:
        return view.is_correct.float()
