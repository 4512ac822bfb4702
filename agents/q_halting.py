"""HRM's own halting agent: Q-learning without target network and replay.

Source: HRM, arXiv:2506.21734, section 2.2, and the released code. Departures, each on purpose:
- a padded slot trains nothing (`valid`), where the release counts it as a right answer;
- evaluation halts (the release runs every puzzle to max_steps);
- the exploration floor can be drawn once an episode (the paper) or at every step (the release, the default);
- at the budget, CONTINUE earns what HALT earns and is trained on that in the modes that do not look ahead of
  it (`q_targets.grounded_target`);
- four ways to get the bootstrap value (`q_targets`), where the release has `extra_forward` alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from agents import exploration as floors
from agents import q_targets
from agents.base import HaltingAgent, Transition, View
from agents.checks import check_score
from envs.actions import CONTINUE, HALT
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError


class QHaltingAgent(HaltingAgent):
    """Wraps the core, owns the Q-head, halts where q_halt > q_continue.

    Args:
        core: The recurrent core; read for its hidden size and for `extra_forward` targets.
        max_steps: The budget of the episodes.
        bootstrap: Where the continue target comes from (`agents.q_targets`).
        epsilon: Probability that the exploration floor M_min is drawn from {2..max_steps} instead of 1.
        exploration: Draw the floor once an episode (the paper) or at every step (the released code).
        q_bias: Where both Q-logits start.
        threshold: Halt where q_halt - q_continue (q_halt alone for bootstrap=none) is larger than this.
    """

    learns = True
    capturable = True
    strict = True

    def __init__(
        self, core: nn.Module, max_steps: int, bootstrap: q_targets.Bootstrap = "extra_forward",
        epsilon: float = 0.1, exploration: Literal["per_step", "per_episode"] = "per_step", q_bias: float = -5.0,
        threshold: float = 0.0,
    ):  # fmt: skip
        super().__init__(max_steps, threshold)
        if bootstrap not in q_targets.BOOTSTRAPS:
            raise UserError(f"bootstrap must be one of {', '.join(q_targets.BOOTSTRAPS)}, not {bootstrap!r}")
        if not 0 <= epsilon <= 1:
            raise UserError(f"agent.epsilon must be between 0 and 1, not {epsilon}")
        if exploration not in ("per_step", "per_episode"):
            raise UserError(f"agent.exploration must be per_step or per_episode, not {exploration!r}")
        object.__setattr__(self, "core", core)  # wrapped, not owned: its parameters are listed once, by the trainer
        self.q_head = QHead(core.hidden_size, q_bias)
        self.bootstrap = bootstrap
        self.epsilon = epsilon
        self.exploration = exploration

    def scores(self, z_H: Tensor) -> Tensor:
        return self.q_head(z_H)

    def rule(self, q_logits: Tensor) -> Tensor:
        """What is held against the threshold, larger = readier to halt: q_logits (B, 2) -> (B,) float32."""
        return q_targets.halt_score(q_logits, self.bootstrap)

    def score(self, view: View) -> Tensor:
        return self.rule(self.scores(view.z_H))

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        score = self.rule(self.scores(view.z_H) if q_logits is None else q_logits)
        self.last_score = check_score(view, score)
        wish = score > self.threshold if self.strict else score >= self.threshold
        floor = self._floor(view) if explore else torch.ones_like(view.steps)
        return torch.where(q_targets.halts(wish, view.steps, floor, self.max_steps), HALT, CONTINUE)

    def _floor(self, view: View) -> Tensor:
        """M_min of every slot: fixed by the episode's key, and by the step where it is drawn anew each step."""
        per_step = self.exploration == "per_step"
        return floors.floor(view.key, view.steps, self.max_steps, self.epsilon, per_step)

    def loss(self, transition: Transition) -> q_targets.QLosses:
        view, next_q_logits = transition.view, None
        if transition.next_z_H is not None:  # None: bootstrap=none, or a budget of one segment
            with torch.no_grad():
                next_q_logits = self.scores(transition.next_z_H)
        target_continue, has_continue = q_targets.one_step_targets(
            self.bootstrap, next_q_logits, transition.is_correct, view.steps >= self.max_steps, transition.ended,
            looked=transition.looked,
        )  # fmt: skip
        target_halt = q_targets.halt_target(transition.is_correct)
        return q_targets.q_losses(transition.q_logits, target_halt, target_continue, view.valid, has_continue)
