"""SudokuHalt-v0: when should a recurrent reasoner stop thinking about a Sudoku?"""

from __future__ import annotations

from envs.single import HaltEnv, documented
from envs.vector import HaltVectorEnv

_RULES = """A grid of digits, some given: every row, column and box holds each digit once. A puzzle has exactly one
solution."""


class SudokuHaltEnv(HaltEnv):
    __doc__ = documented(
        "SudokuHalt-v0", "a Sudoku", _RULES, "side of the grid: 4, 6 or 9", 9,
        symmetries=": digits, bands, rows, stacks, columns, transpose",
    )  # fmt: skip
    task = "sudoku"


class SudokuHaltVectorEnv(HaltVectorEnv):
    __doc__ = HaltVectorEnv.__doc__
    task = "sudoku"
