"""Halting as a decision process: Gymnasium environments whose observation is z_H of a recurrent core."""

from envs.actions import CONTINUE, HALT
from envs.previous import Previous
from envs.slots import SlotEngine, Slots, Verdict
from envs.sudoku_halt import SudokuHaltEnv
from envs.vector import SudokuHaltVectorEnv

__all__ = [
    "CONTINUE", "HALT", "Previous", "SlotEngine", "Slots", "SudokuHaltEnv", "SudokuHaltVectorEnv", "Verdict",
]  # fmt: skip
