"""MazeHalt-v0: when should a recurrent reasoner stop looking for the shortest way out of a maze?"""

from __future__ import annotations

from envs.single import HaltEnv, documented
from envs.vector import HaltVectorEnv

_RULES = """A grid of walls and free cells with a start and a goal: the answer marks every cell of the shortest way
between them. The mazes that ship or are generated have one shortest way; of a file's maze with several, the one
that the file gives is the right answer (as the public set is scored)."""


class MazeHaltEnv(HaltEnv):
    __doc__ = documented(
        "MazeHalt-v0", "a maze", _RULES, "side of the grid: 5 to 30", 10,
        symmetries=": the 8 of the square", clues="None: there are no givens to show more of",
    )  # fmt: skip
    task = "maze"


class MazeHaltVectorEnv(HaltVectorEnv):
    __doc__ = HaltVectorEnv.__doc__
    task = "maze"
