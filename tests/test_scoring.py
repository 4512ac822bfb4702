"""Metrics against closed forms, and intervals that cover. N puzzles, M segments."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hrm_testing import small_puzzles
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.scoring import (
    auroc,
    brier,
    difficulty_groups,
    ece,
    mixed_fixed,
    optimal_returns,
    paired_differences,
    regret,
    returns,
)


def bools(*values: int) -> torch.Tensor:
    return torch.tensor(values).bool()


@pytest.mark.parametrize(
    ("scores", "right", "area"),
    [([1, 2, 3, 4], [0, 0, 1, 1], 1.0), ([4, 3, 2, 1], [0, 0, 1, 1], 0.0), ([5, 5, 5, 5], [0, 1, 0, 1], 0.5),
     ([1, 3, 2, 4], [0, 0, 1, 1], 0.75), ([1, 2, 2, 3], [0, 0, 1, 1], 0.875), ([1, 2], [1, 1], None)],
)  # fmt: skip
def test_auroc_by_hand(scores, right, area):
    got = auroc(torch.tensor(scores).float(), bools(*right))
    assert got == area if area is None else got == pytest.approx(area)


@given(st.integers(0, 10_000), st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_auroc_is_the_share_of_pairs_in_order(seed, count):
    generator = np.random.default_rng(seed)
    scores, right = torch.from_numpy(generator.integers(0, 6, count)), torch.from_numpy(generator.random(count) < 0.5)
    pairs = [(float(a > b) + 0.5 * float(a == b)) for a in scores[right] for b in scores[~right]]
    got = auroc(scores, right)
    assert got is None if not pairs else got == pytest.approx(np.mean(pairs))
    if pairs:
        assert auroc(scores.float().exp(), right) == pytest.approx(got)  # only the order counts


def test_auroc_of_two_normals():
    """Closed form: with a distance of one standard deviation the area is Phi(1 / sqrt 2) = 0.7602."""
    generator = np.random.default_rng(0)
    right = torch.arange(40_000) % 2 == 0
    scores = torch.from_numpy(generator.standard_normal(40_000)) + right
    assert auroc(scores, right) == pytest.approx(0.7602, abs=0.01)


def test_brier_and_ece_by_hand():
    p, right = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.2, 0.2]), bools(1, 1, 1, 0, 0, 1)
    assert brier(p, right) == pytest.approx((3 * 0.01 + 0.81 + 0.04 + 0.64) / 6)
    assert ece(p, right) == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.3)
    assert ece(torch.ones(5), torch.ones(5).bool()) == 0  # a probability of 1 stands in the last bin
    even = torch.full((4,), 0.5), bools(1, 0, 1, 0)
    assert ece(*even) == 0 and brier(*even) == 0.25
    assert ece(torch.tensor([0.0, 1.0]), bools(1, 0)) == 1  # confidently wrong


EXACT = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]).bool()


def test_regret_by_hand():
    """Optimal: segment 2 (1 - c), segment 1 (1), segment 1 wrong (0), segment 3 (1 - 2c)."""
    assert optimal_returns(EXACT, 0.1).tolist() == pytest.approx([0.9, 1.0, 0.0, 0.8])
    steps = torch.tensor([3, 3, 2, 1])
    assert returns(EXACT.gather(0, (steps - 1)[None])[0], steps, 0.1).tolist() == pytest.approx([0.8, -0.2, -0.1, 0])
    assert regret(EXACT, steps, 0.1) == pytest.approx((0.1 + 1.2 + 0.1 + 0.8) / 4)
    assert regret(EXACT, torch.tensor([2, 1, 1, 3]), 0.1) == pytest.approx(0)
    assert optimal_returns(EXACT, 0.9).tolist() == pytest.approx([0.1, 1.0, 0.0, 0.0])  # not worth the wait
    assert regret(EXACT, torch.tensor([3, 3, 3, 3]), 0.0) == pytest.approx(3 / 4 - 2 / 4)  # accuracy lost


def test_fixed_at_a_budget_by_hand():
    assert mixed_fixed(EXACT, 2.0).tolist() == [1, 1, 0, 0]
    assert mixed_fixed(EXACT, 2.25).tolist() == [1, 0.75, 0, 0.25]
    assert mixed_fixed(EXACT, 3.0).tolist() == mixed_fixed(EXACT, 9.0).tolist() == [1, 0, 0, 1]


def test_an_interval_against_the_normal_one():
    """Mean difference of N puzzles: half width close to 1.96 standard deviations of the paired differences."""
    generator = torch.Generator().manual_seed(0)
    common = torch.rand(800, generator=generator, dtype=torch.float64) * 5
    noise = torch.randn(800, generator=generator, dtype=torch.float64)
    one, other = common + 0.2 + 0.1 * noise, common
    (found,) = paired_differences([one], [other])
    half = 1.96 * float((one - other).std()) / 800**0.5
    assert found.mean == pytest.approx(float((one - other).mean()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    (unpaired,) = paired_differences([one], [other[torch.randperm(800, generator=generator)]])
    assert unpaired.high - unpaired.low > 10 * (found.high - found.low)  # control: the pairing is what narrows it


def test_intervals_cover():
    """95 % intervals of 60 puzzles hold the true difference in 87 to 99 % of 150 draws; 50 % ones far less often."""
    generator = torch.Generator().manual_seed(1)
    one = [torch.rand(60, generator=generator) < 0.7 for _ in range(150)]
    other = [(torch.rand(60, generator=generator) < 0.5) for _ in range(150)]
    for level, low, high in ((0.95, 0.87, 0.99), (0.5, 0.35, 0.65)):
        # each its own draw of puzzles: a call for each, few resamples
        held = [paired_differences([a], [b], level, 200, i)[0] for i, (a, b) in enumerate(zip(one, other, strict=True))]
        share = np.mean([d.low <= 0.2 <= d.high for d in held])
        assert low <= share <= high, (level, share)


def test_differences_share_their_resamples():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    once, again = paired_differences([a, b], [b, b]), paired_differences([b, a], [b, b])
    assert once == list(reversed(again))
    assert once[1].low == once[1].high == once[1].mean == 0
    assert paired_differences([], []) == []
    (single,) = paired_differences([torch.ones(1)], [torch.zeros(1)])
    assert single.low == single.high == 1


def test_groups_by_difficulty():
    puzzles = small_puzzles(12)
    rated = replace(puzzles, ratings=torch.arange(12.0), sha256="")
    groups = difficulty_groups(rated)
    assert list(groups) == ["rating 0 to 3", "rating 4 to 7", "rating 8 to 11"]
    assert torch.stack(list(groups.values())).sum(0).tolist() == [1] * 12
    flat = replace(puzzles, questions=puzzles.answers.clone(), sha256="")
    flat.questions[4:, :2] = 1
    flat.questions[8:, :5] = 1
    groups = difficulty_groups(flat)  # rating 0 throughout: by givens, hardest last
    assert list(groups) == ["givens 16", "givens 14", "givens 11"]
    assert groups["givens 11"].nonzero()[:, 0].tolist() == [8, 9, 10, 11]
    assert list(difficulty_groups(puzzles)) == ["givens 10"]
