"""One whole episode at its end: what learners of returns and of halting distributions keep, slot by slot.

z_H is detached between segments and the weights move with every update, so the head's inputs are kept, not its
outputs, and the head runs over all of them once the episode has ended. B slots, M = max_steps, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from agents.base import HaltingAgent, Transition


class Episode(NamedTuple):
    """The steps so far of the episode in every slot; column m - 1 is segment m, columns to come hold 0."""

    z_H: Tensor  # (B, M, 1, D) float32, first position of z_H; gradient in the segment in work alone
    is_correct: Tensor  # (B, M) float32, 1 where the answer was right
    losses: Tensor  # (B, M) float32, what halting there costs: supervised loss or error, no gradient
    ran: Tensor  # (B, M) bool, segments that have run
    now: Tensor  # (B, M) bool, the segment in work
    done: Tensor  # (B,) bool, the episode ended with it (padded slots: never)


def remember(agent: HaltingAgent, transition: Transition, losses: Tensor | None = None) -> Episode:
    """Add this step to what `agent` keeps of each slot's episode; call it once in every `loss`.

    losses (B,): what halting here costs; None keeps nothing and leaves zeros.
    """
    view = transition.view
    B, M = view.steps.shape[0], agent.max_steps
    column = torch.arange(1, M + 1, device=view.steps.device)
    now = view.steps[:, None] == column

    def filled(name: str, value: Tensor) -> Tensor:
        fresh = torch.zeros(B, M, *value.shape[1:], dtype=value.dtype, device=value.device)
        held = agent.recall(name, view, fresh)
        row = torch.where(now.view(B, M, *(1 for _ in value.shape[1:])), value[:, None], held)
        agent.keep(name, row)
        return row

    is_correct = filled("is_correct", transition.is_correct.float())
    return Episode(
        z_H=filled("z_H", view.z_H[:, :1].float()),
        is_correct=is_correct,
        losses=torch.zeros_like(is_correct) if losses is None else filled("losses", losses.detach().float()),
        ran=column <= view.steps[:, None],
        now=now,
        done=transition.ended & view.valid,
    )


def halting_losses(transition: Transition, learn_from: str) -> Tensor:
    """What halting here costs, (B,) without gradient: the supervised loss, or 1 where the answer is wrong, else 0.

    learn_from: "supervised" (the error where the run has no supervised loss: a frozen core) or "error".
    """
    if learn_from == "supervised" and transition.supervised is not None:
        return transition.supervised
    return 1 - transition.is_correct.float()
