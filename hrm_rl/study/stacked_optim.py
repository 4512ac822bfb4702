"""Optimisers over a stack of learners: kept libraries' own, each with the settings of its learners.

They work element by element, so learners that share (optimizer, lr, weight_decay) are one slice of every parameter and
one param group. Constants are those of the trainer (hrm_rl.config.OptimConfig): betas (0.9, 0.95), eps 1e-8.

- adamw       torch.optim.AdamW: w <- (1 - lr wd) w - lr m / (sqrt(v) + eps)
- adam        torch.optim.Adam: wd w is added to the gradient, before the moments
- sgd         torch.optim.SGD without momentum: w <- w - lr (g + wd w)
- adam_atan2  adam_atan2_pytorch.AdamAtan2 (arXiv:2407.05872) with a = b = 1 (the library's own a is 1.27):
              w <- (1 - lr wd) w - lr a atan2(m, b sqrt(v)), so a step is never longer than lr a pi / 2 and, with
              wd > 0, |w| stays under a pi / (2 wd) once it is there (m, v with their bias corrections throughout)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hrm_rl.config import OptimConfig
from hrm_rl.errors import UserError

ATAN2_A, ATAN2_B = 1.0, 1.0


class Setting(NamedTuple):
    """How a learner is optimised; learners of a stack are sorted by it."""

    optimizer: str
    lr: float
    weight_decay: float


class StackedOptimizer:
    """Moves parameters (L, ...) in place. Learners with the same setting must stand side by side."""

    def __init__(self, parameters: Mapping[str, Tensor], settings: Sequence[Setting]):
        self.slices: list[tuple[nn.Parameter, int, int, int]] = []  # (part, number of its parameter, from, to)
        groups: dict[str, list[dict]] = {}
        first = 0
        for setting, same in groupby(settings):
            last = first + len(list(same))
            parts = [nn.Parameter(whole.detach()[first:last]) for whole in parameters.values()]  # shares the memory
            self.slices += [(part, number, first, last) for number, part in enumerate(parts)]
            group = {"params": parts, "lr": setting.lr, "weight_decay": setting.weight_decay}
            groups.setdefault(setting.optimizer, []).append(group)
            first = last
        self.optimizers = [_make(name, held) for name, held in groups.items()]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """gradients: of the parameters, in their order."""
        for part, number, first, last in self.slices:
            part.grad = gradients[number][first:last]
        for optimizer in self.optimizers:
            optimizer.step()


def _make(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    constants = OptimConfig()
    betas = (constants.beta1, constants.beta2)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda") or None
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, eps=constants.eps, fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, betas=betas, eps=constants.eps, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, fused=fused)
    try:
        from adam_atan2_pytorch import AdamAtan2
    except ImportError as error:
        raise UserError(
            f"optimizer adam_atan2 needs adam-atan2-pytorch ({error}); pip install adam-atan2-pytorch"
        ) from error
    return AdamAtan2(groups, betas=betas, a=ATAN2_A, b=ATAN2_B)
