"""Halt where the answer has not changed for some segments in a row.

Source: patience of PABEE, arXiv:2006.04152, over the whole answer instead of a class label.
"""

from __future__ import annotations

from agents.rule import SignalAgent
from hrm_rl.errors import UserError


class StabilityAgent(SignalAgent):
    """Halts where the answer of the free cells is the one of `patience` segments ago and was so all along.

    Args:
        max_steps: The budget of the episodes.
        patience: Segments in a row without a change. The first segment has none before it, so step
            patience + 1 is the earliest halt.
    """

    signal = "stability"
    tau = 2.0

    def __init__(self, max_steps: int | None = None, patience: int = 2):
        if patience < 1:
            raise UserError(f"agent.patience must be at least 1, not {patience}")
        super().__init__(max_steps, float(patience))
