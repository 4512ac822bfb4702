"""Distributions over the step to halt at, and losses on them: pure functions of tensors.

B slots, M steps; column m - 1 is step m. `ran` (B, M) bool marks steps 1..N of each row, `halt_logits` (B, M) the
logit of halting at a step given that it was reached (the hazard lambda_m). Columns that have not run hold 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def last_of(ran: Tensor) -> Tensor:
    """(B, M) bool, step N of each row."""
    after = torch.cat((ran[:, 1:], torch.zeros_like(ran[:, :1])), dim=1)
    return ran & ~after


def log_reached(halt_logits: Tensor, ran: Tensor) -> Tensor:
    """log prod_{j < m} (1 - lambda_j), the log-probability that step m is reached; (B, M)."""
    stays = torch.where(ran, F.logsigmoid(-halt_logits), torch.zeros_like(halt_logits))
    return stays.cumsum(dim=1) - stays


class HaltingDistribution(NamedTuple):
    """Both (B, M): p_m sums to 1 over the steps that ran and is 0 elsewhere; log_p holds 0 there."""

    p: Tensor
    log_p: Tensor


def ponder_distribution(halt_logits: Tensor, ran: Tensor) -> HaltingDistribution:
    """p_m = lambda_m prod_{j < m} (1 - lambda_j), PonderNet (arXiv:2107.05407), section 2.1, equation 2.

    What is left at the last step goes to it, as in section 2.2 (N steps unrolled).
    """
    reached = log_reached(halt_logits, ran)
    log_p = torch.where(last_of(ran), reached, reached + F.logsigmoid(halt_logits))
    log_p = torch.where(ran, log_p, torch.zeros_like(log_p))
    return HaltingDistribution(torch.where(ran, log_p.exp(), torch.zeros_like(log_p)), log_p)


def log_prior(kind: str, count: int, hazard: float, device: torch.device | str = "cpu") -> Tensor:
    """log of the prior over steps 1..count, (count,) float32, summing to 1.

    kind "geometric": (1 - hazard)^(m - 1), truncated and scaled (PonderNet, section 2.2); "uniform": 1 / count
    (Ouro, arXiv:2510.25741). Raises ValueError for another kind.
    """
    if kind == "uniform":
        logits = torch.zeros(count, device=device)
    elif kind == "geometric":
        logits = torch.arange(count, device=device) * torch.log1p(torch.full((), -hazard, device=device))
    else:
        raise ValueError(f"unknown prior {kind!r}; choose geometric or uniform")
    return F.log_softmax(logits.float(), dim=0)


def kl_to_prior(distribution: HaltingDistribution, log_prior: Tensor) -> Tensor:
    """KL(p || prior) in nats, (B,); log_prior (M,)."""
    return (distribution.p * (distribution.log_p - log_prior)).sum(dim=1)


class ACTDistribution(NamedTuple):
    """Graves's halting weights and what he charges for them."""

    p: Tensor  # (B, M): h_m before the last step, the remainder there, 0 elsewhere
    ponder: Tensor  # (B,) N + R; its gradient is that of R


def act_distribution(halt_logits: Tensor, ran: Tensor) -> ACTDistribution:
    """Halting weights and ponder time of ACT, Graves (arXiv:1603.08983), section 2, equations 5 to 8.

    p_m = h_m for m < N, p_N = R = 1 - sum_{m < N} h_m, rho = N + R. The weights have moved since the steps were
    taken, so that the sum may now pass 1: R is held at 0 there.
    """
    last = last_of(ran)
    before = torch.where(ran & ~last, halt_logits.sigmoid(), torch.zeros_like(halt_logits))
    remainder = (1 - before.sum(dim=1)).clamp(min=0)
    p = torch.where(last, remainder[:, None], before)
    return ACTDistribution(p, ran.sum(dim=1).float() + remainder)


def log_policy(halt_logits: Tensor, ran: Tensor, forced: Tensor) -> Tensor:
    """log-probability of CONTINUE in steps 1..N - 1 and HALT in step N, (B,).

    forced (B,) bool: the budget ended the episode, which was nobody's decision.
    """
    last = last_of(ran)
    steps = torch.where(last, F.logsigmoid(halt_logits), F.logsigmoid(-halt_logits))
    return torch.where(ran & ~(last & forced[:, None]), steps, torch.zeros_like(steps)).sum(dim=1)


def entropy(halt_logits: Tensor, ran: Tensor) -> Tensor:
    """Entropy of the decisions in nats, summed over the steps that ran, (B,)."""
    each = F.softplus(halt_logits) - halt_logits * halt_logits.sigmoid()
    return torch.where(ran, each, torch.zeros_like(each)).sum(dim=1)


def reinforce_loss(log_policy: Tensor, returns: Tensor, baseline: Tensor) -> Tensor:
    """- log pi(episode) * (R - b), (B,): its gradient is that of the expected return, negated.

    Source: Williams (1992); ReasoNet (arXiv:1609.05284), section 3.3. returns, baseline (B,) are taken as they are,
    without gradient.
    """
    return -log_policy * (returns - baseline).detach()


def all_episodes_loss(distribution: HaltingDistribution, rewards: Tensor) -> Tensor:
    """REINFORCE summed over every place to halt, with the instance's own baseline, (B,).

        - sum_m p_m log p_m (r_m - b),  b = sum_m p_m r_m,  p_m and b held fixed

    Source: ReasoNet (arXiv:1609.05284), section 3.3 (sum over all episodes, instance-dependent baseline).
    rewards (B, M).
    """
    p, rewards = distribution.p.detach(), rewards.detach()
    baseline = (p * rewards).sum(dim=1, keepdim=True)
    return -(p * distribution.log_p * (rewards - baseline)).sum(dim=1)
