"""Whether what the HRM paper says about its Q-learning held in a study: one verdict a claim, by rules, never by hand.

The paper (arXiv:2506.21734, ACT section) trains its Q-head without replay and without a target network, and says why
it expects this to be stable: parameters are bounded, through AdamW's weight decay and RMSNorm after each block. Five
claims follow. `bounded_parameters` asks the baseline itself; the others are one of two rules, `needed` and `needless`,
over *contrasts*: two arms that differ in nothing but the claim's own switch. Every rule speaks about the study's
baseline; what happens around other recipes is in the table of arms.

A contrast measures three gains of the arm `present` (with weight decay, norm, target network, replay) over the arm
`absent`, each so that more is better: accuracy (paired over puzzles where the core is the same), regret saved, and the
share of unstable runs saved. With an interval [low, high] of 95 % for each:

    helps    some gain is over its margin, and its interval lies above 0
    harms    the same with the sign turned
    useless  every gain's `high` is at most its margin: no gain that matters is left in any interval

`helps` and `harms` look for one contrast of many, so their intervals are Bonferroni-corrected, for contrasts x gains;
`useless` has to be so in every contrast, which needs no correction (an intersection-union test). Under `FEW` seeds in
any of the arms nothing is decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from hrm_rl.study.info import StudyInfo
from hrm_rl.study.results import RunResult
from hrm_rl.study.statistics import (
    FEW,
    LEVEL,
    Interval,
    PuzzleDraws,
    accuracy_difference,
    by_arm,
    difference_interval,
    mean_interval,
    scores,
)

Outcome = Literal["held", "did not hold", "undecided", "not measured"]
OUTCOMES: tuple[Outcome, ...] = ("held", "did not hold", "undecided", "not measured")

# What counts as a gain that matters.
MARGINS = {
    "accuracy": 0.01,  # one puzzle of a hundred: the standard error of one run's accuracy on 1,000 puzzles
    "regret": 0.01,  # in return: as much as that puzzle earns
    "unstable": 0.3,  # none of ten against none of ten gives +-0.28: the finest that ten seeds a side can rule out
}
RARE = 0.05  # share of unstable runs that a stable recipe may have; above it for sure, it is none
_RESAMPLES = 10_000  # the corrected intervals reach far into the tails


@dataclass(frozen=True)
class Contrast:
    """Two arms that differ in one switch only. Gains are of `present` over `absent`, more is better."""

    present: str
    absent: str
    gains: dict[str, Interval]  # accuracy, regret, unstable -> gain with its 95 % interval; regret only if all have one
    corrected: dict[str, Interval]  # the same with the Bonferroni-corrected interval
    seeds: tuple[int, int]
    unstable: tuple[int, int]
    judged: tuple[int, int]  # runs whose stability could be judged: one that failed for want of memory could not
    paired: bool  # accuracy is paired over puzzles

    @property
    def helps(self) -> bool:
        return any(gain.low > 0 and gain.value > _least(name) for name, gain in self.corrected.items())

    @property
    def harms(self) -> bool:
        return any(gain.high < 0 and gain.value < -_least(name) for name, gain in self.corrected.items())

    @property
    def useless(self) -> bool:
        return all(gain.high <= MARGINS[name] for name, gain in self.gains.items())

    @property
    def few(self) -> bool:
        return min(self.seeds) < FEW

    def in_words(self) -> str:
        """Every gain with its interval."""
        parts = []
        if "accuracy" in self.gains:
            parts.append(f"accuracy {points(self.gains['accuracy'])}{', paired over puzzles' if self.paired else ''}")
        if "regret" in self.gains:
            parts.append(f"regret saved {signed(self.gains['regret'])}")
        (bad, worse), (runs, others) = self.unstable, self.judged
        parts.append(f"unstable {bad} of {runs} against {worse} of {others} runs")
        return f"{self.present} against {self.absent}: " + "; ".join(parts)


@dataclass(frozen=True)
class Verdict:
    """One line of the verdict table."""

    claim: str
    statement: str  # the claim in a sentence
    outcome: Outcome
    measured: str  # what was compared, with intervals
    reason: str  # which rule decided
    contrasts: tuple[Contrast, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A switch of the arms, and what the paper says about it."""

    name: str
    statement: str
    switch: str  # the setting that says whether it is there
    absent: tuple[Any, ...]  # values of the switch that mean it is not
    present: tuple[Any, ...] | None = None  # values that mean it is; None: all others
    own: frozenset[str] = frozenset()  # settings that only tune it: they may differ within a contrast
    carriers: frozenset[str] = frozenset()  # settings that may differ from the baseline, though not within a contrast
    needed: bool = False  # the paper needs it (True), or does without it (False)


CLAIMS = (
    Claim("weight decay", "Weight decay is part of what keeps Q-learning stable.", "weight_decay", (0,), needed=True),
    Claim(
        "post-norm", "RMSNorm is part of what keeps Q-learning stable (here: the norm of the Q-head).", "head_norm",
        ("none",), ("rmsnorm",), carriers=frozenset({"head", "head_width"}), needed=True,
    ),
    Claim(
        "no target network needed", "Q-learning is stable, and no worse, without a target network.", "target",
        ("none",), own=frozenset({"tau", "period"}),
    ),
    Claim(
        "no replay needed", "Q-learning is stable, and no worse, without replay.", "replay", ("none",),
        own=frozenset({"replay_size"}),
    ),
)  # fmt: skip


def verdicts(
    info: StudyInfo, results: Sequence[RunResult], judge: Callable[[RunResult], Any] | None = None,
    resamples: int = _RESAMPLES,
) -> list[Verdict]:  # fmt: skip
    """The verdict table, in the order in which the paper reasons.

    judge: run -> something with `.unstable` and `.judged`; `hrm_rl.study.stability.verdict` if None.
    """
    study = _Study(info, by_arm(info.in_order(results)), judge or default_judge(), PuzzleDraws(resamples))
    return [bounded_parameters(study), *(needed(study, c) if c.needed else needless(study, c) for c in CLAIMS)]


def default_judge() -> Callable[[RunResult], Any]:
    """The verdict on one run, by its documented thresholds."""
    from hrm_rl.study.stability import verdict

    return verdict


# --- the rules ------------------------------------------------------------------------------------------------


def bounded_parameters(study: _Study) -> Verdict:
    """Held: the baseline's parameters end within the optimiser's bound (ratio at most 1 in every run, and the interval
    of the mean) and the baseline is stable. Did not hold: they end beyond it (the interval lies above 1), or the
    baseline is unstable. The bound is for the limit of training (arXiv:2404.04454): the last checkpoint is asked."""
    claim = "bounded parameters"
    statement = "The parameters of the Q-head stay within the optimiser's bound, and Q-learning is stable there."
    runs = study.arms.get(study.info.baseline, [])
    ratio = scores(runs, "param_bound_ratio") if runs else np.zeros(0)
    if not np.isfinite(ratio).any():
        return Verdict(claim, statement, "not measured", f"{study.info.baseline}: no param_bound_ratio",
                       "no run of the baseline has a finite ratio of its parameters to the bound")  # fmt: skip
    (mean,) = mean_interval([ratio], resamples=study.draws.resamples)
    known = ratio[np.isfinite(ratio)]
    stable, share = study.stability(study.info.baseline)
    measured = (
        f"{study.info.baseline}: largest parameter over the bound {mean.value:.3g} {bracket(mean)}, largest of "
        f"{len(known)} runs {known.max():.3g}; {share}{study.bounded_elsewhere()}"
    )
    if len(runs) < FEW:
        return Verdict(claim, statement, "undecided", measured, _too_few(len(runs)))
    if mean.low > 1:
        return Verdict(claim, statement, "did not hold", measured, "the parameters end beyond the bound")
    if stable is False:
        return Verdict(claim, statement, "did not hold", measured, "the baseline is unstable")
    if mean.high <= 1 and known.max() <= 1 and stable:
        reason = "every run ends within the bound, and the baseline is stable"
        return Verdict(claim, statement, "held", measured, reason)
    reason = "some runs end beyond the bound, others within" if known.max() > 1 else \
        "all runs end within the bound, but the intervals are too wide to call the baseline stable"  # fmt: skip
    return Verdict(claim, statement, "undecided", measured, reason)


def needed(study: _Study, claim: Claim) -> Verdict:
    """For what the paper needs. Held: it helps in some contrast and harms in none. Did not hold: it is useless in every
    contrast, or harms in some and helps in none."""
    contrasts = study.contrasts(claim)
    missing = _cannot_tell(study, claim, contrasts)
    if missing:
        return missing
    helping, harming = [c for c in contrasts if c.helps], [c for c in contrasts if c.harms]
    if helping and not harming:
        outcome, reason = "held", f"without it the arm is worse ({_names(helping, 'absent')})"
    elif harming and not helping:
        outcome, reason = "did not hold", f"the arm is better without it ({_names(harming, 'absent')})"
    elif helping:
        outcome, reason = "undecided", "it helps in one contrast and harms in another"
    elif all(c.useless for c in contrasts):
        outcome, reason = "did not hold", "without it nothing gets worse by more than the margins"
    else:
        outcome, reason = "undecided", "the intervals are too wide: they hold both 0 and a gain that matters"
    return Verdict(claim.name, claim.statement, outcome, _in_words(contrasts), reason, tuple(contrasts))


def needless(study: _Study, claim: Claim) -> Verdict:
    """For what the paper does without. Did not hold: the baseline, which is without it, is unstable, or it helps in
    some contrast. Held: the baseline is stable, and it is useless in every contrast."""
    contrasts = study.contrasts(claim)
    missing = _cannot_tell(study, claim, contrasts)
    if missing:
        return missing
    plain = contrasts[0].absent
    stable, share = study.stability(plain)
    helping = [c for c in contrasts if c.helps]
    if helping:
        outcome, reason = "did not hold", f"with it the arm is better ({_names(helping, 'present')})"
    elif stable is False:
        outcome, reason = "did not hold", f"{plain}, without it, is unstable"
    elif stable and all(c.useless for c in contrasts):
        outcome, reason = "held", f"{plain} is stable, and with it nothing gets better by more than the margins"
    else:
        outcome, reason = "undecided", "the intervals are too wide: they hold both 0 and a gain that matters"
    return Verdict(claim.name, claim.statement, outcome, f"{share}; {_in_words(contrasts)}", reason, tuple(contrasts))


def _cannot_tell(study: _Study, claim: Claim, contrasts: Sequence[Contrast]) -> Verdict | None:
    if not contrasts:
        reason = f"no two arms differ from the baseline, or from each other, in {claim.switch} alone"
        return Verdict(claim.name, claim.statement, "not measured", "no such arm", reason)
    fewest = min(min(c.seeds) for c in contrasts)
    if fewest < FEW:
        return Verdict(claim.name, claim.statement, "undecided", _in_words(contrasts), _too_few(fewest),
                       tuple(contrasts))  # fmt: skip
    return None


def _too_few(seeds: int) -> str:
    return f"too few seeds: {seeds}, and under {FEW} an interval is not to be trusted"


# --- what the rules look at -----------------------------------------------------------------------------------


@dataclass
class _Study:
    """The runs of a study as the rules ask for them."""

    info: StudyInfo
    arms: dict[str, list[RunResult]]
    judge: Callable[[RunResult], Any]
    draws: PuzzleDraws
    _counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def unstable(self, arm: str) -> tuple[int, int]:
        """Runs of an arm that the judge calls unstable, and runs that it could judge."""
        if arm not in self._counts:
            found = [self.judge(run) for run in self.arms[arm]]
            self._counts[arm] = sum(s.unstable for s in found), sum(s.judged for s in found)
        return self._counts[arm]

    def stability(self, arm: str) -> tuple[bool | None, str]:
        """True: the share of unstable runs is surely (95 %, Wilson) below the margin. False: it is surely above `RARE`.
        None: neither. And the share in words."""
        bad, runs = self.unstable(arm)
        share = wilson(bad, runs)
        words = f"{arm}: unstable in {bad} of {runs} runs (share {bracket(share, '.0%')})"
        return (True if share.high <= MARGINS["unstable"] else False if share.low > RARE else None), words

    def setting(self, arm: str, name: str) -> Any:
        """A setting by its name, or by the last part of a dotted one; None where the arm has none."""
        values = self.info.arms.get(arm, {})
        return next((value for key, value in values.items() if _short(key) == name), None)

    def bounded_elsewhere(self) -> str:
        """How the claim's reason does around the other recipes: unstable arms whose parameters are within the bound."""
        found = []
        for arm, runs in self.arms.items():
            decays = self.setting(arm, "weight_decay")
            ratio = scores(runs, "param_bound_ratio")
            within = decays and np.isfinite(ratio).any() and np.nanmax(ratio) <= 1
            if arm != self.info.baseline and within and self.stability(arm)[0] is False:
                found.append(arm)
        return f"; elsewhere within the bound and still unstable: {_listed(found)}" if found else ""

    def contrasts(self, claim: Claim) -> list[Contrast]:
        """All pairs of arms that differ in the claim's switch alone, both like the baseline in everything else.

        Where the baseline has what the claim is about, it is the one that others are compared with: of several amounts
        of weight decay the recipe's own counts.
        """
        base = self.info.baseline
        if base not in self.arms or base not in self.info.arms:
            return []
        near = [arm for arm in self.arms if arm in self.info.arms
                and self._apart(arm, base) <= {claim.switch} | claim.own | claim.carriers]  # fmt: skip
        pairs = []
        for absent in (arm for arm in near if self._has(arm, claim) is False):
            matched = [arm for arm in near if self._has(arm, claim)
                       and self._apart(arm, absent) <= {claim.switch} | claim.own]  # fmt: skip
            pairs += [(arm, absent) for arm in ([base] if base in matched else matched)]
        gains = 2 + any(self._regret(a) is not None and self._regret(b) is not None for a, b in pairs)
        level = 1 - (1 - LEVEL) / max(1, gains * len(pairs))
        return [self._contrast(present, absent, level) for present, absent in pairs]

    def _has(self, arm: str, claim: Claim) -> bool | None:
        """Whether the arm has it; None for a value that the claim is not about (or an unknown amount)."""
        value = self.setting(arm, claim.switch)
        if value is None:  # a live arm that does not say so has none; what decays it by default is not known here
            return None if claim.switch == "weight_decay" else False
        if value in claim.absent:
            return False
        return True if claim.present is None or value in claim.present else None

    def _apart(self, one: str, other: str) -> set[str]:
        """Short names of the settings in which two arms differ."""
        a, b, nothing = self.info.arms[one], self.info.arms[other], object()
        return {_short(key) for key in {*a, *b} if a.get(key, nothing) != b.get(key, nothing)}

    def _regret(self, arm: str) -> np.ndarray | None:
        """(R,) regret of the arm's runs; None where a run has none."""
        found = scores(self.arms[arm], "regret")
        return found if np.isfinite(found).all() else None

    def _contrast(self, present: str, absent: str, level: float) -> Contrast:
        one, other = self.arms[present], self.arms[absent]
        (bad, worse), (runs, others) = zip(self.unstable(present), self.unstable(absent), strict=True)
        found, paired = [], False
        for asked in (LEVEL, level):
            gains: dict[str, Interval] = {}
            over_puzzles = accuracy_difference(one, other, self.draws, asked)
            paired = over_puzzles is not None
            accuracy = over_puzzles or difference_interval(
                scores(one, "accuracy"), scores(other, "accuracy"), asked, self.draws.resamples)[0]  # fmt: skip
            gains["accuracy"] = accuracy
            lost, before = self._regret(present), self._regret(absent)
            if lost is not None and before is not None:
                gains["regret"] = difference_interval(before, lost, asked, self.draws.resamples)[0]
            gains["unstable"] = share_difference(worse, others, bad, runs, asked)
            found.append(gains)
        seeds = len(one), len(other)
        return Contrast(present, absent, found[0], found[1], seeds, (bad, worse), (runs, others), paired)


def wilson(count: int, runs: int, level: float = LEVEL) -> Interval:
    """A share and its score interval (Wilson, 1927)."""
    if not runs:
        return Interval(math.nan)
    found = stats.binomtest(count, runs).proportion_ci(level, method="wilson")
    return Interval(count / runs, float(found.low), float(found.high))


def share_difference(count: int, runs: int, other_count: int, other_runs: int, level: float = LEVEL) -> Interval:
    """Difference of two shares, the first minus the other, by Newcombe's hybrid score interval (1998, Statistics in
    Medicine 17, method 10). SciPy has none; a bootstrap gives no width where all runs end alike."""
    one, other = wilson(count, runs, level), wilson(other_count, other_runs, level)
    value = one.value - other.value
    return Interval(
        value,
        value - math.hypot(one.value - one.low, other.high - other.value),
        value + math.hypot(one.high - one.value, other.value - other.low),
    )


# --- words ----------------------------------------------------------------------------------------------------


def points(interval: Interval) -> str:
    """A difference of shares in percentage points, with its interval."""
    return f"{100 * interval.value:+.1f} points {bracket(interval, '+.1f', 100)}"


def signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} {bracket(interval, '+.3f')}"


def bracket(interval: Interval, form: str = ".3g", scale: float = 1) -> str:
    """The interval alone."""
    return f"[{scale * interval.low:{form}}, {scale * interval.high:{form}}]" if interval.known else "[no interval]"


def _least(name: str) -> float:
    """The gain that has to be passed. Of runs there is no smaller one than the interval can tell from none."""
    return 0.0 if name == "unstable" else MARGINS[name]


def _short(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _names(contrasts: Sequence[Contrast], side: str) -> str:
    return _listed([getattr(contrast, side) for contrast in contrasts])


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _in_words(contrasts: Sequence[Contrast], most: int = 3) -> str:
    """Those with the largest gain of accuracy either way first; the rest are counted."""
    order = sorted(contrasts, key=lambda c: -abs(c.gains["accuracy"].value))
    shown = "; ".join(contrast.in_words() for contrast in order[:most])
    return shown if len(order) <= most else f"{shown}; and {len(order) - most} more contrasts"
