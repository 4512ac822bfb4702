"""What is measured in an update: running sums on the device, and what needs a look at logged updates only."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents import Transition
from agents.q_targets import QLosses
from envs import Slots
from hrm_rl.core import RecurrentCore, State
from hrm_rl.errors import NonFiniteError
from hrm_rl.losses import supervised_loss
from hrm_rl.metrics import Sums
from hrm_rl.parallel import ALONE, Ranks


class FiniteWatch:
    """Notes on the device at which update a term first was not finite; the host looks when waiting costs nothing."""

    def __init__(self, device: torch.device, ranks: Ranks = ALONE):
        self.ranks = ranks
        self._updates = torch.zeros((), dtype=torch.int64, device=device)
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None  # the first bad update of each, counted from 1; 0 is none

    def see(self, terms: dict[str, Tensor]) -> None:
        """Look at the scalars of one update, causes before effects; never waits for the device."""
        self._updates += 1
        bad = ~torch.stack([term.detach().float() for term in terms.values()]).isfinite()
        if tuple(terms) != self._names:  # the first update, or the first with a Q-loss
            held = dict(zip(self._names, self._first, strict=True)) if self._names else {}
            self._first = torch.stack([held.get(name, torch.zeros_like(self._updates)) for name in terms])
            self._names = tuple(terms)
        self._first = torch.where(bad & (self._first == 0), self._updates, self._first)

    def held(self) -> tuple[Tensor, Tensor | None]:
        """What is kept on the device: for `hold`."""
        return self._updates, self._first

    def hold(self, updates: Tensor, first: Tensor | None) -> None:
        """Keep it in these tensors."""
        self._updates, self._first = updates, first

    def check(self, step: int) -> None:
        """Raise NonFiniteError for the first bad term of the first bad update; `step` is the update seen last.

        On all ranks, wherever it was bad.
        """
        if self._first is None or self.ranks.world == 1 and not bool((self._first > 0).any()):
            return
        first = self._first.tolist()
        if self.ranks.world > 1:
            never = float("-inf")
            first = self.ranks.largest([-update if update else never for update in first])
            first = [0 if update == never else int(-update) for update in first]
            if not any(first):
                return
        earliest = min(update for update in first if update)
        term = self._names[first.index(earliest)]
        raise NonFiniteError(f"update {step - int(self._updates) + earliest}: {term} is not finite")


@torch.no_grad()
def record(sums: Sums, slots: Slots, transition: Transition, losses: dict[str, Tensor], q: QLosses | None) -> None:
    """Add one update to the running sums; never waits for the device.

    losses: scalars by tag ("loss/...", and "agent/..." for the parts of an agent's own loss), not weighted but for
    the total.
    """
    add, add_mean, B = sums.add, sums.add_mean, slots.steps.shape[0]
    add_mean("updates", torch.ones((), device=slots.steps.device))
    for tag, value in losses.items():
        add_mean(tag, value)
    ended = transition.ended & slots.valid
    add("episodes", ended.sum())
    add("exact", (slots.is_correct & ended).sum())
    add("token", (slots.token_accuracy * ended).sum())
    add("steps", (slots.steps * ended).sum())
    if transition.q_logits is not None:
        size = transition.q_logits.detach().float().abs()
        add_mean("logit", size.mean())
        sums.largest("logit_max", size.max())
        agrees = (transition.q_logits[:, 0] >= 0) == slots.is_correct
        add("q_agrees", (agrees & ended).sum())
    if q is not None:
        add_mean("td_halt", q.td_error_halt.abs().sum() / B)
        add("td_continue", q.td_error_continue.abs().sum())
        add("td_continue_count", q.has_continue.sum())


@torch.no_grad()
def record_solver(sums: Sums, core: RecurrentCore) -> None:
    """With gradient=implicit, how far the solvers of this update came; never waits for the device."""
    for which, residual in core.solved.items():
        sums.add_mean(f"solver/{which}_residual", residual.mean())
        sums.add_mean(f"solver/{which}_missed", (~(residual <= core.config.solver_tol)).double().mean())


def averages(taken: dict[str, float]) -> dict[str, float]:
    """Metrics by tag from the sums that `Sums.take` returned."""
    updates, episodes = taken["updates"], taken["episodes"]
    values = {tag: value / updates for tag, value in taken.items() if tag.startswith(("loss/", "agent/", "solver/"))}
    values["halt/episodes"] = episodes
    if episodes:
        values["halt/exact_accuracy"] = taken["exact"] / episodes
        values["halt/token_accuracy"] = taken["token"] / episodes
        values["halt/mean_steps"] = taken["steps"] / episodes
        if "q_agrees" in taken:
            values["halt/q_halt_accuracy"] = taken["q_agrees"] / episodes
    if "logit" in taken:
        values["q/mean_abs_logit"] = taken["logit"] / updates
        values["q/max_abs_logit"] = taken["logit_max"]
    if "td_halt" in taken:
        values["q/td_error_halt"] = taken["td_halt"] / updates
        if taken["td_continue_count"]:
            values["q/td_error_continue"] = taken["td_continue"] / taken["td_continue_count"]
    return values


def gradient_norms(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """L2 norm of the gradient of each part of the model, scalars on the device."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in trained.items():
        if parameter.grad is not None:
            parts.setdefault(_part(name), []).append(parameter.grad)
    return {
        f"grad/{part}": torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        for part, gradients in parts.items()
    }


def memory_and_files() -> dict[str, float]:
    """Resident memory in MB and open files of this process; empty where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
    except OSError:
        return {}
    return {"system/memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "system/open_files": files}


def residuals(slots: Slots, previous: tuple[Tensor, Tensor], ranks: Ranks = ALONE) -> dict[str, float]:
    """How far z_H and z_L moved in this segment, relative to where they are: mean over episodes that went on.

    previous: (z_H, z_L) of the same slots one segment ago, (B, P + S, D) each.
    """
    goes_on = slots.steps > 1
    sums = [goes_on.sum().double()]
    for now, before in zip((slots.z_H, slots.z_L), previous, strict=True):
        now, before = now.detach().float().flatten(1), before.float().flatten(1)
        ratio = (now - before).norm(dim=1) / now.norm(dim=1).clamp(min=1e-12)
        sums.append((ratio.double() * goes_on).sum())
    count, z_H, z_L = ranks.total(torch.stack(sums).tolist())
    return {"state/residual_z_H": z_H / count, "state/residual_z_L": z_L / count} if count else {}


def with_gradient(core: RecurrentCore, gradient: str, **settings) -> RecurrentCore:
    """The same core, parameters included, under another `core.gradient` (and settings of its solver)."""
    twin = copy.copy(core)  # a module's shallow copy shares its parameters
    twin.config = replace(core.config, gradient=gradient, **settings)
    twin.solved = {}
    return twin


def gradient_cosines(
    core: RecurrentCore, tokens: Tensor, labels: Tensor, state: State, loss: str = "softmax", **solver
) -> dict[str, float]:
    """How near the 1-step gradient of one segment comes to what it stands for; waits for the device.

    tokens, labels (B, S); state: detached, where the segment begins. `solver`: settings of it.
    All are gradients of the supervised loss in all parameters of the core that are trained:

        cosine            1-step against implicit: the theorem applied where the segment ends, fixed point or not
        cosine_full       1-step against backpropagation through all calls of the segment
        cosine_solved     1-step against implicit, both taken where the solver ends
        forward           |f(z) - z| / |f(z)| where the segment ends, mean over puzzles; f: its last calls
        forward_solved    the same where the solver ends
        backward, backward_solved    the residuals of the linear solves behind cosine and cosine_solved, likewise
        missed, missed_solved        share of puzzles whose linear solve did not come to the tolerance
    """
    implicit, one_step = with_gradient(core, "implicit", **solver), with_gradient(core, "one_step")
    learned = [p for p in core.parameters() if p.requires_grad]

    def gradient(twin: RecurrentCore, start: State) -> Tensor:
        with torch.enable_grad():
            value = supervised_loss(twin.tail(tokens, start).logits, labels, loss).sum()
            found = torch.autograd.grad(value, learned, allow_unused=True)
        return torch.cat([p.new_zeros(p.numel()) if g is None else g.flatten()
                          for p, g in zip(learned, found, strict=True)]).double()  # fmt: skip

    values, short = {}, {}
    for name, start in (("", one_step.prefix(tokens, state)), ("_solved", implicit.prefix(tokens, state))):
        short[name] = gradient(one_step, start)
        values[f"cosine{name}"] = F.cosine_similarity(short[name], gradient(implicit, start), dim=0)
        for which, residual in implicit.solved.items():
            values[f"{which}{name}"] = residual.double().mean()
        values[f"missed{name}"] = (~(implicit.solved["backward"] <= implicit.config.solver_tol)).double().mean()
    full = with_gradient(core, "full")
    values["cosine_full"] = F.cosine_similarity(short[""], gradient(full, full.prefix(tokens, state)), dim=0)
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def _part(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    if name.startswith("agent."):
        return "q_head"
    network = name.removeprefix("core.").split(".")[0]
    return {"H_level": "core_H", "L_level": "core_L", "net": "core_net"}.get(network, "core_other")
