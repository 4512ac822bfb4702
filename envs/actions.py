"""The two actions, in the order of HRM's Q-head outputs."""

from __future__ import annotations

from typing import Final

HALT: Final = 0  # stop: the answer of this segment is scored
CONTINUE: Final = 1  # run one more segment on the same puzzle
ACTION_NAMES: Final = ("HALT", "CONTINUE")
