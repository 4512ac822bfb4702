"""Halting as a decision process: Gymnasium environments whose observation is z_H of a recurrent core."""

from envs.actions import CONTINUE, HALT
from envs.maze_halt import MazeHaltEnv, MazeHaltVectorEnv
from envs.previous import Previous
from envs.single import HaltEnv
from envs.slots import SlotEngine, Slots, Verdict
from envs.sudoku_halt import SudokuHaltEnv, SudokuHaltVectorEnv
from envs.vector import HaltVectorEnv

__all__ = [
    "CONTINUE", "HALT", "HaltEnv", "HaltVectorEnv", "MazeHaltEnv", "MazeHaltVectorEnv", "Previous", "SlotEngine",
    "Slots", "SudokuHaltEnv", "SudokuHaltVectorEnv", "Verdict",
]  # fmt: skip
