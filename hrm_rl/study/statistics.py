"""What the runs of a study say about its arms: intervals over seeds and puzzles, worst cases, chances of improvement.

Letters: R runs (seeds) of an arm, K metrics, N puzzles, B resamples. All numbers are float64 on the CPU.

What is resampled. An arm's seeds are drawn with replacement within a stratum, and a stratum is the runs that were
measured on the same puzzles with the same core (`RunResult.puzzles`): the stratified bootstrap of Agarwal et al. (2021,
arXiv:2108.13264, section 4.1), with percentile intervals as there. A live run trains a core of its own and is the only
one of its kind: such runs are one stratum (`drawn_together`), or no interval would know of the seeds. Accuracy has an
answer for each puzzle, and its puzzles are drawn as well: one draw of puzzles for all runs of a stratum, the arm's and
the baseline's, so that a difference of two arms on the same core is paired over puzzles. Seeds are crossed with
puzzles, not nested; such a two-way bootstrap errs on the wide side (Owen, 2007, "The pigeonhole bootstrap",
arXiv:0712.1111). Two arms' seeds are drawn independently, also where the seeds have the same numbers, which errs on the
wide side too.

With ten seeds a percentile interval of 95 % holds the true mean in about nine cases of ten (tests/study/
test_statistics.py measures it); with three it does not deserve the name. Under `FEW` seeds `ArmSummary.few` is set.

Runs that diverged or failed are counted, never dropped, and their last finite value is not their result: they solve
nothing, so their accuracy is 0 (`WORST_CASE`); elsewhere they have no value (NaN), means are over the runs that have
one (`MetricSummary.measured` says how many), a worst seed does not exist while any run has no value, and in the
chance of improvement a run without a value loses against every run with one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray
from scipy import stats

from hrm_rl.study.results import RunResult

LEVEL = 0.95
RESAMPLES = 2000
FEW = 5  # seeds; below, the intervals cover too little (arXiv:2108.13264, figure 4; REFERENCES C.4)
TAIL = 0.2  # share of the seeds that CVaR looks at
WORST_CASE = {"accuracy": 0.0}  # what a run without a result scored
_CHUNK = 1 << 22  # drawn puzzles that are held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval it lies in; low and high are NaN where there is none (a single run)."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and `value` lies outside of it."""
        return self.known and not self.low <= value <= self.high


NOTHING = Interval(math.nan)


@dataclass(frozen=True)
class MetricSummary:
    """One metric of one arm at the last checkpoint."""

    finals: tuple[float, ...]  # (R,) in the order of ArmSummary.seeds; NaN for a run without a value
    measured: int  # runs with a value
    mean: Interval
    worst: float  # the worst seed; NaN where a run has no value or the metric has no better side
    cvar: float  # mean of the worst 20 % of the seeds, one at least; NaN as above
    iqm: Interval  # interquartile mean of the seeds' scores; NaN where they are all 0 or 1
    difference: Interval  # this arm minus the baseline; NaN for the baseline itself
    paired: bool  # the difference is paired over puzzles
    improvement: Interval  # P(a seed of this arm is better than one of the baseline), ties half


@dataclass(frozen=True)
class ArmSummary:
    """All metrics of one arm, and how its runs ended."""

    arm: str
    seeds: tuple[int, ...]  # (R,) ascending
    finished: int
    diverged: int
    failed: int
    metrics: dict[str, MetricSummary] = field(default_factory=dict)

    @property
    def few(self) -> bool:
        """Whether there are too few seeds for the intervals to be trusted; a report must say so."""
        return len(self.seeds) < FEW


# --- one run's score ------------------------------------------------------------------------------------------


def score(run: RunResult, metric: str) -> float:
    """What a run counts with: its last value if it finished, else the worst case where there is one, else NaN."""
    value = run.final(metric)
    if run.status == "finished" and (math.isfinite(value) or metric not in run.metrics):
        return value
    return WORST_CASE.get(metric, math.nan)


def scores(runs: Sequence[RunResult], metric: str) -> ndarray:
    """(R,) float64, in the order of the runs."""
    return np.array([score(run, metric) for run in runs], dtype=np.float64)


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Arm -> its runs by seed; arms in the order of their first run."""
    arms: dict[str, list[RunResult]] = {}
    for run in results:
        arms.setdefault(run.arm, []).append(run)
    return {arm: sorted(runs, key=lambda run: run.seed) for arm, runs in arms.items()}


# --- the worst seeds ------------------------------------------------------------------------------------------


def worst(values: ndarray, direction: int) -> float:
    """The worst of (R,) scores; direction +1: higher is better, -1: lower is. NaN if any is, or if direction is 0."""
    return _tail_mean(values, direction, 1)


def cvar(values: ndarray, direction: int, share: float = TAIL) -> float:
    """Mean of the worst `share` of (R,) scores, rounded down to whole seeds, one at least; NaN as in `worst`."""
    return _tail_mean(values, direction, max(1, math.floor(share * len(values) + 1e-9)))


def _tail_mean(values: ndarray, direction: int, size: int) -> float:
    if direction == 0 or not len(values) or not np.isfinite(values).all():
        return math.nan
    return float(direction * np.sort(direction * np.asarray(values, dtype=np.float64))[:size].mean())


# --- intervals over seeds -------------------------------------------------------------------------------------


def mean_interval(strata: Sequence[ndarray], level: float = LEVEL, resamples: int = RESAMPLES) -> list[Interval]:
    """Mean over all runs, with its stratified-bootstrap interval over seeds, of K metrics at once.

    strata: one (K, R_s) array a stratum; seeds are drawn within each, all metrics on the same draws. A metric with NaN
    among its runs is averaged over the others. K intervals; no interval where fewer than two runs have a value.
    """
    return _rowwise([np.atleast_2d(part) for part in strata], lambda parts: _means(parts, level, resamples, _mean_of))


def iqm_interval(values: ndarray, level: float = LEVEL, resamples: int = RESAMPLES) -> list[Interval]:
    """Interquartile mean (of the middle half) of per-seed scores (K, R), with bootstrap intervals over seeds.

    Only for scores of whole runs: of outcomes that are 0 or 1 it throws away the very failures it is asked about.
    ValueError for those. Even of scores it hides rare failures: read it beside the worst seed.
    """
    values = np.atleast_2d(values)
    if any(looks_like_outcomes(row) for row in values):
        raise ValueError("the IQM takes one score a seed, not outcomes that are true or false (0 or 1)")
    return _rowwise([values], lambda parts: _means(parts, level, resamples, _iqm_of))


def looks_like_outcomes(values: ndarray) -> bool:
    """Whether all of (R,) are 0 or 1, of type bool or not: single answers, not scores of runs."""
    values = np.asarray(values)
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return values.dtype == bool or bool(known.size and np.isin(known, (0, 1)).all())


def difference_interval(
    one: ndarray, other: ndarray, level: float = LEVEL, resamples: int = RESAMPLES
) -> list[Interval]:
    """mean(one) - mean(other) of K metrics with its bootstrap interval; seeds of (K, R) and (K, R') drawn apart."""
    def found(parts: list[ndarray]) -> list[Interval]:
        if len(parts) < 2 or min(part.shape[-1] for part in parts) == 0:
            return [NOTHING] * len(parts[0])
        values = parts[0].mean(-1) - parts[1].mean(-1)
        if min(part.shape[-1] for part in parts) < 2:
            return [Interval(float(value)) for value in values]
        return _bootstrap(parts, lambda a, b, axis=-1: a.mean(axis) - b.mean(axis), values, level, resamples)

    return _rowwise([np.atleast_2d(one), np.atleast_2d(other)], found)


def improvement_interval(
    one: ndarray, other: ndarray, directions: ndarray, level: float = LEVEL, resamples: int = RESAMPLES
) -> list[Interval]:
    """P(X better than Y) + P(X = Y) / 2 for a run X of `one` and Y of `other` (arXiv:2108.13264, equation 2).

    one (K, R), other (K, R'), directions (K,) +1 higher is better, -1 lower is, 0 neither (NaN). A run without a value
    (NaN) loses against every run with one. Seeds of both are drawn apart. No interval with a single run on a side.
    """
    directions = np.atleast_1d(np.asarray(directions))
    x, y = (np.where(np.isnan(side), -np.inf, side * directions[:, None])
            for side in (np.atleast_2d(one), np.atleast_2d(other)))  # fmt: skip
    if not x.shape[-1] or not y.shape[-1]:
        return [NOTHING] * len(x)
    wins = (np.sign(_compare(x[:, :, None], y[:, None, :])) + 1) / 2  # (K, R, R'): 1 better, 1/2 tie, 0 worse
    values = wins.mean((1, 2))
    if min(x.shape[-1], y.shape[-1]) < 2:
        found = [Interval(float(value)) for value in values]
    else:  # runs are drawn by number, so that no pair is compared twice
        first, second = np.arange(x.shape[-1]), np.arange(y.shape[-1])

        def drawn(i: ndarray, j: ndarray, axis: int = -1) -> ndarray:
            """P of resamples: i (..., B, R), j (..., B, R') are numbers of runs -> (K, B) or (K,)."""
            taken, against = _counts(i, x.shape[-1]), _counts(j, y.shape[-1])
            return np.clip(np.einsum("...r,krs,...s->k...", taken, wins, against), 0, 1)  # rounding

        found = _bootstrap([first, second], drawn, values, level, resamples)
    return [interval if way else NOTHING for interval, way in zip(found, directions, strict=True)]


def _compare(a: ndarray, b: ndarray) -> ndarray:
    """1 where a > b, -1 where a < b, 0 where equal, infinities too."""
    return (a > b).astype(np.float64) - (a < b)


def _counts(numbers: ndarray, size: int) -> ndarray:
    """How often each of 0..size-1 occurs in the last axis, as shares: (..., R) -> (..., size)."""
    return (numbers[..., :, None] == np.arange(size)).mean(-2)


def _means(parts: list[ndarray], level: float, resamples: int, middle) -> list[Interval]:
    """Mean over the runs of all strata, (K, R_s) each without NaN."""
    parts = [part for part in parts if part.shape[-1]]
    if not parts:
        return []
    weights = np.array([part.shape[-1] for part in parts], dtype=np.float64)
    weights /= weights.sum()

    def statistic(*drawn: ndarray, axis: int = -1) -> ndarray:
        return sum(weight * middle(part, axis) for weight, part in zip(weights, drawn, strict=True))

    values = statistic(*parts)
    if sum(part.shape[-1] for part in parts) < 2:
        return [Interval(float(value)) for value in values]
    parts = [np.repeat(part, 2, axis=-1) if part.shape[-1] == 1 else part for part in parts]  # SciPy wants two
    return _bootstrap(parts, statistic, values, level, resamples)


def _mean_of(part: ndarray, axis: int) -> ndarray:
    return part.mean(axis)


def _iqm_of(part: ndarray, axis: int) -> ndarray:
    return stats.trim_mean(part, 0.25, axis=axis)


def _bootstrap(samples: list[ndarray], statistic, values: ndarray, level: float, resamples: int) -> list[Interval]:
    """Percentile intervals of scipy.stats.bootstrap; each sample is drawn by itself along its last axis."""
    with np.errstate(over="ignore", invalid="ignore"):  # its standard error, of values that exploded
        found = stats.bootstrap(
            samples, statistic, vectorized=True, axis=-1, n_resamples=resamples, confidence_level=level,
            method="percentile", random_state=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return [Interval(*map(float, row)) for row in zip(values, found.low, found.high, strict=True)]


def _rowwise(parts: list[ndarray], interval_of) -> list[Interval]:
    """Intervals of K rows, those with the same runs missing (NaN) at once: `interval_of` sees no NaN."""
    rows = len(parts[0])
    present = np.concatenate([np.isfinite(part) for part in parts], axis=-1)  # (K, all runs)
    edges = np.cumsum([part.shape[-1] for part in parts])[:-1]
    found = [NOTHING] * rows
    for pattern in np.unique(present, axis=0):
        if not pattern.any():
            continue
        which = (present == pattern).all(-1).nonzero()[0]
        held = [part[which][:, mask] for part, mask in zip(parts, np.split(pattern, edges), strict=True)]
        for row, interval in zip(which, interval_of(held), strict=True):
            found[row] = interval
    return found


# --- intervals over seeds and puzzles -------------------------------------------------------------------------


class PuzzleDraws:
    """Accuracy of runs on redrawn puzzles, the same draws for all runs that share their puzzles.

    An own function: scipy.stats.bootstrap draws along one axis of each sample, and here one draw of puzzles is common
    to all seeds (of both arms of a difference) while the seeds are drawn as well.
    """

    def __init__(self, resamples: int = RESAMPLES, seed: int = 0):
        self.resamples, self.seed = resamples, seed
        self._held: dict[tuple[str, int], ndarray] = {}  # (puzzles, id of a run) -> (B,)
        self._runs: list[RunResult] = []  # keeps the ids alive

    def prepare(self, runs: Sequence[RunResult]) -> None:
        """Draw for many runs at once, which is much faster than one by one."""
        groups: dict[str, list[RunResult]] = {}
        for run in runs:
            if has_answers(run) and (run.puzzles, id(run)) not in self._held:
                groups.setdefault(run.puzzles, []).append(run)
        for puzzles, held in groups.items():
            sizes = {len(run.right) for run in held}
            if len(sizes) > 1:
                raise ValueError(f"runs on the puzzles {puzzles[:12]} disagree about their number: {sorted(sizes)}")
            right = np.stack([run.right.numpy().astype(np.float32) for run in held])
            for run, row in zip(held, self._on_redrawn(right), strict=True):
                self._held[puzzles, id(run)] = row
            self._runs += held

    def _on_redrawn(self, right: ndarray) -> ndarray:
        """(R, N) -> (R, B): share of right answers on each draw of N puzzles. The draws depend on N and the seed."""
        puzzles = right.shape[-1]
        rng, found = np.random.default_rng([self.seed, puzzles]), []
        chunk = max(1, _CHUNK // puzzles)
        for start in range(0, self.resamples, chunk):
            size = min(chunk, self.resamples - start)
            drawn = rng.integers(puzzles, size=(size, puzzles)) + puzzles * np.arange(size)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=size * puzzles).reshape(size, puzzles)
            found.append(right @ counts.T.astype(np.float32))  # whole numbers below 2^24: exact
        return np.concatenate(found, axis=-1).astype(np.float64) / puzzles

    def of_arm(self, runs: Sequence[RunResult], stream: int) -> ndarray | None:
        """(B,) mean accuracy of an arm on redrawn seeds and puzzles; None where its runs do not tell their answers.

        `stream` names the draw of seeds: two arms of a difference have two.
        """
        if answered_strata(runs) is None:
            return None
        self.prepare(runs)
        rng, total = np.random.default_rng([self.seed, stream, len(runs)]), np.zeros(self.resamples)
        for held in ([runs[i] for i in places] for places in drawn_together(runs)):
            rows = [self._held[run.puzzles, id(run)] if has_answers(run) else np.zeros(self.resamples) for run in held]
            table = np.stack(rows)
            total += np.take_along_axis(table, rng.integers(len(held), size=table.shape), axis=0).sum(0)
        return total / len(runs)


def has_answers(run: RunResult) -> bool:
    """Whether a run finished and tells which puzzles its accuracy is about, answer by answer."""
    if run.status != "finished" or run.right is None or not len(run.right) or not run.puzzles:
        return False
    return abs(float(run.right.double().mean()) - run.final("accuracy")) < 1e-6


def strata_of(runs: Sequence[RunResult]) -> dict[str, list[int]]:
    """Puzzles -> places of the runs that were measured on them.

    A run that names no puzzles (it failed before it had any) belongs to the arm's, where those are the only ones.
    """
    named = sorted({run.puzzles for run in runs if run.puzzles})
    home = named[0] if len(named) == 1 else ""
    strata: dict[str, list[int]] = {puzzles: [] for puzzles in named}
    for i, run in enumerate(runs):
        strata.setdefault(run.puzzles or home, []).append(i)
    return strata


def drawn_together(runs: Sequence[RunResult]) -> list[list[int]]:
    """Places of the runs that are drawn in place of each other: every stratum, those of a single run as one.

    Drawn by itself a single run has no spread. It joins the others that are alone, and those that name no puzzles.
    """
    strata = strata_of(runs)
    alone = [i for puzzles, places in strata.items() if len(places) == 1 or not puzzles for i in places]
    many = [places for puzzles, places in strata.items() if len(places) > 1 and puzzles]
    return [*many, sorted(alone)] if alone else many


def answered_strata(runs: Sequence[RunResult]) -> dict[str, list[RunResult]] | None:
    """Puzzles -> runs, where each run has answers or solved nothing because it diverged or failed; else None."""
    if not any(map(has_answers, runs)) or any(run.status == "finished" and not has_answers(run) for run in runs):
        return None
    strata = strata_of(runs)
    return None if "" in strata else {puzzles: [runs[i] for i in places] for puzzles, places in strata.items()}


def share_puzzles(one: Sequence[RunResult], other: Sequence[RunResult]) -> bool:
    """Whether two arms can be compared puzzle by puzzle: the same core on the same puzzles."""
    first, second = answered_strata(one), answered_strata(other)
    return first is not None and second is not None and set(first) == set(second)


def accuracy_interval(runs: Sequence[RunResult], draws: PuzzleDraws, level: float = LEVEL) -> Interval | None:
    """Mean accuracy with its interval over seeds and puzzles; None where the answers are not known."""
    found = draws.of_arm(runs, 0) if len(runs) > 1 else None
    return None if found is None else Interval(float(scores(runs, "accuracy").mean()), *_percentiles(found, level))


def accuracy_difference(
    one: Sequence[RunResult], other: Sequence[RunResult], draws: PuzzleDraws, level: float = LEVEL
) -> Interval | None:
    """Difference of mean accuracies, paired over puzzles; None where the arms do not share them."""
    if not share_puzzles(one, other) or min(len(one), len(other)) < 2:
        return None
    value = scores(one, "accuracy").mean() - scores(other, "accuracy").mean()
    return Interval(float(value), *_percentiles(draws.of_arm(one, 1) - draws.of_arm(other, 2), level))


def _percentiles(drawn: ndarray, level: float) -> tuple[float, float]:
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


# --- a whole study --------------------------------------------------------------------------------------------


def summarise(
    results: Sequence[RunResult], baseline: str, directions: Mapping[str, int], resamples: int = RESAMPLES
) -> dict[str, ArmSummary]:
    """Arm -> summary, the baseline first, else in the order of the results.

    directions: metric -> +1 higher is better, -1 lower is, 0 neither; metrics that are not in it have none. A metric
    that no run of the study has is left out. Without a run of the baseline there are no differences.
    """
    arms = by_arm(results)
    order = sorted(arms, key=lambda arm: arm != baseline)
    names = metric_names(results)
    way = np.array([directions.get(name, 0) for name in names])
    draws = PuzzleDraws(resamples)
    draws.prepare(results)
    base = arms.get(baseline)
    against = _matrix(base, names) if base else None
    return {arm: _summary(arm, arms[arm], base, against, names, way, draws) for arm in order}


def metric_names(results: Sequence[RunResult]) -> list[str]:
    """All metrics of a study, in the order in which runs name them."""
    return list(dict.fromkeys(name for run in results for name in run.metrics))


def _matrix(runs: Sequence[RunResult], names: Sequence[str]) -> ndarray:
    """(K, R) scores."""
    return np.stack([scores(runs, name) for name in names]) if names else np.zeros((0, len(runs)))


def _summary(
    arm: str, runs: list[RunResult], base: list[RunResult] | None, against: ndarray | None, names: list[str],
    way: ndarray, draws: PuzzleDraws,
) -> ArmSummary:  # fmt: skip
    ends = [run.status for run in runs]
    summary = ArmSummary(
        arm, tuple(run.seed for run in runs), *(ends.count(end) for end in ("finished", "diverged", "failed"))
    )
    if not names:
        return summary
    table = _matrix(runs, names)
    strata = [table[:, places] for places in drawn_together(runs)]
    means = mean_interval(strata, resamples=draws.resamples)
    scored = [k for k in range(len(names)) if not looks_like_outcomes(table[k])]
    middles = dict(zip(scored, iqm_interval(table[scored], resamples=draws.resamples), strict=True)) if scored else {}
    other = None if base is None or runs is base else base
    differences = improvements = [NOTHING] * len(names)
    if other is not None:
        differences = difference_interval(table, against, resamples=draws.resamples)
        improvements = improvement_interval(table, against, way, resamples=draws.resamples)
    for k, name in enumerate(names):
        mean, difference, paired = means[k], differences[k], False
        if name == "accuracy":
            mean = accuracy_interval(runs, draws) or mean
            over_puzzles = accuracy_difference(runs, other, draws) if other is not None else None
            difference, paired = over_puzzles or difference, over_puzzles is not None
        values = table[k]
        summary.metrics[name] = MetricSummary(
            finals=tuple(values.tolist()), measured=int(np.isfinite(values).sum()), mean=mean,
            worst=worst(values, way[k]), cvar=cvar(values, way[k]), iqm=middles.get(k, NOTHING),
            difference=difference, paired=paired, improvement=improvements[k],
        )  # fmt: skip
    return summary
