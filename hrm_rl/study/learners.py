"""Q-learners on the recordings of a frozen core: all (arm, seed) that share shapes train in one batched computation.

`groups` says who trains together, `train_group` trains one group and scores it at its checkpoints, `train` does all.
The learning rule and its choices are told in `hrm_rl.study.stack`. A learner's numbers depend on its arm, its seed, the
data and the number of updates, and on which others are in its group by no more than the order in which a batched
product sums. One seed under several arms starts from the same weights and draws the same puzzles, floors and coins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents import q_targets
from agents.arm import Arm
from hrm_rl.calibration import halting_steps, read_at
from hrm_rl.errors import UserError
from hrm_rl.study.heads import Heads
from hrm_rl.study.results import RunResult
from hrm_rl.study.stack import Stack, setting_of
from hrm_rl.study.trajectories import Trajectories

#: (q_logits, correct, gamma, ponder_cost, loss, previous) -> (metrics, by_step), as `hrm_rl.study.measures.measure`.
Measure = Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]

MOST_BYTES = 32 << 20  # that one update of a group touches: where 2 cores are fastest, and seconds for 2,000 updates
MOST_LEARNERS = 256  # in a group: their Q-logits on 2,000 probe puzzles, twice, are 130 MB
FEATURE_ROWS = 512  # of the probe at which hidden features are looked at
TELL_EVERY = 20  # updates between two calls of progress


class Member(NamedTuple):
    """One learner."""

    name: str  # of its arm, unique in the study
    arm: Arm
    seed: int


def check(arm: Arm) -> None:
    """UserError for switches that mean nothing together; it names both."""
    if arm.backup in ("sarsa", "mc", "lambda"):
        if arm.replay != "none":
            why = "the action really taken next" if arm.backup == "sarsa" else "the episode at hand"
            raise UserError(f"backup={arm.backup} learns from {why}: it needs replay=none, not {arm.replay}")
        if arm.backup == "mc" and arm.target != "none":
            raise UserError(f"backup=mc bootstraps from nothing: it needs target=none, not {arm.target}")
    if arm.replay == "fifo" and arm.replay_size < arm.num_envs:
        raise UserError(f"replay_size={arm.replay_size} must hold the num_envs={arm.num_envs} transitions of an update")
    if arm.optimizer == "adam_atan2" and arm.lr == 0:
        raise UserError("optimizer=adam_atan2 needs lr above 0")


def shared_by(arm: Arm) -> tuple:
    """What learners must have in common to train together: shapes, and the code that runs. All else is a number."""
    target = "hard" if arm.target == "last_layer" and arm.head == "linear" else arm.target
    backup = "episodes" if arm.backup in ("mc", "lambda") else arm.backup
    width = arm.head_width if arm.head == "mlp" else 0
    return (arm.num_envs, arm.head, width, arm.head_norm, backup, arm.replay, target, arm.loss)


def groups(everyone: Sequence[tuple[str, Arm, int]], width: int = 128) -> list[list[Member]]:
    """Who trains together, of all (name, arm, seed): a function of its arguments alone, each in exactly one group.

    width: of the q-token; with it the groups get their size. UserError for an arm that `check` refuses, by name, and
    for a learner that is there twice.
    """
    classes: dict[tuple, list[Member]] = {}
    seen = set()
    for name, arm, seed in everyone:
        try:
            check(arm)
        except UserError as error:
            raise UserError(f"arm {name}: {error}") from error
        if (name, seed) in seen:
            raise UserError(f"arm {name}, seed {seed}: there twice")
        seen.add((name, seed))
        classes.setdefault(shared_by(arm), []).append(Member(name, arm, seed))
    found = []
    for members in classes.values():
        members = sorted(members, key=lambda member: setting_of(member.arm))  # stable: else in their order
        arm = members[0].arm
        rows = arm.num_envs * (8 if arm.backup in ("mc", "lambda") else 1)
        touched = 4 * (4 * rows * (width + arm.head_width * (arm.head == "mlp")) + 8 * Heads.of(arm, width).numbers)
        parts = math.ceil(len(members) / max(1, min(MOST_LEARNERS, MOST_BYTES // touched)))
        bounds = [len(members) * i // parts for i in range(parts + 1)]
        found += [members[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return found


def train(
    arms: Sequence[tuple[str, Arm]], seeds: Sequence[int], data: Trajectories, probe: Trajectories, updates: int = 2000,
    checkpoints: int = 21, device: str | torch.device = "cpu", progress: Callable[[int], Any] | None = None,
    measure: Measure | None = None,
) -> list[RunResult]:  # fmt: skip
    """Every arm with every seed, arm by arm; see `train_group`."""
    everyone = [(name, arm, seed) for name, arm in arms for seed in seeds]
    found = {}
    for group in groups(everyone, data.q_token.shape[-1]):
        for run in train_group(group, data, probe, updates, checkpoints, device, progress, measure):
            found[run.arm, run.seed] = run
    return [found[name, seed] for name, _, seed in everyone]


def train_group(
    group: Sequence[tuple[str, Arm, int]], data: Trajectories, probe: Trajectories, updates: int = 2000,
    checkpoints: int = 21, device: str | torch.device = "cpu", progress: Callable[[int], Any] | None = None,
    measure: Measure | None = None,
) -> list[RunResult]:  # fmt: skip
    """Train learners that go together (a group of `groups`, or some of one) and score them; results in their order.

    data: what they learn from; probe: what they are scored on, at `checkpoints` evenly spaced updates, 0 and the last
    among them. progress is told the learner-updates done since it was told last. measure: None is
    `hrm_rl.study.measures.measure`. A learner whose logits are no longer finite is a result as well, with status
    "diverged": its metrics are NaN from there on, and `right` and `steps` are those of a policy that never halts, since
    no wish to halt comes of a number that is none. UserError for learners that do not go together, or probe puzzles of
    another width or budget.
    """
    began = time.perf_counter()
    members = [Member(*member) for member in group]
    _check_group(members, data, probe, updates, checkpoints)
    if measure is None:
        from hrm_rl.study.measures import measure
    order = sorted(range(len(members)), key=lambda i: setting_of(members[i].arm))
    members = [members[i] for i in order]
    stack = Stack([m.arm for m in members], [m.seed for m in members], data, device)
    probe = Trajectories(probe.q_token.to(device), probe.correct.to(device), probe.key)
    marks = torch.linspace(0, updates, checkpoints, dtype=torch.float64).round().long().unique()
    scores = _Scores(stack, members, probe, measure)
    for last in marks.tolist():
        while stack.updates < last:
            before = stack.updates
            for _ in range(min(TELL_EVERY, last - before)):
                stack.update()
            if progress is not None:
                progress((stack.updates - before) * len(members))
        scores.take()
    seconds = (time.perf_counter() - began) / len(members)
    results = scores.results(marks, seconds)
    return [results[place] for place in sorted(range(len(order)), key=order.__getitem__)]


def _check_group(members: Sequence[Member], data: Trajectories, probe: Trajectories, updates: int, checkpoints: int):
    if not members:
        raise UserError("a group needs at least one learner")
    for member in members:
        try:
            check(member.arm)
        except UserError as error:
            raise UserError(f"arm {member.name}: {error}") from error
        if shared_by(member.arm) != shared_by(members[0].arm):
            raise UserError(f"arms {members[0].name} and {member.name} cannot train together: they differ in more than "
                            "numbers (hrm_rl.study.learners.groups says who can)")  # fmt: skip
    (M, _, D), (probe_M, _, probe_D) = data.q_token.shape, probe.q_token.shape
    if (M, D) != (probe_M, probe_D):
        raise UserError(f"probe: {probe_M} segments of width {probe_D}, not {M} of {D} as those that are learned from")
    if updates < 1 or not 2 <= checkpoints <= updates + 1:
        raise UserError(f"checkpoints={checkpoints} must be between 2 and updates + 1, and updates={updates} above 0")


class _Scores:
    """What a group's learners are worth at their checkpoints."""

    def __init__(self, stack: Stack, members: Sequence[Member], probe: Trajectories, measure: Measure):
        self.stack, self.members, self.probe, self.measure = stack, members, probe, measure
        self.metrics: list[dict[str, Tensor]] = []
        self.by_step: list[dict[str, Tensor]] = []
        self.q_logits: Tensor | None = None  # (L, M, N, 2) at the latest checkpoint

    @torch.no_grad()
    def take(self) -> None:
        """Score all learners as they are."""
        stack, arms, previous = self.stack, [m.arm for m in self.members], self.q_logits
        q_logits = stack.q_logits_of(self.probe, slice(None))
        finite = q_logits.flatten(1).isfinite().all(1)
        stack.died = torch.where((stack.died < 0) & ~finite, stack.updates, stack.died)
        gamma, ponder_cost = stack.gamma[:, 0].double(), stack.ponder_cost[:, 0].double()
        metrics, by_step = self.measure(
            q_logits.where((stack.died < 0)[:, None, None, None], torch.nan), self.probe.correct, gamma, ponder_cost,
            arms[0].loss, previous,
        )  # fmt: skip
        metrics = metrics | _own_measures(stack, arms, self.probe)
        alive = (stack.died < 0)[:, None].cpu()
        self.metrics.append({n: v.cpu().double().where(alive[:, 0], torch.nan) for n, v in metrics.items()})
        self.by_step.append({n: v.cpu().double().where(alive, torch.nan) for n, v in by_step.items()})
        self.q_logits = q_logits

    def results(self, updates: Tensor, seconds: float) -> list[RunResult]:
        """One a learner, in their order."""
        score = q_targets.halt_score(self.q_logits, "next_observation")  # (L, M, N)
        L, M, N = score.shape
        steps = halting_steps(score.transpose(0, 1).reshape(M, -1), 0.0, strict=True).view(L, N).cpu()
        correct, died = self.probe.correct.cpu(), self.stack.died.tolist()
        metrics = {n: torch.stack([row[n] for row in self.metrics], 1) for n in self.metrics[0]}  # (L, C)
        by_step = {n: torch.stack([row[n] for row in self.by_step], 1) for n in self.by_step[0]}  # (L, C, M)
        return [
            RunResult(
                member.name, member.seed, "finished" if died[i] < 0 else "diverged",
                "" if died[i] < 0 else f"its Q-logits were no longer finite after {died[i]} updates", seconds, updates,
                {n: v[i] for n, v in metrics.items()}, {n: v[i] for n, v in by_step.items()},
                read_at(correct, steps[i]), steps[i], self.probe.key, changes=member.arm.changes(),
            )
            for i, member in enumerate(self.members)
        ]  # fmt: skip


def _own_measures(stack: Stack, arms: Sequence[Arm], probe: Trajectories) -> dict[str, Tensor]:
    """The metrics that need parameters or gradients, (L,) each."""
    from hrm_rl.study.measures import head_measures

    table = stack.heads.table(probe.q_token).flatten(0, 1)
    kept = torch.linspace(0, len(table) - 1, min(FEATURE_ROWS, len(table)), device=table.device).round().long()
    features = table[kept]
    if stack.heads.hidden:
        features = stack.heads.features(stack.parameters, features.expand(len(arms), -1, -1))
    found = head_measures(features, stack.parameters, [a.optimizer for a in arms], [a.weight_decay for a in arms])
    return {"grad_norm": stack.take_gradient_norm()} | found
