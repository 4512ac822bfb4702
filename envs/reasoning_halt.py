"""Grid tasks of reasoning-gym: when should a recurrent reasoner stop thinking about them?

The sets that ship need no reasoning-gym; others are made by it (pip install "hrm_rl[reasoning]").
"""

from __future__ import annotations

from envs.single import HaltEnv, documented
from envs.vector import HaltVectorEnv

_NONE = "None: there are no givens to show more of"


class NQueensHaltEnv(HaltEnv):
    __doc__ = documented(
        "NQueensHalt-v0", "a board with some of n queens on it",
        """The rest of the n queens must be put on the board so that no two share a row, a column or a diagonal. Only
boards that can be completed in exactly one way are used, so that there is one right answer.""",
        "side of the board: 4 to 10", 8, symmetries=": the 8 of the square", clues=_NONE,
    )  # fmt: skip
    task = "n_queens"


class NQueensHaltVectorEnv(HaltVectorEnv):
    __doc__ = HaltVectorEnv.__doc__
    task = "n_queens"


class FutoshikiHaltEnv(HaltEnv):
    __doc__ = documented(
        "FutoshikiHalt-v0", "a Futoshiki",
        """A Latin square of side n with some digits given and some signs between cells that say which of the two is
larger. The grid of tokens has side 2n - 1: a sign is a token between two cells. A puzzle has exactly one solution.""",
        "side of the square: 4 to 9", 4,
        symmetries=": the 8 of the square with the signs turned, digits counted from above with the signs reversed",
    )  # fmt: skip
    task = "futoshiki"


class FutoshikiHaltVectorEnv(HaltVectorEnv):
    __doc__ = HaltVectorEnv.__doc__
    task = "futoshiki"


class MiniSudokuHaltEnv(HaltEnv):
    __doc__ = documented(
        "MiniSudokuHalt-v0", "a 4x4 Sudoku as reasoning-gym makes them",
        """A grid of digits, some given: every row, column and 2x2 box holds 1 to 4 once. Only puzzles with exactly one
solution are used.""",
        "side of the grid: 4", 4, symmetries=": digits, bands, rows, stacks, columns, transpose",
    )  # fmt: skip
    task = "mini_sudoku"


class MiniSudokuHaltVectorEnv(HaltVectorEnv):
    __doc__ = HaltVectorEnv.__doc__
    task = "mini_sudoku"
