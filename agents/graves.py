"""ACT: halt once the halting probabilities given out so far add up to one.

Source: Graves, arXiv:1603.08983, section 2, equations 5 to 9: h_m = sigmoid(head(z_H)), N = the first step with
sum h >= 1 - epsilon, weights p_m = h_m before N and the remainder R at N, ponder cost tau (N + R). Departures:
- the answer is that of segment N, not the mean of all answers weighted by p_m; so it is the losses that are
  averaged, sum_m p_m L_m, and the core keeps HRM's deep supervision of every segment;
- L_m is the supervised loss, or whether the answer is wrong (`learn_from`; the latter on a frozen core);
- the bias starts below 0, not at 1: a core of segments needs some of them before it is right at all;
- N alone depends on nothing with gradient, as published; h_N does not either, and since z_H is detached between
  segments, the loss does not reach the core.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from agents import halting_distributions as distributions
from agents.base import AgentLoss, Transition, View
from agents.episode import halting_losses, remember
from agents.halt_logit import HaltLogitAgent
from hrm_rl.errors import UserError


class GravesAgent(HaltLogitAgent):
    """Halts where the accumulated halting probability reaches 1 - epsilon.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        tau: Ponder cost of a step, in the unit of the loss L_m.
        epsilon: How much may be missing to 1, so that one step can be enough.
        learn_from: supervised (the core's loss on each puzzle, where the core is trained) or error (1 where the answer
            is wrong).
        bias: Where the halting logit starts.
    """

    strict = False

    def __init__(
        self, core: nn.Module, max_steps: int, tau: float = 0.01, epsilon: float = 0.01,
        learn_from: Literal["supervised", "error"] = "supervised", bias: float = -2.0,
    ):  # fmt: skip
        if not 0 < epsilon < 1:
            raise UserError(f"agent.epsilon must be between 0 and 1, ends left out, not {epsilon}")
        if not tau >= 0:
            raise UserError(f"agent.tau must be at least 0, not {tau}")
        super().__init__(core, max_steps, bias, 1 - epsilon)
        self.tau, self.learn_from = tau, learn_from

    def score(self, view: View) -> Tensor:
        total = self.recall("accumulated", view, 0.0) + self.halt_logits(view.z_H).sigmoid()
        self.keep("accumulated", total)
        return total

    def loss(self, transition: Transition) -> AgentLoss:
        episode = remember(self, transition, halting_losses(transition, self.learn_from))
        act = distributions.act_distribution(self.halt_logits(episode.z_H), episode.ran)
        count = len(episode.done)
        task = ((act.p * episode.losses).sum(1) * episode.done).sum() / count
        ponder = (act.ponder * episode.done).sum() / count
        return AgentLoss(task + self.tau * ponder, {"task": task, "ponder": ponder})
