"""Halt at a random step that looks at nothing: the control that a rule with the same mean steps must beat.

The step of an episode is drawn once, from the episode's key, so it does not depend on slots or batches. Its mean
over episodes is `mean_steps` exactly, the cut at the budget included.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from agents.base import HaltingAgent, View
from envs.actions import CONTINUE, HALT
from hrm_rl import rng
from hrm_rl.errors import UserError


class RandomAgent(HaltingAgent):
    """Halts at a random step.

    Args:
        max_steps: The budget of the episodes.
        mean_steps: Steps on average, from 1 to max_steps; 0 stands for the middle, (1 + max_steps) / 2.
        distribution: geometric (the same chance at every step) or uniform (every step up to some last one alike;
            for a mean above the middle, every step from some first one).
    """

    def __init__(
        self, max_steps: int, mean_steps: float = 0.0, distribution: Literal["geometric", "uniform"] = "geometric"
    ):
        super().__init__(max_steps)
        mean = mean_steps or (1 + max_steps) / 2
        if not 1 <= mean <= max_steps:
            raise UserError(f"agent.mean_steps must be between 1 and max_steps={max_steps}, not {mean_steps}")
        if distribution not in ("geometric", "uniform"):
            raise UserError(f"agent.distribution must be geometric or uniform, not {distribution!r}")
        self.mean_steps, self.distribution = mean, distribution
        self.last = max_steps  # the budget may be another one for a while; the distribution stays
        self.hazard = _hazard(mean, max_steps)

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        stops = view.steps >= self.stop_steps(view.key)
        return torch.where(stops | (view.steps >= self.max_steps), HALT, CONTINUE)

    def stop_steps(self, key: Tensor) -> Tensor:
        """(B,) int64 in 1..max_steps, the step at which the episode of each key (B,) stops."""
        u, v = rng.uniform(rng.fold(key, _STOP), 2).unbind(-1)
        if self.distribution == "uniform":
            return _uniform(u, v, self.mean_steps, self.last)
        if self.hazard <= 0:
            return torch.full_like(key, self.last)
        if self.hazard >= 1:
            return torch.ones_like(key)
        steps = 1 + (torch.log1p(-u) / math.log1p(-self.hazard)).floor()
        return steps.clamp(max=self.last).long()


def _hazard(mean: float, last: int) -> float:
    """Chance p of stopping at each step, such that the mean (1 - (1 - p)^last) / p is the one wanted."""
    if mean >= last:
        return 0.0
    if mean <= 1:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(100):
        p = (low + high) / 2
        got = last if p == 0 else -math.expm1(last * math.log1p(-p)) / p
        low, high = (p, high) if got > mean else (low, p)
    return (low + high) / 2


def _uniform(u: Tensor, v: Tensor, mean: float, last: int) -> Tensor:
    """Uniform on 1..n with n or n + 1 by chance, so that the mean fits; mirrored for means above the middle."""
    mirrored = mean > (1 + last) / 2
    mean = 1 + last - mean if mirrored else mean
    shortest = math.floor(2 * mean - 1)
    count = shortest + (v < 2 * mean - 1 - shortest).long()
    steps = 1 + (u * count).long()
    return 1 + last - steps if mirrored else steps


_STOP = 0x53544F50  # purpose of the draw, apart from every other use of an episode's key
