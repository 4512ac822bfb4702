"""The metrics of `study.measures` for a live `Trainer`, between two updates, which it leaves as it found it.

One pass over the probe puzzles with the weights that are trained, not with their running average (optim.ema): it is
those that learn and that value the next segment, and an average hides how they swing. The exact values come from what
the core itself did in that pass, so they are the truth about the core as it is now, and move with it.

M segments, N puzzles, F features.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agents import Transition
from envs import HALT
from hrm_rl import evaluation
from hrm_rl.core import CoreOutput, State
from hrm_rl.study import measures
from hrm_rl.tasks import PuzzleSet
from hrm_rl.trainer import Trainer

_BATCH = 256  # probe puzzles in work at once


class Live(NamedTuple):
    """What was measured at one checkpoint of a live run."""

    metrics: dict[str, float]  # every name of METRICS; NaN where the agent or the objective has none
    by_step: dict[str, Tensor]  # every name of BY_STEP, (M,) float64 each
    q_logits: Tensor | None  # (M, N, 2) float32, the `previous` of the next checkpoint; None without values
    right: Tensor  # (N,) bool, the answer at the halt
    steps: Tensor  # (N,) int64, the segment of the halt


def measure_live(
    trainer: Trainer, probe: PuzzleSet, previous: Tensor | None = None, gamma: float | None = None,
    ponder_cost: float | None = None, loss: str | None = None,
) -> Live:  # fmt: skip
    """Everything a study measures of a live run, on `probe`. Call it between updates; of a run in one process.

    previous (M, N, 2): Q-logits at the checkpoint before. gamma, ponder_cost, loss: of the agent's targets; None takes
    those of its `arm` where it has one (`agents.q_variant`), else 1, 0 and bce, which is HRM's rule. An agent without
    values pays the environment's ponder cost. The halt is the agent's own, with its threshold.
    UserError if what the agent says is unsound, as in evaluation.
    """
    arm = getattr(trainer.agent, "arm", None)
    with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
        run, features = _pass(trainer, probe)
        slopes = gradient_measures(trainer)
    wish, correct = run.wish[None], run.exact
    gamma = getattr(arm, "gamma", 1.0) if gamma is None else gamma
    if run.q_logits is None:
        cost = trainer.config.ponder_cost if ponder_cost is None else ponder_cost
        found, by_step = measures.measure_halting(wish, correct, gamma, cost)
    else:
        cost = getattr(arm, "ponder_cost", 0.0) if ponder_cost is None else ponder_cost
        loss = getattr(arm, "loss", "bce") if loss is None else loss
        before = None if previous is None else previous[None].to(run.q_logits)
        found, by_step = measures.measure(run.q_logits[None], correct, gamma, cost, loss, before, wish)
    found |= measures.feature_measures(features[None])
    metrics = dict.fromkeys(measures.METRICS, math.nan) | {name: float(value[0]) for name, value in found.items()}
    nothing = torch.full((len(correct),), math.nan, dtype=torch.float64)
    by_step = dict.fromkeys(measures.BY_STEP, nothing) | {name: value[0] for name, value in by_step.items()}
    steps = run.halt_steps(len(correct))
    return Live(metrics | _parameters(trainer) | slopes, by_step, run.q_logits, run.at(steps)[0], steps)


def _pass(trainer: Trainer, probe: PuzzleSet) -> tuple[evaluation.Trajectories, Tensor]:
    """Trajectories of the probe puzzles, and what the last layer of the head reads on them, (K, F) float32.

    An agent without a head has the q-token, which is what a linear head would read.
    """
    head = getattr(trainer.agent, "q_head", None)
    head = getattr(head, "a", head)  # of two heads the first
    seen: list[Tensor] = []

    def segment(tokens: Tensor, state: State) -> CoreOutput:
        output = trainer.core(tokens, state)
        z_H = output.state.z_H
        seen.append((head.features(z_H) if hasattr(head, "features") else z_H[:, 0]).float().cpu())
        return output

    M, batch = trainer.config.max_steps, min(len(probe), _BATCH)
    run = evaluation.trajectories(trainer.core, trainer.agent, probe, M, batch, trainer.device, segment)
    counts = [min(batch, len(probe) - first) for first in range(0, len(probe), batch)]  # the rest are repeats
    return run, torch.cat([rows[: counts[i // M]] for i, rows in enumerate(seen)])


def _parameters(trainer: Trainer) -> dict[str, float]:
    """The largest |parameter| of all that is trained, and the largest over its bound of those that AdamW or Adam-atan2
    moves (Muon's have another bound)."""
    largest = measures.parameter_measures({n: p[None] for n, p in trainer.trained.items()}, "none", 0.0)
    found = {"param_inf_norm": float(largest["param_inf_norm"]), "param_bound_ratio": math.nan}
    for kind in ("adamw", "adam_atan2"):
        held = [p for o in trainer.optimizers for group in o.param_groups if group["kind"] == kind
                for p in group["params"]]  # fmt: skip
        if held:
            stacked = {str(i): p[None] for i, p in enumerate(held)}
            ratio = measures.parameter_measures(stacked, kind, trainer.config.optim.weight_decay)["param_bound_ratio"]
            found["param_bound_ratio"] = float(ratio.fmax(ratio.new_tensor(found["param_bound_ratio"])))
    return found


def gradient_measures(trainer: Trainer) -> dict[str, float]:
    """Gradient norms by loss and their cosine on the core, at the slots as they are.

    The losses are those of the update that comes next, with their weights: `grad_norm` of all of them before clipping,
    `grad_norm_supervised` and `grad_cosine` on the core's parameters, `grad_norm_q` on the core's and the agent's. NaN
    for a loss that the objective does not have, and for the cosine where one of the two does not reach the core.

    Costs the tail of a segment once more, backwards twice, and one whole segment where the targets look ahead. It runs
    on a copy of the agent (its memory, target networks and counters move in `loss`) and on a graph of its own, so that
    weights, .grad, slots, memory and generators stay as they are. shared_prefix (and _all) reads its target from a
    whole segment here, which is the same one for every slot that has a target.
    """
    core, slots = trainer.core, trainer.envs.slots
    start = trainer.envs.state_dict()
    state = State(start["z_H"], start["z_L"])
    twin = copy.copy(trainer)  # what it sets is its own; what it changes in place is replaced here
    twin.agent = copy.deepcopy(trainer.agent, {id(core): core})
    twin.segment = core
    mode = trainer.config.bootstrap
    if mode in ("shared_prefix", "shared_prefix_all"):
        twin.config = replace(trainer.config, bootstrap="extra_forward")
    with torch.enable_grad():
        whole = hasattr(core, "prefix") and hasattr(core, "tail")  # else the state is that before the segment
        output = (core.tail if whole else core)(slots.tokens, state)
        slots = slots._replace(z_H=output.state.z_H, z_L=output.state.z_L, logits=output.logits)
        view, q_logits, actions = twin._decide(slots)
        ended = (actions == HALT) | (slots.steps >= trainer.config.max_steps)
        looked = trainer.slots_that_halt(slots, ended)[1] if mode == "shared_prefix_all" else None
        transition = Transition(view, q_logits, actions, slots.is_correct, None, ended, looked=looked)
        losses, _ = twin._losses(slots, transition)
        parts = {"supervised": None, "q": losses["loss/total"] if twin.learns_q else None}
        if twin.learns_core:
            parts["supervised"] = trainer.config.supervised_weight * losses["loss/supervised"]
            if twin.learns_q:
                parts["q"] = losses["loss/total"] - parts["supervised"]
    in_core = [p for n, p in trainer.trained.items() if n.startswith("core.")]
    in_agent = list(twin.agent.parameters()) if twin.learns_q else []
    slopes = {name: _gradients(part, in_core + in_agent) for name, part in parts.items()}
    supervised, q = slopes["supervised"], slopes["q"]
    on_core = len(torch.cat([p.detach().flatten() for p in in_core])) if in_core else 0
    total = sum(part for part in (supervised, q) if part is not None)
    found = {
        "grad_norm": _norm(total), "grad_norm_supervised": _norm(supervised), "grad_norm_q": _norm(q),
        "grad_cosine": math.nan,
    }  # fmt: skip
    if supervised is not None and q is not None:
        a, b = supervised[:on_core], q[:on_core]
        sizes = a.norm() * b.norm()
        found["grad_cosine"] = float(a @ b / sizes) if sizes > 0 else math.nan
    return found


def _gradients(loss: Tensor | None, parameters: list[nn.Parameter]) -> Tensor | None:
    """All gradients in one vector of float64, 0 where the loss does not reach; None without a loss."""
    if loss is None or not loss.requires_grad:
        return None
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
    return torch.cat([part.double().flatten() for part in flat])


def _norm(gradient: Tensor | float | None) -> float:
    return float(gradient.norm()) if isinstance(gradient, Tensor) else math.nan
