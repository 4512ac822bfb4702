"""Was a run stable? A verdict on the series of metrics of one run, with the reasons in words.

A run is unstable if it diverged, or if any criterion of `StabilityThresholds` is met. None of them asks how good a run
is: one that learns slowly, or that settles on values which are wrong, is stable, and its regret and its bias say the
rest. All are in units of the return, which lies in [-cost (M - 1), 1], so that values with and without bounds are held
against the same numbers. C checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_rl.study.results import RunResult


@dataclass(frozen=True)
class StabilityThresholds:
    """From where on a run is called unstable. The numbers in the comments are of linear heads of 19 arms on the
    packaged 6x6 core, 2,000 updates, 20 checkpoints, 3 seeds (2026-11-22).

    Args:
        drop: Largest loss of mean return, from the peak to the median of the last quarter (collapse), or anywhere in
            the second half (swing).
        standard_errors: So many standard errors of the peak's share of right puzzles are added to `drop`.
        value: Largest |value| at any checkpoint.
        end_value: Largest |value| at the last checkpoint.
        logit: Largest |Q-logit| at any checkpoint, where values are bounded.
        drift: Largest mean target drift of the last quarter, in units of the range that values take.
        progress: Share of that drift by which the bias must fall for the drift to be learning.
        bias_rise: Largest rise of the mean |bias| of CONTINUE above what it was, in the mean of the last quarter.
        moving_truth: The core was trained as well, so that returns, targets and truth move with it: `drop` is then
            asked of the accuracy at the halt, in the second half. (Not of the regret: a core that solves more can lose
            more by its halting, so that regret rises in runs whose accuracy never falls.)
    """

    drop: float = 0.1  # the standard arm stays within 0.004 once it has learned
    standard_errors: float = 2.0  # on few probe puzzles, a drop that chance explains is none
    value: float = 10.0  # ten times the largest return there is (any above 1 is soft divergence, arXiv:1812.02648)
    end_value: float = 2.0  # mse_logits ends at 1.5 to 1.7 on its worst puzzle, and loses 0.003 of return
    logit: float = 100.0  # a sigmoid is 1 in float32 from 18 on; a mistake there costs 100 nats and is not unlearned
    drift: float = 0.1  # settled learners: 0.002 to 0.02 (mse_logits 0.05); mse_logits, one slot, lr 0.01: 0.12 up
    progress: float = 0.25  # targets that go straight to the truth have 1, those that wander have 0
    bias_rise: float = 0.3  # arms that hold their return: 0.05 (mse_logits 0.14, weights drawn at random 0.25)
    moving_truth: bool = False


#: Live runs: while a core learns, targets must move, and values that were right of a core that solved nothing are not.
LIVE = StabilityThresholds(drift=math.inf, bias_rise=math.inf, moving_truth=True)


@dataclass(frozen=True)
class Stability:
    """The verdict on one run."""

    unstable: bool
    reasons: tuple[str, ...]  # in words, empty for a stable run (and why, for one that cannot be judged)
    collapse_update: int | None  # first checkpoint from which on the return stays down, or numbers are not finite
    peak_accuracy: float  # over checkpoints after the first update; NaN where there is none
    final_accuracy: float  # at the last checkpoint; NaN where there is none
    judged: bool = True  # False for a run that failed, or that has no checkpoint after its first update


def verdict(run: RunResult, thresholds: StabilityThresholds | None = None) -> Stability:
    """Judge one run by its metrics; those that it does not have (an agent without values) judge nothing.

    thresholds: None is `LIVE` for a run whose core was trained, else the defaults.

    The checkpoint at update 0 sets no peak: the policy there is what the start makes of it, and nothing was learned.
    """
    t = thresholds or (LIVE if run.live else StabilityThresholds())
    updates = run.updates.tolist()
    learned = [i for i, update in enumerate(updates) if update > 0]
    accuracy = _series(run, "accuracy")
    seen = [accuracy[i].item() for i in learned if not math.isnan(accuracy[i])]
    peak, final = max(seen, default=math.nan), run.final("accuracy")
    if run.status == "failed":
        return Stability(False, (f"not judged: {run.reason or 'it failed'}",), None, peak, final, False)
    lost = next((i for i in range(len(updates)) if _is_lost(run, i)), None)
    if run.status == "diverged" or lost is not None:
        at = None if lost is None else updates[lost]
        reason = f"diverged: {run.reason}" if run.reason else f"diverged: not finite at update {at}"
        return Stability(True, (reason,), at if at is not None else (updates[-1] if updates else None), peak, final)
    if not learned:
        return Stability(False, ("not judged: no checkpoint after an update",), None, peak, final, False)
    reasons, collapsed = _returns(run, t, learned[0])
    reasons += _explosion(run, t) + _restless_targets(run, t) + _bias(run, t, learned[0])
    at = None if collapsed is None else updates[collapsed]
    return Stability(bool(reasons), tuple(reasons), at, peak, final)


def _series(run: RunResult, metric: str) -> Tensor:
    """(C,) float64; NaN throughout where the run does not have it."""
    found = run.metrics.get(metric)
    return torch.full((len(run.updates),), math.nan, dtype=torch.float64) if found is None else found.double()


def _is_lost(run: RunResult, i: int) -> bool:
    """Whether a number that was finite before is not at checkpoint i: of what every run with values always has."""
    for name in ("accuracy", "logit_max_abs", "param_inf_norm"):
        series = _series(run, name)
        if not series[i].isfinite() and (series[i].isinf() or bool(series[:i].isfinite().any())):
            return True
    return False


def _late(count: int, share: float = 0.25) -> int:
    """Index of the first checkpoint of the run's last `share`, at least the last one."""
    return count - max(1, round(count * share))


def _returns(run: RunResult, t: StabilityThresholds, first: int) -> tuple[list[str], int | None]:
    """Collapse and swings of the mean return (the accuracy where there is none); where a collapse began.

    Where the truth moves: of the accuracy, from its best of the second half on.
    """
    if t.moving_truth:
        return _falls(run, t, max(first, _late(len(run.updates), 0.5)), _series(run, "accuracy"), "accuracy")
    score, name = _series(run, "mean_return"), "return"
    if score.isnan().all():
        score, name = _series(run, "accuracy"), "accuracy"
    return _falls(run, t, first, score, name)


def _falls(
    run: RunResult, t: StabilityThresholds, first: int, score: Tensor, name: str
) -> tuple[list[str], int | None]:
    """Whether a score (C,) collapsed or swung from checkpoint `first` on."""
    count = len(score)
    if count - first < 2 or score[first:].isnan().all():
        return [], None
    top = first + int(score[first:].nan_to_num(-math.inf).argmax())
    allowed = t.drop + t.standard_errors * _standard_error(run, float(score[top]))
    end = float(score[_late(count) :].median())
    down = [bool(score[top] - value > allowed) for value in score]
    held = max(i for i in range(count) if not down[i])  # the last checkpoint that was not down
    if held < count - 1 and score[top] - end > allowed and not _still_learning(run, held, count - 1):
        fell = f"{float(score[top]):.3f} at update {int(run.updates[top])}, {end:.3f} in the last quarter"
        return [f"collapse: {name} {fell}"], held + 1
    peak = max(first, _late(count, 0.25 if t.moving_truth else 0.5))
    worst, at = allowed, None
    for i in range(peak, count):
        peak = i if score[i] >= score[peak] else peak
        if score[peak] - score[i] > worst and not _still_learning(run, peak, i):
            worst, at = float(score[peak] - score[i]), (peak, i)
    if at is None:
        return [], None
    fell, by = " to ".join(f"{float(score[i]):.3f}" for i in at), int(run.updates[at[1]])
    return [f"swing: {name} fell from {fell} by update {by}"], None


def _still_learning(run: RunResult, start: int, end: int) -> bool:
    """Whether a loss of return from checkpoint start to end is a step on the way: values come closer to the truth all
    along, and it is the policy that lost, not the core.

    A policy that must read the sign of a small difference is wrong for a while although every value improves.
    """
    bias, regret, score = (_series(run, name)[start : end + 1] for name in
                           ("abs_bias_continue", "regret", "mean_return"))  # fmt: skip
    if bias.isnan().any() or regret.isnan().any() or score.isnan().any():
        return False
    rise = float((bias - bias.cummin(0).values).max())
    policy = float(regret[-1] - regret[0]) >= 0.8 * float(score[0] - score[-1])
    return rise <= 0.01 and float(bias[-1]) < float(bias[0]) and policy


def _standard_error(run: RunResult, share: float) -> float:
    """Of a share of right puzzles; 0 where it is not known how many there are."""
    if run.right is None or not len(run.right):
        return 0.0
    share = min(1.0, max(0.0, share))
    return math.sqrt(share * (1 - share) / len(run.right))


def _explosion(run: RunResult, t: StabilityThresholds) -> list[str]:
    """Values or logits beyond all measure, whatever they started from (twice that much is allowed)."""
    reasons = []
    value, logit = _series(run, "value_max_abs"), _series(run, "logit_max_abs")
    if not value.isnan().all():
        start = float(value[0].nan_to_num(0))
        largest, end = float(value.nan_to_num(0).max()), float(value[-1])
        if largest > max(t.value, 2 * start):
            reasons.append(f"explosion: a value of {largest:.3g} at update {_when(run, value)}, where none is above 1")
        elif end > max(t.end_value, start):
            reasons.append(f"explosion: a value of {end:.3g} at the end, where none is above 1")
    bounded = not bool((value > 1).any())
    if bounded and not logit.isnan().all():
        largest = float(logit.nan_to_num(0).max())
        if largest > max(t.logit, 2 * float(logit[0].nan_to_num(0))):
            reasons.append(f"explosion: a logit of {largest:.3g} at update {_when(run, logit)}")
    return reasons


def _when(run: RunResult, series: Tensor) -> int:
    return int(run.updates[series.nan_to_num(-math.inf).argmax()])


def _restless_targets(run: RunResult, t: StabilityThresholds) -> list[str]:
    """Targets that still move in the last quarter, and do not come closer to the truth by it."""
    drift, bias = _series(run, "target_drift"), _series(run, "abs_bias_continue")
    late = _late(len(drift))
    found = drift[late:]
    if found.isnan().all():
        return []
    values = _series(run, "value_max_abs")[late:].nan_to_num(0).max().clamp(min=1)
    mean = float(found.nanmean() / values)
    closer = float(bias[max(0, late - 1)] - bias[-1])
    if mean <= t.drift or closer >= t.progress * float(found.nansum()):
        return []
    return [f"restless targets: they move by {mean:.3f} of the values' range between checkpoints, in the last quarter"]


def _bias(run: RunResult, t: StabilityThresholds, first: int) -> list[str]:
    """Values that were closer to the truth than they are now."""
    bias = _series(run, "abs_bias_continue")
    late = _late(len(bias))
    if late <= first or bias[first:late].isnan().all() or bias[late:].isnan().all():
        return []
    before, end = float(bias[first:late].nan_to_num(math.inf).min()), float(bias[late:].nanmean())
    if end - before <= t.bias_rise:
        return []
    return [f"bias grows: |bias| of CONTINUE was {before:.3f}, and is {end:.3f} in the last quarter"]
