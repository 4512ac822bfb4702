"""REINFORCE: the halting decision is a Bernoulli draw, the reward comes at the end, the baseline is the puzzle's own.

Source: ReasoNet, arXiv:1609.05284, section 3.3 (termination gate, reward 1 for a right answer, instance-dependent
baseline); Williams (1992). Two ways:
- episodes=sampled: one episode a puzzle, halted where it was drawn. The baseline is learned, linear in the state after
  the puzzle's first segment (a departure: ReasoNet's needs every possible halt of the instance);
- episodes=all: as in ReasoNet, every puzzle runs to the budget and the sum is taken over every place to halt, with
  b = sum_m p_m r_m of that very puzzle; nothing is sampled and no baseline is learned.
Departures: r - b without the further division by b (its "contrastive" reward); an entropy bonus; a price `cost` of a
step, 0 unless asked for; at evaluation the gate halts where it is more likely than not, unless rule=sample.
The gradient reaches the core through the segment that ends an episode (not in episodes=all, where that is forced).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from agents import halting_distributions as distributions
from agents.base import AgentLoss, Transition, View
from agents.checks import check_score
from agents.episode import remember
from agents.halt_logit import HaltHead, HaltLogitAgent
from envs.actions import CONTINUE, HALT
from hrm_rl import rng
from hrm_rl.errors import UserError


class ReinforceAgent(HaltLogitAgent):
    """Halts where the gate says so: by a draw in training, by `rule` in evaluation.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        episodes: sampled (a learned baseline) or all (ReasoNet's sum over every place to halt).
        cost: Taken off the reward for every step after the first.
        entropy: Weight of the entropy bonus, in rewards a nat.
        rule: At evaluation: greedy (the gate's probability against `threshold`) or sample (a draw at every step).
        threshold: Halt where the probability (sample: minus the draw) is larger; None is 0.5, and 0 for sample.
        bias: Where the gate's logit starts.
    """

    def __init__(
        self, core: nn.Module, max_steps: int, episodes: Literal["sampled", "all"] = "sampled", cost: float = 0.0,
        entropy: float = 0.01, rule: Literal["greedy", "sample"] = "greedy", threshold: float | None = None,
        bias: float = -2.0,
    ):  # fmt: skip
        if episodes not in ("sampled", "all") or rule not in ("greedy", "sample"):
            said = f"not {episodes} and {rule}"
            raise UserError(f"agent.episodes must be sampled or all, agent.rule greedy or sample: {said}")
        usual = 0.5 if rule == "greedy" else 0.0
        super().__init__(core, max_steps, bias, usual if threshold is None else threshold)
        self.every_halt, self.sampled = episodes == "all", rule == "sample"
        self.cost, self.entropy = cost, entropy
        if not self.every_halt:
            self.baseline = HaltHead(core.hidden_size, 0.0)

    def _draw(self, view: View) -> Tensor:
        return rng.uniform(rng.fold(rng.fold(view.key, _GATE), view.steps), 1)[:, 0].float()

    def score(self, view: View) -> Tensor:
        probability = self.halt_logits(view.z_H).sigmoid()
        return probability - self._draw(view) if self.sampled else probability

    @torch.no_grad()
    def act(self, view: View, q_logits: Tensor | None = None, explore: bool = False) -> Tensor:
        self.last_score = check_score(view, self.score(view))
        halts = self.halts(view, self.last_score)
        if explore:
            drawn = self._draw(view) < self.halt_logits(view.z_H).sigmoid()
            halts = (drawn & (not self.every_halt)) | (view.steps >= self.max_steps)
        return torch.where(halts, HALT, CONTINUE)

    def loss(self, transition: Transition) -> AgentLoss:
        view, episode = transition.view, remember(self, transition)
        halt_logits = self.halt_logits(episode.z_H)
        column = torch.arange(self.max_steps, device=view.steps.device)
        rewards = episode.is_correct - self.cost * column
        if self.every_halt:
            p = distributions.ponder_distribution(halt_logits, episode.ran)
            policy, fit = distributions.all_episodes_loss(p, rewards), torch.zeros_like(halt_logits[:, 0])
        else:
            earned = (rewards * episode.now).sum(1)
            baseline = self.baseline(episode.z_H[:, 0].detach())
            log_policy = distributions.log_policy(halt_logits, episode.ran, view.steps >= self.max_steps)
            policy = distributions.reinforce_loss(log_policy, earned, baseline)
            fit = (baseline - earned) ** 2 / 2
        bonus = distributions.entropy(halt_logits, episode.ran)
        parts = {
            name: (value * episode.done).sum() / len(episode.done)
            for name, value in (("policy", policy), ("baseline", fit), ("entropy", bonus))
        }
        return AgentLoss(parts["policy"] + parts["baseline"] - self.entropy * parts["entropy"], parts)


_GATE = 0x47415445  # purpose of the draws, apart from every other use of an episode's key
