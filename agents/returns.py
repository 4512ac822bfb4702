"""Returns of whole episodes as targets of CONTINUE: pure functions of tensors, without gradient.

Rows are slots, columns steps: a rollout (B, L) may hold the end of one episode and the start of the next. Values
are those of `q_targets.q_values`; gamma = 1 unless said.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agents.q_targets import Loss, q_values
from envs.actions import HALT


def lambda_returns(
    rewards: Tensor, next_values: Tensor, ended: Tensor, lam: float | Tensor, gamma: float | Tensor = 1.0
) -> Tensor:
    """Q(lambda) returns, PQN (arXiv:2407.04811), section 3 ("R^lambda_t"); lam = 1 is Monte-Carlo.

        G_t = r_t + gamma * [not ended_t] * (lam * G_{t+1} + (1 - lam) * max_a Q(s_{t+1}, a))

    rewards, next_values (B, L) float32 (next_values[:, t] is the greedy value of step t + 1), ended (B, L) bool.
    lam and gamma: numbers, or (B,). Nothing is read across an episode's end; a row that is cut off in mid-episode takes
    its last next value whole. Returns (B, L) without gradient.
    """
    rewards, next_values = rewards.detach().float(), next_values.detach().float()
    later, returns = next_values[:, -1], []
    for t in range(rewards.shape[1] - 1, -1, -1):
        ahead = lam * later + (1 - lam) * next_values[:, t]
        later = rewards[:, t] + gamma * torch.where(ended[:, t], torch.zeros_like(ahead), ahead)
        returns.append(later)
    return torch.stack(returns[::-1], dim=1)


def greedy_next_values(q_logits: Tensor, loss: Loss = "bce") -> Tensor:
    """max_a Q of the step after, q_logits (B, L, 2) -> (B, L) without gradient; the last column holds 0."""
    values = q_values(q_logits.detach(), loss).amax(dim=-1)
    return torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)


def sarsa_target(
    next_q_logits: Tensor, next_actions: Tensor, gamma: float | Tensor = 1.0, ponder_cost: float | Tensor = 0.0,
    loss: Loss = "bce",
) -> Tensor:  # fmt: skip
    """-ponder_cost + gamma * value of the action really taken next: q_logits (..., 2), actions (...) -> (...).

    Without gradient. Source: Sutton & Barto, Reinforcement Learning (2018), section 6.4, equation 6.7.
    """
    q_halt, q_continue = q_values(next_q_logits.detach(), loss).unbind(dim=-1)
    return gamma * torch.where(next_actions == HALT, q_halt, q_continue) - ponder_cost
