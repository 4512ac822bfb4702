"""Easier puzzles from harder ones: show more cells of the answer. A unique puzzle stays unique.

A range of givens that falls over training makes a curriculum. B puzzles, S cells; tensor operations only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hrm_rl import rng

BLANK = 1


def reveal(
    key: Tensor, questions: Tensor, answers: Tensor, low: Tensor, high: Tensor, blank: int = BLANK
) -> Tensor:
    """Fill random blanks of `questions` with the answer until each has as many givens as drawn from [low, high].

    key (B,) int64 (hrm_rl/rng.py); questions, answers (B, S) int64 tokens; low, high scalar tensors; blank the
    token of a cell that is not given. A puzzle that has more givens already stays as it is. Returns (B, S) int64.
    """
    given = questions != blank
    drawn = rng.uniform(key, questions.shape[1] + 1)
    wanted = low + (drawn[:, 0] * (high - low + 1)).long()
    order = drawn[:, 1:].masked_fill(given, 2.0).argsort(dim=-1).argsort(dim=-1)  # givens come last
    return torch.where(order < (wanted - given.sum(-1))[:, None], answers, questions)
