"""Returns of whole episodes as targets of CONTINUE: pure functions of tensors, without gradient.

Rows are slots, columns steps: a rollout (B, L) may hold the end of one episode and the start of the next. Values
are probabilities of reward (sigmoid of logits), gamma = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from envs.actions import HALT


def lambda_returns(rewards: Tensor, next_values: Tensor, ended: Tensor, lam: float) -> Tensor:
    """Q(lambda) returns, PQN (arXiv:2407.04811), section 3 ("R^lambda_t"); lam = 1 is Monte-Carlo.

        G_t = r_t + [not ended_t] * (lam * G_{t+1} + (1 - lam) * max_a Q(s_{t+1}, a))

    rewards, next_values (B, L) float32 (next_values[:, t] is the greedy value of step t + 1), ended (B, L) bool.
    Nothing is read across an episode's end; a row that is cut off in mid-episode takes its last next value whole.
    Returns (B, L) without gradient.
    """
    rewards, next_values = rewards.detach().float(), next_values.detach().float()
    later, returns = next_values[:, -1], []
    for t in range(rewards.shape[1] - 1, -1, -1):
        ahead = lam * later + (1 - lam) * next_values[:, t]
        later = rewards[:, t] + torch.where(ended[:, t], torch.zeros_like(ahead), ahead)
        returns.append(later)
    return torch.stack(returns[::-1], dim=1)


def greedy_next_values(q_logits: Tensor) -> Tensor:
    """max_a Q of the step after, q_logits (B, L, 2) -> (B, L) without gradient; the last column holds 0."""
    values = q_logits.detach().float().sigmoid().amax(dim=-1)
    return torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)


def sarsa_target(next_q_logits: Tensor, next_actions: Tensor) -> Tensor:
    """Value of the action that was really taken next: q_logits (B, 2), actions (B,) -> (B,) without gradient.

    Source: Sutton & Barto, Reinforcement Learning (2018), section 6.4, equation 6.7, gamma = 1, no reward between.
    """
    q_halt, q_continue = next_q_logits.detach().float().unbind(dim=-1)
    return torch.where(next_actions == HALT, q_halt, q_continue).sigmoid()
