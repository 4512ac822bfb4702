"""Studies whose truth is known: arms with a chosen accuracy, spread and share of runs that go wrong.

Letters: C checkpoints, M segments, N puzzles. Seeds are drawn anew for every arm; puzzles are shared by all runs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import norm

from agents.arm import Arm
from hrm_rl.study.info import StudyInfo
from hrm_rl.study.results import RunResult

UPDATES = 2000


class Judged(NamedTuple):
    """Stand-in for hrm_rl.study.stability.Stability."""

    unstable: bool
    reasons: tuple[str, ...]
    collapse_update: int | None
    peak_accuracy: float
    final_accuracy: float
    judged: bool = True


def judge(run: RunResult) -> Judged:
    """Stand-in for hrm_rl.study.stability.verdict: diverged, or 0.2 below its peak at the end."""
    series = run.metrics.get("accuracy")
    values = [] if series is None else [float(v) for v in series if math.isfinite(v)]
    peak, final = max(values, default=math.nan), run.final("accuracy")
    reasons = ("a value is not finite",) if run.status == "diverged" else ()
    collapse = None
    if values and peak - final > 0.2:
        reasons += (f"accuracy fell from {peak:.2f} to {final:.2f}",)
        collapse = next(int(u) for u, v in zip(run.updates, series, strict=True)
                        if v < peak - 0.2 and u > run.updates[int(series.nan_to_num(-1).argmax())])  # fmt: skip
    return Judged(bool(reasons), reasons, collapse, peak, final, run.status != "failed")


METRICS = {
    "accuracy": ("Share of puzzles whose answer is right at the greedy halt.", "higher", "share"),
    "regret": ("Best return minus the policy's.", "lower", "return"),
    "mean_steps": ("Segments until the halt.", "none", "segments"),
    "bias_continue": ("Value of CONTINUE minus the optimum.", "none", "return"),
    "abs_bias_continue": ("Absolute value of the same.", "lower", "return"),
    "target_drift": ("How far the targets moved since the checkpoint before.", "lower", "return"),
    "logit_mean_abs": ("Mean size of the logits.", "none", "logit"),
    "auroc": ("Chance that a right answer has the larger q_halt.", "higher", "share"),
    "param_bound_ratio": ("Largest parameter over the optimiser's bound.", "none", "ratio"),
}


@dataclass(frozen=True)
class Made:
    """How an arm of a synthetic study behaves."""

    changes: Mapping[str, Any] = field(default_factory=dict)  # from HRM's rule (Arm's defaults)
    accuracy: float = 0.8  # true mean over seeds
    spread: float = 0.004  # standard deviation of a seed's ability
    seeds: int = 10
    collapsed: Sequence[int] = ()  # seeds whose accuracy falls to a quarter after its peak
    diverged: Sequence[int] = ()
    failed: Sequence[int] = ()
    ratio: float = 0.4  # of the largest parameter to the bound


def make_study(
    arms: Mapping[str, Made], baseline: str | None = None, puzzles: int = 300, checkpoints: int = 20,
    segments: int = 16, seed: int = 0, title: str = "Synthetic study",
) -> tuple[StudyInfo, list[RunResult]]:  # fmt: skip
    """The description and the runs of a study; the first arm is the baseline if none is named."""
    baseline = baseline or next(iter(arms))
    difficulty = np.random.default_rng([seed, 1]).permutation(norm.ppf((np.arange(puzzles) + 0.5) / puzzles))
    runs = [_run(name, made, number, difficulty, checkpoints, segments, seed, baseline_of(arms, baseline))
            for name, made in arms.items() for number in range(made.seeds)]  # fmt: skip
    info = StudyInfo(
        title, "python -m hrm_rl.ablate configs/q_stability.yaml --out runs/study", "2026-11-22", "2 cores",
        "2.13.0+cpu", baseline, "q_only", puzzles, UPDATES, len(runs),
        {name: Arm(**made.changes).to_values() for name, made in arms.items()},
    )  # fmt: skip
    return info, runs


def baseline_of(arms: Mapping[str, Made], baseline: str) -> Mapping[str, Any]:
    return arms[baseline].changes


def _run(arm: str, made: Made, seed: int, difficulty: np.ndarray, C: int, M: int, study: int,
         base: Mapping[str, Any]) -> RunResult:  # fmt: skip
    rng = np.random.default_rng([study, 2, zlib.crc32(arm.encode()), seed])
    changes = {k: v for k, v in made.changes.items() if base.get(k) != v}
    if seed in made.failed:
        return RunResult(arm, seed, "failed", "worker was killed (out of memory)", changes=changes)
    ability = made.accuracy + made.spread * rng.standard_normal()
    if seed in made.collapsed:
        ability /= 4
    # an answer is right where the puzzle's difficulty, a little of it this run's own, is below the ability
    own = math.sqrt(0.999) * difficulty + math.sqrt(0.001) * rng.standard_normal(len(difficulty))
    right = own < norm.ppf(np.clip(ability, 1e-9, 1 - 1e-9))
    updates = np.linspace(0, UPDATES, C).round().astype(np.int64)
    t = updates / UPDATES
    level = right.mean() * (4 if seed in made.collapsed else 1)
    accuracy = np.clip(level * (1 - np.exp(-6 * t)) + 0.004 * rng.standard_normal(C), 0, 1)
    if seed in made.collapsed:
        accuracy[t > 0.6] = right.mean()
    accuracy[-1] = right.mean()
    wild = 8.0 ** (3 * t) if seed in made.collapsed or seed in made.diverged else 1 + 0 * t
    noise = 1 + 0.05 * rng.standard_normal(C)
    bias = 0.2 * np.exp(-3 * t) * noise * wild
    metrics = {
        "accuracy": accuracy, "regret": 0.95 - accuracy * 0.98, "mean_steps": 5 + 3 * np.exp(-3 * t) * noise,
        "bias_continue": bias, "abs_bias_continue": np.abs(bias), "target_drift": 0.1 * np.exp(-4 * t) * noise * wild,
        "logit_mean_abs": (1 + 4 * t) * noise * wild, "auroc": 0.5 + 0.4 * t, "param_bound_ratio": made.ratio * noise,
    }  # fmt: skip
    metrics["auroc"][0] = np.nan
    by_step = {name: sign * bias[:, None] * np.linspace(1, 0.1, M) for name, sign in
               (("bias_halt", -0.5), ("bias_continue", 1.0), ("policy_bias_continue", 0.7))}  # fmt: skip
    diverged = seed in made.diverged
    if diverged:
        for values in (*metrics.values(), *by_step.values()):
            values[C // 2 :] = np.nan
    return RunResult(
        arm, seed, "diverged" if diverged else "finished", "update 1000: q_loss is not finite" if diverged else "", 0.5,
        torch.from_numpy(updates), {k: torch.from_numpy(v) for k, v in metrics.items()},
        {k: torch.from_numpy(v) for k, v in by_step.items()}, None if diverged else torch.from_numpy(right),
        None if diverged else torch.from_numpy(rng.integers(1, M + 1, len(right))), "ab" * 32, changes,
    )  # fmt: skip


def standard_arms(seeds: int = 10) -> dict[str, Made]:
    """A small version of the standard grid: every ingredient there, all arms but the wild one stable."""
    wild = {"lr": 10.0, "weight_decay": 0.0, "loss": "mse_logits", "num_envs": 1}
    return {
        "baseline": Made(seeds=seeds),
        "target=polyak": Made({"target": "polyak"}, seeds=seeds),
        "target=hard": Made({"target": "hard", "period": 50}, seeds=seeds),
        "replay=fifo": Made({"replay": "fifo"}, seeds=seeds),
        "weight_decay=0": Made({"weight_decay": 0.0}, 0.76, seeds=seeds, ratio=math.nan),
        "head_norm=rmsnorm": Made({"head_norm": "rmsnorm"}, seeds=seeds),
        "wild": Made(wild, 0.7, 0.05, seeds, range(0, seeds, 2), range(1, seeds, 2), ratio=math.nan),
    }
