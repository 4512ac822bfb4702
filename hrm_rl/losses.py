"""Supervised losses: cross entropy through stablemax or softmax, averaged as the released code does.

Letters: B puzzles, S tokens, V token values. A label of IGNORE counts nowhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def log_stablemax(logits: Tensor) -> Tensor:
    """log of s(x) / sum s(x), s(x) = x + 1 for x >= 0 and 1 / (1 - x) below; (..., V) -> (..., V) float64.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv:2501.04697; computed in
    float64 as in the released HRM code. Each branch sees only its own side of zero, so that the gradient
    of the branch not taken is never 0 * inf (it is NaN at x = 1 where both are differentiated).
    """
    wide = logits.double()
    s = torch.where(wide >= 0, wide.clamp(min=0) + 1, 1 / (1 - wide.clamp(max=0)))
    return torch.log(s / s.sum(dim=-1, keepdim=True))


def token_losses(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Cross entropy of every token, 0 where the label is IGNORE.

    logits (B, S, V), labels (B, S) int64, kind "stablemax" (float64 result) or "softmax" (float32).
    Raises ValueError for another kind.
    """
    if kind == "stablemax":
        log_probs = log_stablemax(logits)
    elif kind == "softmax":
        log_probs = F.log_softmax(logits.float(), dim=-1)
    else:
        raise ValueError(f"unknown supervised loss {kind!r}; choose stablemax or softmax")
    rows = F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return rows.view(labels.shape)


def supervised_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Mean over the supervised tokens of each puzzle, (B,): the released code's `lm_loss` before its sum."""
    count = (labels != IGNORE).sum(dim=-1).clamp(min=1)
    return token_losses(logits, labels, kind).sum(dim=-1) / count
