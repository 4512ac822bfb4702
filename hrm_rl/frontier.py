"""Where a halting rule stands between a fixed number of steps and the oracle, as pure functions.

The oracle halts each puzzle at its first right answer, so its accuracy O is the share of puzzles that are right at any
segment: no rule on the same core is more accurate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def fixed_accuracy_at(mean_steps: float, fixed: Sequence[float]) -> float:
    """F(s): exact accuracy of a fixed number of steps, interpolated at s = `mean_steps`.

    fixed (M,) is the accuracy at segment 1..M. Between two segments F is what halting some puzzles at one and the rest
    at the other gives on average; s is cut to [1, M].
    """
    return float(np.interp(mean_steps, np.arange(1, len(fixed) + 1), fixed))


def gap_closed(accuracy: float, mean_steps: float, fixed: Sequence[float], oracle: float) -> float:
    """Share of the gap between the fixed steps and the oracle that a rule closes at its own mean steps s.

    (accuracy - F(s)) / (O - F(s)): 0 is no better than a fixed number of steps, 1 is the oracle's accuracy, below 0 is
    worse than not deciding at all. NaN where there is no gap.
    """
    at_fixed = fixed_accuracy_at(mean_steps, fixed)
    return (accuracy - at_fixed) / (oracle - at_fixed) if oracle > at_fixed else math.nan
