"""What a halting agent is: it sees one batch of slots after a segment and says HALT or CONTINUE.

B slots, T = P + S positions, D hidden size, S tokens, V token values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents.q_targets import QLosses
from hrm_rl.errors import UserError


class View(NamedTuple):
    """All that an agent may look at when it decides. Never the answer."""

    z_H: Tensor  # (B, T, D) high-level state after segment m; carries gradient in training
    logits: Tensor  # (B, S, V) scores of every token value
    steps: Tensor  # (B,) int64, m: segments run in this episode
    valid: Tensor  # (B,) bool, False for a padded slot
    key: Tensor  # (B,) int64, random key of the episode (hrm_rl.rng)


class Transition(NamedTuple):
    """The one batch between rollout and learning: a decision and what came of it."""

    view: View
    q_logits: Tensor | None  # (B, 2) what the agent scored, with gradient; None for agents that do not score
    actions: Tensor  # (B,) int64, HALT or CONTINUE
    is_correct: Tensor  # (B,) bool, whether the whole answer is right at this segment
    next_z_H: Tensor | None  # (B, T, D) of the segment bootstrapped from, no gradient; None without bootstrap
    ended: Tensor  # (B,) bool, whether the episode ended here (a wish to go on past max_steps included)


class HaltingAgent(nn.Module):
    """Base of all agents, learned or not. The least an agent defines is `act`.

    A subclass may take `core`, `max_steps` and `bootstrap` in its constructor; the trainer passes those it
    names. All else in the signature is a flag of the command line (`--agent.NAME`).
    """

    #: Whether the agent learns from Q-targets (has `q_logits` and `loss`).
    learns = False

    def scores(self, z_H: Tensor) -> Tensor | None:
        """(B, T, D) -> q_logits (B, 2) in the order (HALT, CONTINUE), or None for an agent without values."""
        return None

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        """(B,) int64 of HALT and CONTINUE. `q_logits` saves a second pass where the caller has them."""
        raise UserError(f"agent {type(self).__name__} defines no act()")

    def loss(self, transition: Transition) -> QLosses:
        """Losses of a decision; only agents with `learns` have one."""
        raise UserError(f"agent {type(self).__name__} does not learn")
