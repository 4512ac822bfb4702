"""HRM's exploration: a floor under the number of steps, drawn from the episode's key."""

from __future__ import annotations

import torch
from torch import Tensor

from agents import q_targets
from hrm_rl import rng


def floor(key: Tensor, steps: Tensor, max_steps: int, epsilon: float, per_step: bool) -> Tensor:
    """M_min of every slot, (B,) int64: fixed by the episode's key (B,), and by the step (B,) where drawn anew there.

    1 but with probability epsilon, then uniform in {2..max_steps}.
    """
    if max_steps < 2:
        return torch.ones_like(steps)
    key = rng.fold(key, _EXPLORE)
    if per_step:
        key = rng.fold(key, steps)
    u, v = rng.uniform(key, 2).unbind(dim=-1)
    return q_targets.min_steps(u, 2 + (v * (max_steps - 1)).long(), epsilon)


_EXPLORE = 0x45585031  # purpose of the exploration draws, apart from every other use of an episode's key
