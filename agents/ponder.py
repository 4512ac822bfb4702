"""PonderNet: a distribution over the step to halt at, trained on the expected loss and held near a prior.

Source: PonderNet, arXiv:2107.05407, section 2: hazard lambda_m, p_m = lambda_m prod_{j<m} (1 - lambda_j), loss
sum_m p_m L_m + beta KL(p || truncated geometric). The uniform prior is Ouro's (arXiv:2510.25741), the deterministic
rule (halt where the CDF passes a threshold) PALBERT's Q-exit (arXiv:2204.03276). Departures:
- the core keeps HRM's deep supervision (each segment's loss with weight 1, not p_m), and p is trained on the losses
  kept: z_H is detached between segments, and the last hazard has no say in p, so this loss does not reach the core;
- L_m is the supervised loss, or whether the answer is wrong (`learn_from`; the latter on a frozen core);
- the prior stands over all of 1..max_steps, also where a row was unrolled for fewer steps.
In training an episode goes on until all but `rest` of the probability is given out, as published.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from agents import halting_distributions as distributions
from agents.base import AgentLoss, Transition, View
from agents.checks import check_score
from agents.episode import halting_losses, remember
from agents.halt_logit import HaltLogitAgent
from envs.actions import CONTINUE, HALT
from hrm_rl import rng
from hrm_rl.errors import UserError


class PonderAgent(HaltLogitAgent):
    """Halts at a step drawn from p, or where the CDF of p passes a threshold.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        prior: geometric (truncated at max_steps) or uniform.
        prior_lambda: Hazard of the geometric prior.
        beta: Weight of the KL divergence, in the unit of the loss L_m.
        rule: At evaluation: sample (one draw an episode, fixed by its key: halts at m with probability p_m) or cdf.
        threshold: Halt where the CDF (sample: the CDF minus the draw) is larger; None is 0.5 for cdf and 0 for sample.
        rest: Probability that training leaves to the last step it unrolls; 0 unrolls all of them.
        learn_from: supervised (the core's loss on each puzzle, where the core is trained) or error (1 where the answer
            is wrong).
        bias: Where the logit of the hazard starts.
    """

    def __init__(
        self, core: nn.Module, max_steps: int, prior: Literal["geometric", "uniform"] = "geometric",
        prior_lambda: float = 0.2, beta: float = 0.01, rule: Literal["sample", "cdf"] = "sample",
        threshold: float | None = None, rest: float = 0.05, learn_from: Literal["supervised", "error"] = "supervised",
        bias: float = -2.0,
    ):  # fmt: skip
        if prior not in ("geometric", "uniform") or rule not in ("sample", "cdf"):
            raise UserError(f"agent.prior must be geometric or uniform, agent.rule sample or cdf: not {prior}, {rule}")
        if not (0 < prior_lambda < 1 and 0 <= rest < 1):
            raise UserError(f"agent.prior_lambda and agent.rest must lie within 0 and 1, not {prior_lambda} and {rest}")
        if not beta >= 0:
            raise UserError(f"agent.beta must be at least 0, not {beta}")
        usual = 0.5 if rule == "cdf" else 0.0
        super().__init__(core, max_steps, bias, usual if threshold is None else threshold)
        self.prior, self.prior_lambda, self.beta = prior, prior_lambda, beta
        self.sampled, self.rest, self.learn_from = rule == "sample", rest, learn_from

    def _cdf(self, view: View) -> Tensor:
        """(B,) float32, sum of p up to this step; remembers what is left."""
        left = self.recall("left", view, 1.0) * (-self.halt_logits(view.z_H)).sigmoid()
        self.keep("left", left)
        return 1 - left

    def _draw(self, view: View) -> Tensor:
        return rng.uniform(rng.fold(view.key, _HALT_AT), 1)[:, 0].float()

    def score(self, view: View) -> Tensor:
        return self._cdf(view) - self._draw(view) if self.sampled else self._cdf(view)

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        self.last_score = check_score(view, self.score(view))
        if not explore:
            return torch.where(self.halts(view, self.last_score), HALT, CONTINUE)
        unrolled = (self.memory["left"] < self.rest) | (view.steps >= self.max_steps)
        return torch.where(unrolled, HALT, CONTINUE)

    def loss(self, transition: Transition) -> AgentLoss:
        episode = remember(self, transition, halting_losses(transition, self.learn_from))
        p = distributions.ponder_distribution(self.halt_logits(episode.z_H), episode.ran)
        prior = distributions.log_prior(self.prior, self.max_steps, self.prior_lambda, episode.ran.device)
        count = len(episode.done)
        task = ((p.p * episode.losses).sum(1) * episode.done).sum() / count
        kl = (distributions.kl_to_prior(p, prior) * episode.done).sum() / count
        return AgentLoss(task + self.beta * kl, {"task": task, "kl": kl})


_HALT_AT = 0x504F4E44  # purpose of the draw, apart from every other use of an episode's key
