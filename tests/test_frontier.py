"""Share of the gap between fixed steps and the oracle: known answers."""

import math

import pytest

from hrm_rl.frontier import fixed_accuracy_at, gap_closed

FIXED = [0.0, 0.4, 0.8, 0.6]


CURVE = [(1, 0.0), (2, 0.4), (2.5, 0.6), (3.75, 0.65), (4, 0.6), (0.5, 0), (9, 0.6)]


@pytest.mark.parametrize("steps, accuracy", CURVE)
def test_fixed_steps_between_segments(steps, accuracy):
    assert fixed_accuracy_at(steps, FIXED) == pytest.approx(accuracy)


def test_gap():
    assert gap_closed(0.6, 2.5, FIXED, 0.9) == pytest.approx(0)  # as good as fixed steps
    assert gap_closed(0.9, 2.5, FIXED, 0.9) == pytest.approx(1)  # as good as the oracle
    assert gap_closed(0.84, 2.5, FIXED, 0.9) == pytest.approx(0.8)
    assert gap_closed(0.5, 3, FIXED, 0.9) == pytest.approx(-3)  # worse than not deciding
    assert math.isnan(gap_closed(0.8, 3, FIXED, 0.8))  # nothing to close
