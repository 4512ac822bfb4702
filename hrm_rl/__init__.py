"""hrm_rl: when should a recurrent reasoner stop thinking?

Importing this package registers the Gymnasium environments and does nothing else; the environments' module
(and with it torch) is imported when one is made:

    import gymnasium as gym
    import hrm_rl

    env = gym.make("SudokuHalt-v0")
    envs = gym.make_vec("SudokuHalt-v0", num_envs=64)
"""

from __future__ import annotations

import gymnasium as gym

__version__ = "0.1.0"

# The step budget is the environment's own `max_steps`. It is not given as `max_episode_steps`: that would
# turn the forced halt, whose answer is scored, into a truncation that learners bootstrap through.
for _module, _name in (
    ("sudoku_halt", "SudokuHalt"),
    ("maze_halt", "MazeHalt"),
    ("reasoning_halt", "NQueensHalt"),
    ("reasoning_halt", "FutoshikiHalt"),
    ("reasoning_halt", "MiniSudokuHalt"),
):
    if f"{_name}-v0" not in gym.registry:
        gym.register(
            id=f"{_name}-v0",
            entry_point=f"envs.{_module}:{_name}Env",
            vector_entry_point=f"envs.{_module}:{_name}VectorEnv",
        )
