"""The vector form of the environment, for every task: all slots advance with one call of the core, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from envs.actions import ACTION_NAMES, CONTINUE, HALT
from envs.problem import (
    check_choice,
    check_options,
    chosen_puzzles,
    make_problem,
    slot_key,
)
from envs.rendering import RENDER_MODES
from envs.slots import SlotEngine, Slots, Verdict
from hrm_rl.errors import UserError
from hrm_rl.tasks import PuzzleSet

TENSORS = ("numpy", "torch")


class HaltVectorEnv(VectorEnv):
    """
    ## Description

    `num_envs` slots of the process that the single form documents, in one batch. Slot i of an environment
    seeded with s sees exactly what a single environment seeded with s + i sees.

    ## Action Space

    `MultiDiscrete([2] * num_envs)`: 0 is HALT, 1 is CONTINUE. With `tensors="torch"` a tensor (num_envs,) of
    integers on the device; its values are not looked at (that would wait for the device), and whatever is not
    HALT continues.

    ## Observation Space

    The single form's, with a leading axis of `num_envs`; float32.

    ## Rewards

    As in the single form: float64 arrays, or float32 tensors.

    ## Starting State

    As in the single form. `options={"puzzle": i}` or `{"puzzle": [i, j, ...]}` and `{"augment": False}` hold
    for the episodes that this `reset` begins.

    ## Episode End

    As in the single form, with auto-reset in the same step (`AutoresetMode.SAME_STEP`): the call that ends an
    episode already runs the first segment of the slot's next puzzle. The observation returned is that of the
    new episode; `info["final_obs"]` and `info["final_info"]` hold the old one where `info["_final_obs"]`.

    With `tensors="numpy"` the infos look like those of Gymnasium's `SyncVectorEnv`: a mask `_name` beside
    each array, `final_obs` an object array with None where no episode ended, and no final fields in a step
    in which none did. With `tensors="torch"` every field is there in every step, as a tensor over all slots,
    because leaving one out would mean waiting for the device; `_final_obs` says where the final fields count.

    ## Arguments

    Those of the single form, and

    | argument | default | what |
    | --- | --- | --- |
    | `num_envs` | 1 | slots |
    | `tensors` | "numpy" | "numpy": arrays, no gradient; "torch": tensors on the device, with gradient |

    With `tensors="torch"` observations and `slots` carry the gradient of the latest segment (and of nothing
    before it) wherever gradient is enabled, `step` never waits for the device, and `lookahead` shows the next
    segment. A trainer trains through this very environment.

    ## Version History

    - v0: first version
    """

    task: ClassVar[str]  # a name or import path of `hrm_rl.tasks.registry`

    metadata = {
        "render_modes": list(RENDER_MODES),
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self, num_envs: int = 1, size: int | None = None, data: PuzzleSet | str | Path | None = None,
        split: str = "train", core: nn.Module | str | Path | None = None, max_steps: int | None = None,
        observation: str = "z_H", flatten: bool = True, ponder_cost: float = 0.0, augment: bool = True,
        clues: tuple[int, int] | None = None, device: str | torch.device = "cpu", q_head: nn.Module | None = None,
        render_mode: str | None = None, tensors: str = "numpy",
    ):  # fmt: skip
        check_choice("tensors", tensors, TENSORS)
        self._problem = make_problem(
            num_envs, task=self.task, size=size, data=data, split=split, core=core, max_steps=max_steps,
            observation=observation, flatten=flatten, ponder_cost=ponder_cost, augment=augment, clues=clues,
            device=device, q_head=q_head, render_mode=render_mode, differentiable=tensors == "torch",
        )  # fmt: skip
        self.num_envs = num_envs
        self.tensors = tensors
        self.render_mode = render_mode
        self.max_steps = self.engine.max_steps
        self.single_action_space = spaces.Discrete(len(ACTION_NAMES))
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.single_observation_space = self._problem.single_observation_space
        self._keyed_by: np.random.Generator | None = None  # the generator that gave the slots their keys
        self._looked_at: tuple[Any, Tensor] | None = None  # actions as handed to `lookahead`, and as a tensor

    @cached_property
    def observation_space(self) -> spaces.Box:
        """Made when asked for: its bounds are arrays as large as a batch of observations."""
        return batch_space(self.single_observation_space, self.num_envs)

    @property
    def engine(self) -> SlotEngine:
        return self._problem.engine

    @property
    def q_head(self) -> nn.Module | None:
        """Maps z_H (B, P + S, D) to Q-logits (B, 2): the head that came with the core; None without one."""
        return self._problem.q_head

    @property
    def slots(self) -> Slots:
        """Everything about the slots after the latest segment; see `Slots`."""
        return self.engine.slots

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray | Tensor, dict[str, Any]]:
        """Begin an episode in every slot. seed s gives slot i the seed s + i; a sequence names them all."""
        options = check_options(options)
        puzzle = chosen_puzzles(options, self.engine)
        seeds = self._seeds(seed)
        super().reset(seed=None if seeds is None else seeds[0])
        key = None
        if self.np_random is not self._keyed_by:  # seeded, or handed a generator, since the last reset
            if seeds is None and self._np_random_seed != -1:  # Gymnasium drew a first seed by itself
                seeds = self._seeds(self._np_random_seed)
            generators = seeds and [seeding.np_random(s)[0] for s in seeds]
            keys = [slot_key(g) for g in generators or [self.np_random] * self.num_envs]
            key = torch.tensor(keys, device=self.engine.device)
            self._keyed_by = self.np_random
        self._looked_at = None
        with self._gradient():
            slots = self.engine.reset(key, puzzle, options.get("augment"))
            observations, facts = self._problem.observe(slots.z_H), self._problem.facts(slots)
        if self.tensors == "torch":
            return observations, facts
        return _array(observations), _masked(_arrays(facts))

    def step(self, actions: np.ndarray | Tensor) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One segment in every slot. See the class for what is returned in each form."""
        actions = self._tensor(actions)
        with self._gradient():
            before = self.slots
            verdict = self.engine.advance(actions)
            observations = self._problem.observe(self.slots.z_H)
        self._looked_at = None
        with torch.no_grad():
            final_obs = self._problem.observe(before.z_H.detach())
            final_info = self._problem.facts(before) | {"forced_halt": verdict.forced_halt}
            facts = self._problem.facts(self.slots)
        if self.tensors == "numpy":
            return self._to_numpy(observations, verdict, facts, final_obs, final_info)
        infos = facts | {"final_obs": final_obs, "final_info": final_info}
        infos |= {"_final_obs": verdict.terminated, "_final_info": verdict.terminated}
        never = torch.zeros_like(verdict.terminated)
        return observations, verdict.reward.float(), verdict.terminated, never, infos

    def lookahead(self, actions: np.ndarray | Tensor) -> Slots:
        """The slots that `step(actions)` is about to leave, without gradient; nothing moves.

        The gradient-free part of the segment is kept, so the `step` that follows must be handed the very same
        object (RuntimeError otherwise) and runs the rest only.
        """
        self._looked_at = None
        tensor = self._tensor(actions)
        ahead = self.engine.lookahead(tensor)
        self._looked_at = actions, tensor
        return ahead

    def render(self) -> tuple[Any, ...] | None:
        """One picture or text for each slot, in the render mode."""
        if self.render_mode is None:
            return None
        return tuple(self._problem.render(self.slots, i) for i in range(self.num_envs))

    def state_dict(self) -> dict[str, Any]:
        """Where the environment stands: see `SlotEngine.state_dict`."""
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; load the core's weights first. UserError if it belongs elsewhere."""
        with self._gradient():
            self.engine.load_state_dict(state)
        self._keyed_by, self._looked_at = self.np_random, None

    def _gradient(self):
        return torch.set_grad_enabled(self.tensors == "torch" and torch.is_grad_enabled())

    def _seeds(self, seed: int | Sequence[int] | None) -> list[int] | None:
        if seed is None:
            return None
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise UserError(f"seed must be a number or one for each of the {self.num_envs} slots, not {len(seed)}")
        return [int(s) for s in seed]

    def _tensor(self, actions: np.ndarray | Tensor) -> Tensor:
        """actions as a tensor on the device: the same object whenever it is one already."""
        if self._looked_at is not None and self._looked_at[0] is actions:
            return self._looked_at[1]
        if not isinstance(actions, Tensor):
            values = np.asarray(actions)
            if values.dtype.kind not in "iu" or not np.isin(values, (HALT, CONTINUE)).all():
                raise UserError(f"actions must be 0 (HALT) or 1 (CONTINUE), not {actions!r}")
            actions = torch.as_tensor(values)
        if actions.shape != (self.num_envs,):
            raise UserError(f"actions must have the shape ({self.num_envs},), not {tuple(actions.shape)}")
        return actions.to(self.engine.device)

    def _to_numpy(
        self, observations: Tensor, verdict: Verdict, facts: dict[str, Tensor], final_obs: Tensor,
        final_info: dict[str, Tensor],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:  # fmt: skip
        terminated = _array(verdict.terminated)
        infos = _masked(_arrays(facts))
        if terminated.any():
            finals = np.full(self.num_envs, None, dtype=object)
            last = _array(final_obs)
            for i in np.flatnonzero(terminated):
                finals[i] = last[i].copy()  # not a view, which would keep the whole batch alive
            old = {n: np.where(terminated, a, np.zeros_like(a)) for n, a in _arrays(final_info).items()}
            infos |= {"final_obs": finals, "final_info": _masked(old, terminated)}
            infos |= {"_final_obs": terminated.copy(), "_final_info": terminated.copy()}
        return _array(observations), _array(verdict.reward), terminated, np.zeros_like(terminated), infos


def _array(tensor: Tensor) -> np.ndarray:
    """A copy on the host: what a user writes into it does not reach the engine's state."""
    return tensor.detach().cpu().numpy().copy()


def _arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: _array(tensor) for name, tensor in tensors.items()}


def _masked(arrays: dict[str, np.ndarray], mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Gymnasium's info layout: beside each array the mask of the slots it holds for (None: all of them)."""
    infos = {}
    for name, array in arrays.items():
        infos[name] = array
        infos[f"_{name}"] = np.ones(len(array), dtype=np.bool_) if mask is None else mask.copy()
    return infos
