"""Where to set the threshold of a halting rule, from what the rule did on held-out puzzles: pure functions.

A rule is a score, larger = readier to halt, held against a threshold. The score does not depend on the threshold, so
one recording gives every point of the accuracy-compute curve. Letters: M segments, N puzzles, K thresholds.

Three criteria: the fewest steps that keep the accuracy (`for_drop`), a number of mean steps (`for_steps`), and the
fewest steps under a risk bound with a guarantee (`for_risk`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Bound = Literal["binomial", "hoeffding"]
_TIE = 1e-9  # accuracies are means of 0 and 1: closer than this is the same


def halting_steps(scores: Tensor, threshold: float, strict: bool = False) -> Tensor:
    """First segment whose score reaches the threshold (`>` where strict, else `>=`), the last one where none does.

    scores (M, N) float32 -> (N,) int64 in 1..M. A NaN reaches nothing.
    """
    over = scores > threshold if strict else scores >= threshold
    over[-1] = True  # the budget; `over` is a new tensor
    return over.int().argmax(dim=0) + 1


def read_at(values: Tensor, steps: Tensor) -> Tensor:
    """values (M, N, ...) read at each puzzle's own segment, steps (N,) in 1..M -> (N, ...)."""
    return values[steps - 1, torch.arange(values.shape[1])]


def candidates(scores: Tensor, most: int = 512) -> Tensor:
    """Thresholds between which the halting differs, ascending: (K,) float64, at most `most` + 2.

    scores (M, N). Only the running maximum counts, and only before the budget. Thresholds lie halfway between values
    that occur, so that rounding (another batch size, another machine) moves no halt; with the first everything halts
    at once, with the last nothing before the budget. Of more than `most`, evenly spaced ones are taken.
    """
    values = scores[:-1].cummax(dim=0).values.unique() if len(scores) > 1 else scores.new_zeros(0)
    values = values[values.isfinite()].double()
    if not len(values):
        values = torch.zeros(1, dtype=torch.float64)
    between = (values[1:] + values[:-1]) / 2
    if len(between) > most:
        between = between[torch.linspace(0, len(between) - 1, most).round().long()]
    apart = 1e-3 * values[[0, -1]].abs().clamp(min=1)
    return torch.cat((values[:1] - apart[:1], between, values[-1:] + apart[1:]))


@dataclass(frozen=True)
class Curve:
    """What every threshold gives, on one set of puzzles."""

    thresholds: Tensor  # (K,) float64, ascending: later halts
    accuracy: Tensor  # (K,) float64
    mean_steps: Tensor  # (K,) float64
    lost: Tensor  # (K,) float64, share of puzzles right at the budget and wrong at the halt
    drop: Tensor  # (K,) float64, accuracy at the budget minus accuracy at the halt; negative where halting gains


def curve(scores: Tensor, exact: Tensor, thresholds: Tensor, strict: bool = False) -> Curve:
    """The accuracy-compute curve of a score (M, N) with exact (M, N) bool, at thresholds (K,)."""
    rows = []
    for threshold in thresholds.tolist():
        steps = halting_steps(scores, threshold, strict)
        right = read_at(exact, steps)
        lost = (exact[-1] & ~right).double().mean()
        rows.append(torch.stack((right.double().mean(), steps.double().mean(), lost)))
    accuracy, mean_steps, lost = torch.stack(rows).unbind(-1)
    return Curve(thresholds, accuracy, mean_steps, lost, exact[-1].double().mean() - accuracy)


@dataclass(frozen=True)
class Choice:
    """A threshold and what it does on the puzzles it was chosen on. `note` says what was not met; else empty."""

    threshold: float
    accuracy: float
    mean_steps: float
    note: str = ""


def _choice(found: Curve, k: int, note: str = "") -> Choice:
    return Choice(*(float(x[k]) for x in (found.thresholds, found.accuracy, found.mean_steps)), note)


def for_drop(found: Curve, drop: float, reference: float | None = None) -> Choice:
    """The fewest mean steps whose accuracy is at least reference - drop.

    reference: None is the best accuracy on the curve itself. Where nothing reaches it, the most accurate point is
    taken and the note says so. A point estimate without guarantee: see `for_risk` for one.
    """
    wanted = (float(found.accuracy.max()) if reference is None else reference) - drop
    enough = found.accuracy >= wanted - _TIE
    if not bool(enough.any()):
        best = found.accuracy >= found.accuracy.max() - _TIE
        note = f"no threshold reaches {wanted:.1%} on the validation puzzles"
        return _choice(found, _first_min(found.mean_steps, best), note)
    return _choice(found, _first_min(found.mean_steps, enough))


def for_steps(found: Curve, mean_steps: float) -> Choice:
    """The threshold whose mean steps come closest to `mean_steps` (of two alike, the one with fewer)."""
    off = (found.mean_steps - mean_steps).abs()
    closest = off <= off.min() + _TIE
    return _choice(found, _first_min(found.mean_steps, closest))


def _first_min(values: Tensor, allowed: Tensor) -> int:
    return int(values.masked_fill(~allowed, float("inf")).argmin())


# --- the risk bound -------------------------------------------------------------------------------------------


def binomial_p(lost: float, count: int, delta: float) -> float:
    """P-value of "the risk exceeds delta" for a loss of 0 or 1: P(Binomial(count, delta) <= count * lost), exact."""
    return float(stats.binom.cdf(round(lost * count), count, delta))


def hoeffding_p(drop: float, count: int, delta: float) -> float:
    """P-value of "the mean drop exceeds delta", drops in [-1, 1]: exp(-count * (delta - drop)+^2 / 2) (Hoeffding)."""
    return float(np.exp(-count * max(0.0, delta - drop) ** 2 / 2))


def split(count: int) -> tuple[Tensor, Tensor]:
    """(index of the puzzles that propose thresholds, index of those that test them): each fourth, and the rest."""
    index = torch.arange(count)
    return index[index % 4 == 0], index[index % 4 != 0]


def for_risk(
    scores: Tensor, exact: Tensor, delta: float, alpha: float, bound: Bound = "binomial", strict: bool = False,
    grid: int = 50,
) -> Choice:  # fmt: skip
    """The fewest steps such that P(accuracy lost against the full budget > delta) <= alpha.

    Guarantee: distribution-free and for finite samples, over the draw of the validation puzzles, which must be drawn
    like those the threshold is used on and must not have been trained on. Learn-then-Test (arXiv:2110.01052; CALM,
    arXiv:2207.07061, section 4) by fixed-sequence testing: thresholds are tested from the latest halts to the
    earliest, each with a p-value of "its risk exceeds delta" at level alpha, and the first that is not rejected ends
    it. The thresholds come from a fourth of the puzzles and the p-values from the others, so that the sequence is
    fixed before it is tested.

    bound: binomial bounds the share of puzzles that are right at the budget and wrong at the halt (exact for 0-1
    losses, and never less than the drop of the accuracy); hoeffding bounds the drop of the accuracy itself, where
    answers that halting saves count against those it loses, at the price of a wider interval.

    scores (M, N), exact (M, N). Where nothing can be shown, the threshold is the one that never halts before the
    budget (no loss by definition), and the note says so.
    """
    propose, test = split(exact.shape[1])
    if not len(test):
        propose = test = torch.arange(exact.shape[1])  # one puzzle: nothing will be shown of it
    ordered = candidates(scores[:, propose], grid).flip(0)
    never = float("inf")
    tested = curve(scores[:, test], exact[:, test], torch.cat((torch.tensor([never], dtype=torch.float64), ordered)),
                   strict)  # fmt: skip
    p_value: Callable[[int], float] = {
        "binomial": lambda k: binomial_p(float(tested.lost[k]), len(test), delta),
        "hoeffding": lambda k: hoeffding_p(float(tested.drop[k]), len(test), delta),
    }[bound]
    last = 0
    for k in range(1, len(tested.thresholds)):
        if p_value(k) > alpha:
            break
        last = k
    note = "" if last else f"no threshold can be shown to lose at most {delta:.1%} with {len(test)} puzzles"
    return _choice(tested, last, note)
