"""Thresholds by hand, and the guarantee of the risk bound by simulation. M segments, N puzzles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hrm_rl import calibration
from hrm_rl.calibration import (
    binomial_p,
    candidates,
    curve,
    for_drop,
    for_risk,
    for_steps,
    halting_steps,
    hoeffding_p,
    read_at,
)

# Three segments (rows), four puzzles (columns).
SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.5, 0.2, 0.3, 0.1], [0.9, 0.9, 0.1, 0.3]])
EXACT = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()


@pytest.mark.parametrize(
    ("threshold", "strict", "steps"),
    [(0.5, False, [2, 1, 3, 3]), (0.5, True, [3, 1, 3, 3]), (0.3, False, [2, 1, 1, 3]), (0.3, True, [2, 1, 3, 3]),
     (-9.0, False, [1, 1, 1, 1]), (9.0, False, [3, 3, 3, 3])],
)  # fmt: skip
def test_steps_by_hand(threshold, strict, steps):
    assert halting_steps(SCORES, threshold, strict).tolist() == steps
    assert read_at(EXACT, torch.tensor(steps)).tolist() == [bool(EXACT[s - 1, i]) for i, s in enumerate(steps)]


def test_candidates_by_hand():
    """Running maxima before the budget: 0.1, 0.9, 0.3, 0.2, 0.5; halfway between them and on either side."""
    values = candidates(SCORES)
    assert values[1:-1].tolist() == pytest.approx([0.15, 0.25, 0.4, 0.7])
    assert values[0] < 0.1 and values[-1] > 0.9
    for strict in (False, True):
        assert halting_steps(SCORES, float(values[0]), strict).tolist() == [1, 1, 1, 1]
        assert halting_steps(SCORES, float(values[-1]), strict).tolist() == [3, 3, 3, 3]
    assert len(candidates(torch.rand(5, 400), most=20)) == 22
    assert len(candidates(torch.rand(1, 4))) == 2  # a budget of one segment leaves nothing to choose


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_candidates_miss_no_behaviour(segments, count, seed, strict):
    """Every halting that any threshold gives is that of a candidate."""
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, (segments, count))).float()
    found = {tuple(halting_steps(scores, t, strict).tolist()) for t in candidates(scores).tolist()}
    every = {tuple(halting_steps(scores, t, strict).tolist()) for t in np.arange(-1, 6, 0.25)}
    assert found == every


def test_the_curve_by_hand():
    found = curve(SCORES, EXACT, torch.tensor([-9.0, 0.3, 0.5, 9.0], dtype=torch.float64))
    assert found.accuracy.tolist() == [0.25, 0.5, 0.75, 0.5]
    assert found.mean_steps.tolist() == [1.0, 1.75, 2.25, 3.0]
    assert found.lost.tolist() == [0.5, 0.25, 0.0, 0.0]
    assert found.drop.tolist() == [0.25, 0.0, -0.25, 0.0]


def test_choices_by_hand():
    found = curve(SCORES, EXACT, torch.tensor([-9.0, 0.3, 0.5, 9.0], dtype=torch.float64))
    assert for_drop(found, 0.0).threshold == 0.5  # the best of the curve, 75 %
    assert for_drop(found, 0.25).threshold == pytest.approx(0.3)  # 50 % is enough: fewest steps
    assert for_drop(found, 0.0, reference=0.5).threshold == pytest.approx(0.3)
    assert for_drop(found, 0.25, reference=0.5).mean_steps == 1.0
    missed = for_drop(found, 0.0, reference=0.9)
    assert missed.threshold == 0.5 and "reaches 90.0%" in missed.note
    assert for_steps(found, 2.0).mean_steps == 1.75  # 1.75 and 2.25 are alike: fewer steps
    assert for_steps(found, 2.2).mean_steps == 2.25
    assert for_steps(found, 99.0).mean_steps == 3.0


def test_p_values_against_closed_forms():
    assert binomial_p(0.0, 100, 0.02) == pytest.approx(0.98**100)
    assert binomial_p(0.01, 100, 0.02) == pytest.approx(0.98**100 + 100 * 0.02 * 0.98**99)
    assert hoeffding_p(-0.1, 200, 0.1) == pytest.approx(np.exp(-200 * 0.04 / 2))
    assert hoeffding_p(0.3, 200, 0.1) == 1.0
    for lost in (0.0, 0.05, 0.3):  # a p-value of a loss in {0, 1}: the exact one is never the larger one
        assert binomial_p(lost, 60, 0.2) <= np.exp(-2 * 60 * max(0.0, 0.2 - lost) ** 2) + 1e-12


def noisy(count: int, generator: np.random.Generator, segments: int = 5, noise: float = 0.15):
    """Puzzles that become right at a random segment and stay so, but one in ten is lost again at the last; a score
    that says so with noise. (scores, exact), (M, N) each."""
    first = generator.integers(1, segments + 3, count)
    exact = np.arange(1, segments + 1)[:, None] >= first
    exact[-1, generator.random(count) < 0.1] = False
    scores = exact + noise * generator.standard_normal(exact.shape)
    return torch.from_numpy(scores).float(), torch.from_numpy(exact)


TRIALS, DELTA, ALPHA = 80, 0.03, 0.1


def broken_promises(choose, noise: float, net: bool = False) -> float:
    """Share of validation draws after which the true risk (of 20,000 puzzles) exceeds DELTA."""
    scores, exact = noisy(20_000, np.random.default_rng(99), noise=noise)
    broken = 0
    for trial in range(TRIALS):
        threshold = choose(*noisy(240, np.random.default_rng(trial), noise=noise))
        right = read_at(exact, halting_steps(scores, threshold))
        lost = (exact[-1] & ~right).double().mean()
        broken += bool((exact[-1].double().mean() - right.double().mean() if net else lost) > DELTA)
    return broken / TRIALS


@pytest.mark.parametrize("bound", ["binomial", "hoeffding"])
@pytest.mark.parametrize("noise", [0.35, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_guarantee_holds_in_simulation(bound, noise):
    """P(risk > delta) <= alpha over the validation draw: the count is compatible with that at the level 0.1 %."""
    share = broken_promises(lambda s, e: for_risk(s, e, DELTA, ALPHA, bound).threshold, noise, bound == "hoeffding")
    assert stats.binom.sf(round(share * TRIALS) - 1, TRIALS, ALPHA) > 1e-3, share


@pytest.mark.parametrize("noise", [0.35, 0.5])
def test_without_the_bound_the_promise_is_broken(noise):
    """Negative control: the smallest threshold that keeps the drop on the validation puzzles themselves breaks it."""

    def by_point_estimate(scores, exact):
        found = curve(scores, exact, candidates(scores, 60))
        return float(found.thresholds[found.lost <= DELTA][0])

    share = broken_promises(by_point_estimate, noise)
    assert stats.binom.sf(round(share * TRIALS) - 1, TRIALS, ALPHA) < 1e-6, share


def test_the_bound_is_not_idle():
    """It halts early where that is safe, earlier for a looser promise, and not at all where nothing can be shown."""
    scores, exact = noisy(2_000, np.random.default_rng(5), noise=0.35)
    tight, loose = (for_risk(scores, exact, delta, ALPHA) for delta in (0.02, 0.1))
    assert loose.mean_steps < tight.mean_steps < 5 and not tight.note
    hopeless = for_risk(*noisy(40, np.random.default_rng(5), noise=0.2), 0.001, ALPHA)
    assert hopeless.mean_steps == 5 and hopeless.threshold == float("inf")
    assert "no threshold can be shown" in hopeless.note
    single = for_risk(*noisy(1, np.random.default_rng(5)), DELTA, ALPHA)
    assert single.threshold == float("inf")


def test_proposal_and_test_share_no_puzzle():
    propose, test = calibration.split(103)
    assert sorted([*propose.tolist(), *test.tolist()]) == list(range(103)) and 20 < len(propose) < 30
