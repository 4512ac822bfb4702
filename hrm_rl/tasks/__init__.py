"""Puzzles: rules, symmetries, generation, sets on disk. A new task is one file, found by name or path."""

from hrm_rl.tasks.dataset import PuzzleSet, load_puzzles
from hrm_rl.tasks.registry import Task, check_side, get_task, task_class

__all__ = ["PuzzleSet", "Task", "check_side", "get_task", "load_puzzles", "task_class"]
