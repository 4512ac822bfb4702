"""Q-learning for halting with every switch of a study: target networks, replay, other backups, losses and heads.

The live counterpart of `agents.arm.Arm` for joint training, with the same names and meanings; the defaults are
HRM's rule, number for number `agents.q_halting.QHaltingAgent`. Sources: target networks and replay, DQN (Mnih et al.,
Nature 518, 2015); Polyak averages, arXiv:1509.02971, section 3; a copy of the last layer alone, iS-QL,
arXiv:2506.04398; double Q-learning, van Hasselt (NeurIPS 2010), algorithm 1; SARSA, Monte-Carlo and lambda-returns as
in `agents.sarsa` and `agents.lambda_return`.

What these switches mean for a head on a core that is trained with it:
- The target network is a copy of the head alone. The next segment comes from the core as it is (`bootstrap` says how),
  and the copy reads that; a copy of the whole core would double every segment and be another study.
- The copy moves once an update, at the start of `loss`, towards the weights that the optimiser has just left; the
  first call copies them whole. It is a set of buffers: no optimiser, no decay and no running average of the weights
  (optim.ema) touches it, and checkpoints hold it.
- With replay the whole Q-loss, that of HALT included, comes from stored q-tokens: it never reaches the core,
  whatever q_to_core says. Each slot draws one of its own last replay_size / num_envs decisions, so that an update
  learns from as many as without replay and the rings together are the FIFO. Values are those of today's head (or of
  its copy) on q-tokens of the core that was; returns are computed anew from the stored episode, and an episode that
  has not ended has none yet: HALT alone is learned there.
- Double Q-learning has two heads and acts by the mean of their logits. A coin for each slot says which head learns,
  HALT and CONTINUE alike; that head chooses the next action, the other one (or its copy) values it.
- The budget is what it is to the other agents: CONTINUE earns there what HALT earns, at no price (`q_targets`).
- Norms have no parameters, as the core's own.

All draws are made from the episode's key and step (`hrm_rl.rng`): the same for any number of ranks, and on resuming.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from agents import q_targets, replay, returns
from agents.arm import Arm
from agents.base import Transition
from agents.lambda_return import lambda_losses
from agents.q_halting import QHaltingAgent
from agents.sarsa import sarsa_losses
from hrm_rl import rng
from hrm_rl.core.layers import rms_norm, trunc_normal_
from hrm_rl.core.q_head import QHead
from hrm_rl.errors import UserError
from hrm_rl.settings import check_settings

_EPS = 1e-5  # of the norms
_COIN, _DRAW = 0x434F494E, 0x44524157  # purposes of the draws: which head learns, which decision is replayed


class FeatureHead(nn.Module):
    """A Q-head behind a norm (linear) or a hidden layer: z_H (B, T, D) -> q_logits (B, 2) float32."""

    def __init__(self, hidden_size: int, width: int | None, norm: str, bias: float):
        super().__init__()
        self.hidden = None if width is None else nn.Linear(hidden_size, width)
        if width is not None:  # as the core's own layers start, and the study's heads on recordings
            trunc_normal_(self.hidden.weight.data, hidden_size**-0.5)
            nn.init.zeros_(self.hidden.bias)
        self.norm = norm
        self.out = QHead(width or hidden_size, bias)

    def features(self, z_H: Tensor) -> Tensor:
        """(B, T, D) -> (B, F) float32, what the last linear layer reads."""
        x = z_H[:, 0].float()
        x = x if self.hidden is None else self.hidden(x)
        if self.norm == "rmsnorm":
            x = rms_norm(x, _EPS)
        elif self.norm == "layernorm":
            x = F.layer_norm(x, x.shape[-1:], eps=_EPS)
        return x if self.hidden is None else F.silu(x)

    def forward(self, z_H: Tensor) -> Tensor:
        return self.out(self.features(z_H)[:, None])


class DoubleHead(nn.Module):
    """Two heads, read as the mean of their logits: z_H (B, T, D) -> q_logits (B, 2)."""

    def __init__(self, a: nn.Module, b: nn.Module):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, z_H: Tensor) -> Tensor:
        return (self.a(z_H) + self.b(z_H)) / 2

    def one_of(self, is_a: Tensor, z_H: Tensor) -> Tensor:
        """q_logits (B, 2) of head a where `is_a` (B,), of head b elsewhere."""
        return torch.where(is_a[:, None], self.a(z_H), self.b(z_H))


def make_head(hidden_size: int, arm: Arm) -> nn.Module:
    """The head that `head`, `head_width`, `head_norm` and `backup` ask for; HRM's own `QHead` for the defaults."""

    def one() -> nn.Module:
        if arm.head == "linear" and arm.head_norm == "none":
            return QHead(hidden_size, arm.q_bias)
        return FeatureHead(hidden_size, arm.head_width if arm.head == "mlp" else None, arm.head_norm, arm.q_bias)

    return DoubleHead(one(), one()) if arm.backup == "double" else one()


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy whose weights are buffers: saved and moved with its owner, and no parameters of anyone's."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return twin


class QVariantAgent(QHaltingAgent):
    """Halts where q_halt > q_continue; learns both as the switches say. The defaults are HRM's rule.

    Args:
        core: The recurrent core.
        max_steps: The budget of the episodes.
        bootstrap: Where the next segment of max and double comes from (`agents.q_targets`); sarsa, mc and lambda read
            the episode's own later steps. With none (TRM) there is no continue loss and q_halt alone decides.
        target: Weights that value the next segment: none (today's head), polyak (a running average of it), hard (a
            copy made every `period` updates), last_layer (today's hidden layer under such a copy of the last one).
        tau: Share of today's weights that the running average takes at each update (target=polyak).
        period: Updates between two copies (target=hard, last_layer).
        replay: What an update learns from: none (the slots' present decisions) or fifo (drawn from the last
            `replay_size`; the Q-loss then never reaches the core). uniform is for studies on recordings alone.
        replay_size: Decisions kept, over all slots and ranks (replay=fifo), rounded down to a multiple of num_envs.
        backup: Value of CONTINUE: max (HRM), double (two heads, each valued by the other), sarsa (the action really
            taken next), mc (what the episode earned), lambda (the lambda-return of the episode).
        lam: Weight of the longer return (backup=lambda): 0 looks one step ahead, 1 waits for the episode's end.
        loss: bce (on logits, HRM), mse_values (squared error of sigmoid(q_logits)) or mse_logits (the outputs are the
            values themselves, without bound, as in DQN).
        head: linear (HRM), or mlp: one hidden layer with SiLU.
        head_width: Width of the hidden layer (head=mlp).
        head_norm: Norm of the hidden layer before its nonlinearity, or of a linear head's input: none, rmsnorm,
            layernorm.
        gamma: Discount of each segment in the targets.
        ponder_cost: Price of every CONTINUE in the targets (bce cuts a target below 0), whatever the environment's.
        epsilon: Probability of an exploration floor in training, as in `QHaltingAgent`.
        exploration: Draw the floor at every step (the released code) or once an episode (the paper).
        q_bias: Where all outputs start.
        threshold: Halt where q_halt - q_continue is larger than this; with bootstrap=none q_halt alone, less 1/2 where
            it is a value and no logit (loss=mse_logits).
    """

    def __init__(
        self, core: nn.Module, max_steps: int, bootstrap: q_targets.Bootstrap = "extra_forward",
        target: Literal["none", "polyak", "hard", "last_layer"] = "none", tau: float = 0.01, period: int = 100,
        replay: Literal["none", "fifo", "uniform"] = "none", replay_size: int = 10_000,
        backup: Literal["max", "double", "sarsa", "mc", "lambda"] = "max", lam: float = 0.65,
        loss: q_targets.Loss = "bce", head: Literal["linear", "mlp"] = "linear", head_width: int = 128,
        head_norm: Literal["none", "rmsnorm", "layernorm"] = "none", gamma: float = 1.0, ponder_cost: float = 0.0,
        epsilon: float = 0.1, exploration: Literal["per_step", "per_episode"] = "per_step", q_bias: float = -5.0,
        threshold: float = 0.0,
    ):  # fmt: skip
        settings = {
            "target": target, "tau": tau, "period": period, "replay": replay, "replay_size": replay_size,
            "backup": backup, "lam": lam, "loss": loss, "head": head, "head_width": head_width,
            "head_norm": head_norm, "gamma": gamma, "ponder_cost": ponder_cost, "epsilon": epsilon,
            "exploration": exploration, "q_bias": q_bias,
        }  # fmt: skip
        check_settings(Arm, settings, "agent")
        try:
            arm = Arm(**settings)
        except UserError as error:
            raise UserError(f"agent.{error}") from None
        _refuse_idle(arm, bootstrap)
        super().__init__(core, max_steps, bootstrap, epsilon, exploration, q_bias, threshold)
        self.arm = arm
        self.bootstraps = backup in ("max", "double")
        self.q_head = make_head(core.hidden_size, arm)
        self.target = None
        if target != "none":
            self.target = frozen_copy(self.q_head)
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def rule(self, q_logits: Tensor) -> Tensor:
        score = super().rule(q_logits)
        # TRM halts where being right is likelier than not: a logit over 0, but a value over 1/2.
        return score - 0.5 if self.bootstrap == "none" and self.arm.loss == "mse_logits" else score

    def loss(self, transition: Transition) -> q_targets.QLosses:
        arm, view = self.arm, transition.view
        if self.target is not None:
            self._move_target()
        if arm.replay == "fifo":
            return self._replayed(transition)
        value = None if self.target is None else self._value
        settings = {"gamma": arm.gamma, "ponder_cost": arm.ponder_cost, "loss": arm.loss, "value": value}
        if arm.backup == "sarsa":
            return sarsa_losses(self, transition, **settings)
        if arm.backup in ("mc", "lambda"):
            return lambda_losses(self, transition, self._lam(), **settings)
        key = rng.fold(view.key, view.steps)
        return self._one_step(transition, transition.q_logits, key)

    def _lam(self) -> float:
        return 1.0 if self.arm.backup == "mc" else self.arm.lam

    @torch.no_grad()
    def _value(self, z_H: Tensor) -> Tensor:
        """(K, T, D) -> q_logits (K, 2) of the weights that value what comes next, without gradient."""
        return self.scores(z_H) if self.target is None else self.target(z_H)

    @torch.no_grad()
    def _move_target(self) -> None:
        """One update of the copy; never waits for the device."""
        arm, due = self.arm, self.updates % self.arm.period == 0
        share = torch.where(self.updates == 0, 1.0, arm.tau)
        for own, held in zip(self.q_head.modules(), self.target.modules(), strict=True):
            follows = arm.target == "last_layer" and not isinstance(own, QHead)  # a hidden layer is always today's
            for name, now in own.named_parameters(recurse=False):
                then = getattr(held, name)
                if arm.target == "polyak":
                    then.lerp_(now, share.to(now.dtype))
                else:
                    then.copy_(now if follows else torch.where(due, now, then))
        self.updates += 1

    def _one_step(self, transition: Transition, q_logits: Tensor | None, key: Tensor) -> q_targets.QLosses:
        """Losses of max and double. key (B,) int64, of the slot and update."""
        arm, view, next_z_H = self.arm, transition.view, transition.next_z_H
        next_q_logits = chosen_by = None
        if arm.backup == "double":
            learns_a = rng.uniform(rng.fold(key, _COIN), 1)[:, 0] < 0.5
            q_logits = self.q_head.one_of(learns_a, view.z_H)
            if next_z_H is not None:
                with torch.no_grad():
                    chosen_by = self.q_head.one_of(learns_a, next_z_H)
                    other = self.q_head if self.target is None else self.target
                    next_q_logits = other.one_of(~learns_a, next_z_H)
        elif next_z_H is not None:
            next_q_logits = self._value(next_z_H)
        target, has_target = q_targets.one_step_targets(
            self.bootstrap, next_q_logits, transition.is_correct, view.steps >= self.max_steps, transition.ended,
            arm.gamma, arm.ponder_cost, chosen_by, arm.loss, transition.looked,
        )  # fmt: skip
        target_halt = q_targets.halt_target(transition.is_correct)
        return q_targets.q_losses(q_logits, target_halt, target, view.valid, has_target, arm.loss)

    # --- replay -----------------------------------------------------------------------------------------------

    def _replayed(self, transition: Transition) -> q_targets.QLosses:
        """Keep this decision of every slot, draw another of each and learn from that."""
        view, memory = transition.view, self.memory
        kept = {
            "z": view.z_H[:, 0], "steps": view.steps, "valid": view.valid, "actions": transition.actions,
            "is_correct": transition.is_correct, "ended": transition.ended,
        }  # fmt: skip
        if transition.next_z_H is not None:
            kept["next_z"] = transition.next_z_H[:, 0]
        if transition.looked is not None:
            kept["looked"] = transition.looked
        replay.push(memory, self._room(len(view.steps)), **kept)
        key = rng.fold(view.key, view.steps)
        age = rng.integers(rng.fold(key, _DRAW), replay.filled(memory))
        drawn = {name: replay.at(memory, name, age) for name in kept}
        seen = view._replace(z_H=drawn["z"][:, None], steps=drawn["steps"], valid=drawn["valid"])
        then = transition._replace(
            view=seen, q_logits=self.scores(seen.z_H), actions=drawn["actions"], is_correct=drawn["is_correct"],
            ended=drawn["ended"], next_z_H=drawn["next_z"][:, None] if "next_z" in kept else None,
            looked=drawn.get("looked"),
        )  # fmt: skip
        if self.bootstraps:
            return self._one_step(then, then.q_logits, key)
        target, known = self._sarsa_target(age) if self.arm.backup == "sarsa" else self._return(age)
        at_limit = seen.steps >= self.max_steps
        target = q_targets.grounded_target(target, then.is_correct, at_limit)
        has_target = at_limit | (known & ~then.ended)
        target_halt = q_targets.halt_target(then.is_correct)
        return q_targets.q_losses(then.q_logits, target_halt, target, seen.valid, has_target, self.arm.loss)

    def _room(self, slots: int) -> int:
        """Entries a slot: replay_size over the slots of all ranks. UserError where that is too few for the backup."""
        held = replay.size_of(self.memory)
        if held is not None:
            return held
        slots *= dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        room = self.arm.replay_size // slots
        needed = {"max": 1, "double": 1, "sarsa": 2}.get(self.arm.backup, 2 * self.max_steps)
        if room < needed:
            raise UserError(f"agent.replay_size={self.arm.replay_size} is too small for backup={self.arm.backup} with "
                            f"{slots} slots: at least {needed * slots}")  # fmt: skip
        return room

    def _sarsa_target(self, age: Tensor) -> tuple[Tensor, Tensor]:
        """(target (B,) from the action taken one step after the decision of that age, whether it is known (B,))."""
        after = (age - 1).clamp(min=0)
        q_logits = self._value(replay.at(self.memory, "z", after)[:, None])
        actions = replay.at(self.memory, "actions", after)
        return returns.sarsa_target(q_logits, actions, self.arm.gamma, self.arm.ponder_cost, self.arm.loss), age > 0

    def _return(self, age: Tensor) -> tuple[Tensor, Tensor]:
        """(lambda-return (B,) of the decision of that age, whether its episode has ended (B,))."""
        arm = self.arm
        later = age[:, None] - torch.arange(self.max_steps, device=age.device)  # (B, M), from there on
        ages = later.clamp(min=0)
        ended = replay.at(self.memory, "ended", ages) & (later >= 0)
        q_logits = self._value(replay.at(self.memory, "z", ages).flatten(0, 1)[:, None]).unflatten(0, ages.shape)
        rewards = torch.where(ended, replay.at(self.memory, "is_correct", ages).float(), -arm.ponder_cost)
        next_values = returns.greedy_next_values(q_logits, arm.loss)
        return returns.lambda_returns(rewards, next_values, ended, self._lam(), arm.gamma)[:, 0], ended.any(1)


def _refuse_idle(arm: Arm, bootstrap: str) -> None:
    """UserError for settings that would be without effect, or have no meaning in live training."""
    if arm.replay == "uniform":
        raise UserError("agent.replay=uniform draws from all transitions of a recording, which live training does not "
                        "have; choose none or fifo")  # fmt: skip
    if arm.backup == "mc" and arm.target != "none":
        raise UserError(f"agent.target={arm.target} has no effect with agent.backup=mc, which values no next segment")
    if bootstrap == "none":
        for name in ("target", "backup", "gamma", "ponder_cost"):
            if name in arm.changes():
                raise UserError(f"agent.{name}={getattr(arm, name)} has no effect with bootstrap=none, which has no "
                                "continue loss")  # fmt: skip
