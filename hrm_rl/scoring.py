"""What halting rules are worth, as pure functions of what they did puzzle by puzzle. N puzzles, M segments, K bins.

Everything is float64 on the CPU. Intervals are percentile bootstrap intervals of `scipy.stats.bootstrap`, paired over
puzzles: two rules are compared on the same draw of puzzles, which takes the difficulty of the puzzles out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from hrm_rl.tasks import PuzzleSet


def auroc(scores: Tensor, right: Tensor) -> float | None:
    """P(a right answer's score > a wrong one's), ties half: area under the ROC curve, by ranks (Mann-Whitney).

    scores, right of one shape. None where all are right or all are wrong.
    """
    values, positive = scores.double().flatten().numpy(), right.bool().flatten().numpy()
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return None
    ranks = stats.rankdata(values)
    return float((ranks[positive].sum() - wins * (wins + 1) / 2) / (wins * losses))


def brier(probability: Tensor, right: Tensor) -> float:
    """Mean squared difference between a probability of being right and being right (1) or not (0)."""
    return float((probability.double() - right.double()).square().mean())


def ece(probability: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error over equally wide bins (arXiv:1706.04599): mean over the answers of
    |share of right ones - mean probability| of their bin; probability in [0, 1], right of one shape."""
    p, y = probability.double().flatten(), right.double().flatten()
    place = (p * bins).long().clamp(max=bins - 1)
    apart = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, y - p)
    return float(apart.abs().sum() / len(p))


def returns(right: Tensor, steps: Tensor, ponder_cost: float) -> Tensor:
    """Return of each episode (DESIGN, section 3): 1 if the answer at the halt is right, less the cost of each
    CONTINUE before it. right (N,) bool or a chance in [0, 1], steps (N,) -> (N,) float64."""
    return right.double() - ponder_cost * (steps.double() - 1)


def optimal_returns(exact: Tensor, ponder_cost: float) -> Tensor:
    """Best return that any halting could have had on each puzzle: max over m of exact_m - cost (m - 1).

    exact (M, N) bool -> (N,) float64.
    """
    segments = torch.arange(1, len(exact) + 1)[:, None]
    return returns(exact, segments.expand_as(exact), ponder_cost).amax(dim=0)


def regret(exact: Tensor, steps: Tensor, ponder_cost: float) -> float:
    """Mean over puzzles of the optimal return minus the one obtained by halting at steps (N,); never negative."""
    right = exact.gather(0, (steps - 1)[None])[0]
    return float((optimal_returns(exact, ponder_cost) - returns(right, steps, ponder_cost)).mean())


def mixed_fixed(exact: Tensor, mean_steps: float) -> Tensor:
    """A fixed number of segments with exactly these mean steps: k or k + 1 at random, the same chance for every
    puzzle. exact (M, N) bool -> (N,) float64, each puzzle's chance of being right."""
    low = int(np.clip(np.floor(mean_steps), 1, len(exact)))
    high = min(low + 1, len(exact))
    share = float(np.clip(mean_steps - low, 0, 1))
    return (1 - share) * exact[low - 1].double() + share * exact[high - 1].double()


# --- intervals ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Mean of one thing minus the mean of another on the same puzzles, and the interval it lies in."""

    mean: float
    low: float
    high: float


def paired_differences(
    one: Sequence[Tensor], other: Sequence[Tensor], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Difference]:
    """Differences of means, one[i] - other[i], each (N,), all on the same N puzzles and the same resamples.

    Percentile bootstrap, paired over puzzles. With a single puzzle there is no interval: low and high are the mean.
    """
    if not one:
        return []
    first, second = (torch.stack([part.double() for part in parts]).numpy() for parts in (one, other))
    means = (first - second).mean(axis=-1)
    if first.shape[-1] < 2:
        return [Difference(float(m), float(m), float(m)) for m in means]
    found = stats.bootstrap(
        (first, second), lambda a, b, axis=-1: (a - b).mean(axis=axis), paired=True, vectorized=True, axis=-1,
        n_resamples=resamples, batch=50, confidence_level=level, method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return [Difference(*map(float, row)) for row in zip(means, found.low, found.high, strict=True)]


def difficulty_groups(puzzles: PuzzleSet) -> dict[str, Tensor]:
    """Name -> (N,) bool, three groups from easy to hard: by rating where its terciles tell three groups apart, else
    by the number of givens; fewer groups where that does not either."""
    ratings, clues = puzzles.ratings.double().cpu(), puzzles.clues.double().cpu()
    groups = _terciles(ratings, "rating")
    if len(groups) == 3:
        return groups
    return dict(reversed(_terciles(clues, "givens").items()))  # fewer givens are harder


def _terciles(values: Tensor, name: str) -> dict[str, Tensor]:
    """Groups of about a third each, ascending, those with equal values kept together."""
    cuts = torch.quantile(values, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    place = (values[:, None] > cuts).sum(-1)
    groups = {}
    for part in range(3):
        mask = place == part
        if bool(mask.any()):
            low, high = (f"{float(v):g}" for v in (values[mask].min(), values[mask].max()))
            groups[f"{name} {low}" if low == high else f"{name} {low} to {high}"] = mask
    return groups
