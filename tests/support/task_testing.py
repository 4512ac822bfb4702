"""A few puzzles and a tiny core for the environment of any task."""

from __future__ import annotations

from functools import cache

import gymnasium as gym
import torch
from gymnasium.envs.registration import load_env_creator

from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.tasks import PuzzleSet, load_puzzles, task_class


def tiny_core(puzzles: PuzzleSet, **changes) -> CoreConfig:
    """A core of a few thousand parameters for these puzzles, with the geometry of their task."""
    values = dict(
        vocab_size=puzzles.vocab_size, seq_len=puzzles.seq_len, hidden_size=16, num_heads=2, inner_multiple=16,
        puzzle_emb_ndim=16, token_mixing="grid", geometry=puzzles.rules.geometry, H_layers=1, L_layers=1,
    )  # fmt: skip
    return CoreConfig(**values | changes)


@cache
def puzzles_of(env_id: str, count: int = 8) -> PuzzleSet:
    """Small ones, of the task of an environment."""
    task = load_env_creator(gym.spec(env_id).entry_point).task
    side = {"sudoku": 4, "maze": 6}.get(task, task_class(task).default_side)
    return load_puzzles(f"{task}-{side}", split="test", limit=count)


def problem_of(env_id: str) -> dict:
    """Keyword arguments `data` and `core` for an environment."""
    puzzles = puzzles_of(env_id)
    return {"data": puzzles, "core": HRMCore(tiny_core(puzzles), torch.Generator().manual_seed(0))}
