"""The environment as stable-baselines3 wants it. Importing this file imports stable-baselines3.

SB3's own wrappers cut a vector environment into single ones, which would cost one core call a slot: this adapter keeps
the whole batch together. Every episode ends by termination, the forced halt too (its answer is scored), so nothing
is ever bootstrapped through the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from envs.vector import HaltVectorEnv
from hrm_rl.errors import UserError


class SB3VecEnv(VecEnv):
    """A `HaltVectorEnv` (tensors="numpy") with SB3's face: one core call a step, auto-reset in that step.

    `step` returns (observations (B, ...) float32, rewards (B,) float32, dones (B,) bool, infos: a dict a slot). Where
    an episode has ended, the info is that of its last segment, with `terminal_observation` (its last observation) and
    `TimeLimit.truncated` (always False here); elsewhere it is the info of the segment just run.
    """

    def __init__(self, envs: HaltVectorEnv):
        if envs.tensors != "numpy":
            raise UserError(f"SB3VecEnv needs an environment with tensors='numpy', not {envs.tensors!r}")
        self.envs = envs
        self._actions: np.ndarray | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> np.ndarray:
        """Begin an episode in every slot, with the seeds and options that `seed` and `set_options` have left."""
        seeds = None if self._seeds[0] is None else self._seeds
        observations, infos = self.envs.reset(seed=seeds, options=self._options[0] or None)
        self.reset_infos = _rows(infos)
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        rows = _rows(infos)
        if "final_info" in infos:
            ended = _rows(infos["final_info"])
            for i in np.flatnonzero(terminated | truncated):
                rows[i] = ended[i] | {
                    "terminal_observation": infos["final_obs"][i],
                    "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                }
        return observations, rewards.astype(np.float32), terminated | truncated, rows

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: None | int | Sequence[int] = None) -> list[Any]:
        """The attribute of the one environment, once for every slot asked for."""
        return [getattr(self.envs, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: None | int | Sequence[int] = None) -> None:
        """Sets it for all slots at once: they are one environment."""
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *method_args, indices: None | int | Sequence[int] = None, **method_kwargs
    ) -> list[Any]:
        """Calls it once, for all slots; the result is repeated for every slot asked for."""
        result = getattr(self.envs, method_name)(*method_args, **method_kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: None | int | Sequence[int] = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self.envs.render() or [None] * self.num_envs


def _rows(infos: dict[str, Any]) -> list[dict[str, Any]]:
    """Gymnasium's info of arrays (B,) as a dict of Python values a slot; the final fields are left out."""
    names = [n for n in infos if not n.startswith("_") and n not in ("final_obs", "final_info")]
    columns = [infos[n].tolist() for n in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
