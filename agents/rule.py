"""The one thin class behind all rules that are a signal, its direction and a threshold."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from agents.base import HaltingAgent, View
from agents.signals import SIGNALS
from hrm_rl.errors import UserError


class SignalAgent(HaltingAgent):
    """Halts where a signal of `agents.signals` reaches `tau`: from below or from above, as its direction says.

    A subclass names its `signal` and its default `tau`.

    Args:
        max_steps: The budget of the episodes.
        tau: The threshold, in the signal's own unit; None takes the class's default. (`threshold` is the same on
            the scale of the score, where larger always means readier to halt.)
    """

    signal: ClassVar[str]
    tau: float

    def __init_subclass__(cls, **keywords) -> None:
        super().__init_subclass__(**keywords)
        cls.sees = SIGNALS[cls.signal].sees

    def __init__(self, max_steps: int | None = None, tau: float | None = None):
        if tau is not None and tau != tau:
            raise UserError(f"agent.tau must be a number, not {tau}")
        tau = type(self).tau if tau is None else tau
        super().__init__(max_steps, SIGNALS[self.signal].direction * tau)

    def score(self, view: View) -> Tensor:
        return SIGNALS[self.signal].score(view, self.memory)
