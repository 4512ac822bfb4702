"""One group of Q-learners in step: all the (arm, seed) that share shapes and code, as one batched computation.

Targets are the agents' own (agents/q_targets.py, agents/returns.py). The rule is HRM's (DESIGN, section 4) with the
continue target of bootstrap=shared_prefix: read from the segment that really comes next, with the weights of before the
step, where the episode goes on; at the budget CONTINUE earns what HALT earns (`q_targets.grounded_target`). The
released extra_forward definition looks one segment beyond the budget and is not what the exact values of DESIGN section
3 are about, so it is none of the choices here. Each update, of every slot: decide (greedy over the floor), learn, step,
then go on or draw a new puzzle. Loss: sum over rows / num_envs, 0.5 for HALT and 0.5 for CONTINUE, as in the trainer.

- replay none: the rows are the slots. fifo: they decide as ever, and num_envs rows are drawn from the last
  `replay_size` transitions, with the continue target each had when it was lived. uniform: num_envs of all M N rows,
  each with a continue target; nothing is lived, so epsilon says nothing.
- backup double: two heads (van Hasselt, 2010). Each row moves the one that a coin picks: it chooses the next action,
  the other one (its target copy where there is one) values it. They act by their mean logits.
- backup sarsa: as agents/sarsa.py, CONTINUE is learned one update late, when the action after it is known.
- backup mc, lambda: as agents/lambda_return.py, CONTINUE is learned from whole episodes where they end, with the
  weights of that moment; mc is lambda = 1.

L learners, E slots (num_envs), D width, H heads, M segments, N puzzles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents import q_targets, returns
from agents.arm import Arm
from envs.actions import CONTINUE, HALT
from hrm_rl.study.heads import TRUNK, Heads
from hrm_rl.study.slots import Fifo, Slots, uniform_of_update
from hrm_rl.study.stacked_optim import Setting, StackedOptimizer
from hrm_rl.study.trajectories import Trajectories

HALT_WEIGHT, CONTINUE_WEIGHT = 0.5, 0.5  # as released


def setting_of(arm: Arm) -> Setting:
    """How the arm is optimised."""
    return Setting(arm.optimizer, arm.lr, arm.weight_decay)


class Stack:
    """Learners that share everything `hrm_rl.study.learners.shared_by` names, those of one `setting_of` side by side.

    Attributes: parameters (name -> (L, ...)), slots, updates (done), died (L,) int64: the update at which a learner's
    logits were no longer finite, -1 where they are. Such a learner learns nothing more; no other one notices.
    """

    def __init__(self, arms: Sequence[Arm], seeds: Sequence[int], data: Trajectories, device: torch.device | str):
        arm, (self.M, self.N) = arms[0], data.correct.shape
        self.loss, self.replay, self.backup, self.num_envs = arm.loss, arm.replay, arm.backup, arm.num_envs
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)

        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(a, name) for a in arms], dtype=dtype, device=device)

        self.gamma, self.ponder_cost = column("gamma")[:, None], column("ponder_cost")[:, None]
        self.lam = torch.tensor([1.0 if a.backup == "mc" else a.lam for a in arms], device=device)
        self.heads = Heads.of(arm, data.q_token.shape[-1])
        self.table = self.heads.table(data.q_token.to(device)).flatten(0, 1).contiguous()  # (M N, D)
        self.correct = data.correct.to(device).flatten()  # (M N,)
        self.parameters = {n: p.requires_grad_() for n, p in self.heads.start(seeds, column("q_bias")).items()}
        self.optimizer = StackedOptimizer(self.parameters, [setting_of(a) for a in arms])
        self.target = _Target(arms, self.parameters)
        epsilon, per_step = column("epsilon", torch.float64), [a.exploration == "per_step" for a in arms]
        self.slots = Slots(self.seeds, self.num_envs, (self.M, self.N), epsilon, per_step)
        self.fifo = Fifo(column("replay_size", torch.int64), self.num_envs) if self.replay == "fifo" else None
        self.updates = 0
        self.died = torch.full_like(self.seeds, -1)
        self.norm_sum, self.norm_count = torch.zeros(len(seeds), device=device), 0
        self._buffers: list[Tensor] = []  # of q-tokens, used in turn: fresh pages cost more than the copy
        self._turn = 0
        self._x = self._x_before = self._read(self.slots.row)
        by_backup = {"sarsa": self._sarsa, "mc": self._episodic, "lambda": self._episodic}
        self._learn = by_backup.get(self.backup, self._live if self.replay == "none" else self._replayed)

    def update(self) -> None:
        """One optimiser step of every learner and, but for replay=uniform, one segment in each of its slots."""
        losses, q_logits = self._learn()
        finite = q_logits.detach().flatten(1).isfinite().all(1)
        self.died = torch.where((self.died < 0) & ~finite, self.updates, self.died)
        total = torch.where(self.died < 0, losses, torch.zeros_like(losses)).sum()
        gradients = torch.autograd.grad(total, list(self.parameters.values()))
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        self.norm_sum += torch.linalg.vector_norm(norms, dim=0)
        self.norm_count += 1
        self.optimizer.step(gradients)
        self.updates += 1
        self.target.follow(self.updates)

    def take_gradient_norm(self) -> Tensor:
        """(L,) mean norm of a learner's whole gradient over the updates since the last call; NaN without any."""
        mean = self.norm_sum / self.norm_count if self.norm_count else torch.full_like(self.norm_sum, torch.nan)
        self.norm_sum, self.norm_count = torch.zeros_like(self.norm_sum), 0
        return mean

    @torch.no_grad()
    def q_logits_of(self, probe: Trajectories, learners: slice) -> Tensor:
        """What some learners make of other puzzles: (l, M, N, 2) float32, by the mean logits of their heads."""
        M, N = probe.correct.shape
        table = self.heads.table(probe.q_token.to(self.table.device)).flatten(0, 1)
        parameters = {name: p[learners] for name, p in self.parameters.items()}
        count = len(parameters["out.bias"])
        if self.heads.hidden:  # (l, M N, H W) hidden units do not fit into memory for many learners at once
            rows = [self.heads.q_logits({n: p[i : i + 1] for n, p in parameters.items()}, table[None])
                    for i in range(count)]  # fmt: skip
            q_logits = torch.cat(rows)
        else:
            q_logits = self.heads.q_logits(parameters, table.expand(count, -1, -1))
        return q_logits.mean(2).view(count, M, N, 2)

    # --- one update's loss, each by its own rule: (losses (L,), the q_logits that carry gradient) ----------------

    def _live(self) -> tuple[Tensor, Tensor]:
        """max and double on the slots' present transitions."""
        q_logits = self._q_logits(self._x)
        row, ended, at_limit = self._decide(q_logits)
        self._go_on(ended)
        return self._bootstrapped(q_logits, self._x, row, ~ended, at_limit), q_logits

    def _replayed(self) -> tuple[Tensor, Tensor]:
        """max and double on transitions that are drawn."""
        u = uniform_of_update(self.seeds, self.updates, self.num_envs)
        if self.fifo is not None:
            with torch.no_grad():
                row, ended, _ = self._decide(self._q_logits(self._x))
            self._go_on(ended)
            self.fifo.add(row, ~ended)
            row, continued = self.fifo.draw(u)
        else:
            row = (u * (self.M * self.N)).long()
            continued = row < (self.M - 1) * self.N
        at_limit = row >= (self.M - 1) * self.N
        q_logits = self._q_logits(self._read(row))
        x_next = self._read(torch.where(at_limit, row, row + self.N))
        return self._bootstrapped(q_logits, x_next, row, continued, at_limit), q_logits

    def _sarsa(self) -> tuple[Tensor, Tensor]:
        """HALT and, at the budget, CONTINUE of the present step; CONTINUE of the step before."""
        q_logits, before = self._q_logits(self._x), self._q_logits(self._x_before)
        goes_on = self.slots.steps > 1
        row, ended, at_limit = self._decide(q_logits)
        with torch.no_grad():
            valued = self.target.q_logits(self.heads, self._x, q_logits.detach())[:, :, 0]
        actions = torch.where(ended, HALT, CONTINUE)
        late = returns.sarsa_target(valued, actions, self.gamma, self.ponder_cost, self.loss)
        self._go_on(ended)
        halt = q_targets.halt_target(self.correct[row])
        now = self._sum(q_logits[:, :, 0], torch.stack((halt, halt), -1), at_limit)
        each = q_targets.element_losses(before[:, :, 0, CONTINUE], late, self.loss) * goes_on
        return now + CONTINUE_WEIGHT * each.sum(1) / self.num_envs, q_logits

    def _episodic(self) -> tuple[Tensor, Tensor]:
        """HALT of the present step; CONTINUE of all steps of the episodes that end here.

        Waits for the device twice: for the number of episodes that end and for the length of the longest.
        """
        q_logits, steps, puzzle = self._q_logits(self._x), self.slots.steps, self.slots.puzzle
        row, ended, _ = self._decide(q_logits)
        self._go_on(ended)
        halt = q_targets.halt_target(self.correct[row])
        losses = self._sum(q_logits[:, :, 0], torch.stack((halt, halt), -1), torch.zeros_like(ended))
        most = int(ended.sum(1).amax())
        if most == 0:
            return losses, q_logits
        L, slot = len(self.seeds), ended.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        done, steps, puzzle = (part.gather(1, slot)[..., None] for part in (ended, steps, puzzle))  # (L, most, 1)
        column = torch.arange(int((steps * done).amax()), device=row.device)  # segment column + 1
        rows = column * self.N + puzzle  # (L, most, longest)
        x = self.table[rows.flatten(1)]
        lived = self._q_logits(x)
        with torch.no_grad():
            valued = self.target.q_logits(self.heads, x, lived.detach())[:, :, 0]
            best = q_targets.q_values(valued, self.loss).amax(-1).view(rows.shape)
            best = torch.cat((best[..., 1:], torch.zeros_like(best[..., :1])), -1)  # of the step after
            now, ran = column + 1 == steps, column + 1 <= steps
            rewards = torch.where(now, self.correct[rows].float(), -self.ponder_cost[..., None])
            lam, gamma = (value.view(L, 1).expand(L, most).flatten() for value in (self.lam, self.gamma))
            target = returns.lambda_returns(
                rewards.flatten(0, 1), best.flatten(0, 1), now.flatten(0, 1), lam, gamma
            ).view(rows.shape)  # fmt: skip
            learned = ran & (~now | (steps >= self.M)) & done
        each = q_targets.element_losses(lived[:, :, 0, CONTINUE].view(rows.shape), target, self.loss) * learned
        return losses + CONTINUE_WEIGHT * each.sum((1, 2)) / self.num_envs, q_logits

    # --- parts -----------------------------------------------------------------------------------------------

    def _q_logits(self, x: Tensor) -> Tensor:
        return self.heads.q_logits(self.parameters, x)

    def _read(self, row: Tensor) -> Tensor:
        """row (L, E) -> q-tokens (L, E, D), valid until the third call from here."""
        if len(self._buffers) <= self._turn:
            self._buffers.append(self.table.new_empty(row.numel(), self.table.shape[1]))
        found = torch.index_select(self.table, 0, row.flatten(), out=self._buffers[self._turn])
        self._turn = (self._turn + 1) % 4
        return found.view(*row.shape, -1)

    def _decide(self, q_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, ended, at_limit) of the slots as they stand, (L, E) each. q_logits (L, E, H, 2)."""
        row, at_limit = self.slots.row, self.slots.steps >= self.M
        return row, self.slots.ends(q_logits.detach().mean(2)), at_limit

    def _go_on(self, ended: Tensor) -> None:
        self.slots.move(ended)
        self._x_before, self._x = self._x, self._read(self.slots.row)

    def _bootstrapped(self, q_logits: Tensor, x_next: Tensor, row: Tensor, continued: Tensor, at_limit: Tensor):
        """Losses (L,) of transitions: q_logits (L, E, H, 2) with gradient, x_next (L, E, D), all else (L, E)."""
        is_correct, double, chosen_by = self.correct[row], self.backup == "double", None
        with torch.no_grad():
            today = self._q_logits(x_next) if double or not self.target.held else None
            valued = self.target.q_logits(self.heads, x_next, today)
        if double:
            second = uniform_of_update(self.seeds, self.updates, self.num_envs, coin=True) < 0.5
            learner, chosen_by, valued = _head(q_logits, second), _head(today, second), _head(valued, ~second)
        else:
            learner, valued = q_logits[:, :, 0], valued[:, :, 0]
        cont = q_targets.continue_target(valued, at_limit, self.gamma, self.ponder_cost, chosen_by, self.loss)
        cont = q_targets.grounded_target(cont, is_correct, at_limit)
        has_continue = q_targets.continue_mask("shared_prefix", continued, at_limit)
        return self._sum(learner, torch.stack((q_targets.halt_target(is_correct), cont), -1), has_continue)

    def _sum(self, q_logits: Tensor, targets: Tensor, has_continue: Tensor) -> Tensor:
        """q_logits, targets (L, E, 2), has_continue (L, E) -> losses (L,)."""
        each = q_targets.element_losses(q_logits, targets, self.loss)
        halt, cont = each.unbind(-1)
        return (HALT_WEIGHT * halt.sum(1) + CONTINUE_WEIGHT * (cont * has_continue).sum(1)) / self.num_envs


def _head(q_logits: Tensor, second: Tensor) -> Tensor:
    """One of two heads for each row: (L, E, 2, 2), (L, E) bool -> (L, E, 2)."""
    return torch.where(second[..., None], q_logits[:, :, 1], q_logits[:, :, 0])


class _Target:
    """The weights that value the next segment. `held` is empty where they are today's.

    Polyak: held <- held + tau (today's - held) after every update. hard, last_layer: a copy after every `period`
    updates; last_layer copies the last linear layer alone.
    """

    def __init__(self, arms: Sequence[Arm], parameters: dict[str, Tensor]):
        self.kind, self.today = arms[0].target, parameters
        last_alone = self.kind == "last_layer"
        names = [] if self.kind == "none" else [n for n in parameters if not (last_alone and n in TRUNK)]
        self.held = {name: parameters[name].detach().clone() for name in names}
        device = parameters["out.bias"].device
        self.tau = torch.tensor([a.tau for a in arms], device=device)
        self.periods = [a.period for a in arms]
        self.period = torch.tensor(self.periods, device=device)

    @torch.no_grad()
    def q_logits(self, heads: Heads, x: Tensor, today: Tensor | None) -> Tensor:
        """(L, E, H, 2) of x (L, E, D); `today` are those of today's weights, which serve where nothing is held."""
        return heads.q_logits({**self.today, **self.held}, x) if self.held else today

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """After update number `updates`, counted from 1."""
        if self.kind in ("none", "polyak"):
            share = self.tau
        elif any(updates % period == 0 for period in set(self.periods)):
            share = (updates % self.period == 0).float()
        else:
            return
        for name, held in self.held.items():
            held.lerp_(self.today[name], share.view(-1, *(1,) * (held.ndim - 1)))
