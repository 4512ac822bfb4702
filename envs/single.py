"""The single form of the environment, for every task; its documentation, filled in for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from envs.actions import ACTION_NAMES
from envs.problem import check_options, chosen_puzzles, make_problem, slot_key
from envs.rendering import RENDER_MODES
from envs.slots import SlotEngine, Slots
from hrm_rl.errors import UserError
from hrm_rl.tasks import PuzzleSet

DOCUMENTATION = """
## Description

A recurrent core (HRM, arXiv:2506.21734) works on {puzzle} in segments. Each segment improves its latent
state and costs time; after each one the agent decides whether to stop and hand in the answer. The grid is
not the agent's to fill: the core does that, and the transition is the core itself, run once.

{rules}

## Action Space

`Discrete(2)`

- 0: HALT, hand in the answer of this segment
- 1: CONTINUE, run one more segment

## Observation Space

`Box(-bound, bound, shape, float32)`, the high-level latent state z_H after the latest segment. T is its
number of positions (prefix and cells), D the hidden size.

| observation | shape | what |
| --- | --- | --- |
| "z_H" | (T * D,), or (T, D) with `flatten=False` | every position |
| "q_token" | (D,) | the first position, which HRM's Q-head reads |
| "mean" | (D,) | the mean over positions |

The bound is the core's `observation_bound` (its last norm keeps |z| under sqrt(D)); a core that states
none has infinite bounds.

## Rewards

- HALT: 1.0 if every cell of the answer is right, else 0.0
- CONTINUE: `-ponder_cost`
- CONTINUE in step `max_steps`: the budget is spent, so it counts as HALT

## Starting State

A puzzle drawn uniformly, in a random symmetry (`augment`), with z at the core's fixed initial state and
one segment run on it. Puzzle and symmetry of an episode follow from the seed and the number of episodes
since. `reset(options={{"puzzle": 3}})` picks a puzzle, `{{"augment": False}}` shows it as it is written.

## Episode End

- Termination: HALT, or any action in step `max_steps`. The forced halt is a termination and not a
  truncation, because its answer is scored.
- Truncation: never.

`info` holds `steps`, `is_correct`, `token_accuracy`, `puzzle` (index), `rating`, and at the end
`forced_halt` (whether the budget ended the episode against the action).

## Arguments

```python
>>> import gymnasium as gym
>>> import hrm_rl
>>> env = gym.make("{env_id}", size={default}, observation="q_token")  # doctest: +SKIP
```

| argument | default | what |
| --- | --- | --- |
| `size` | None | {sizes}; None: that of the data or the core, else {default} |
| `data` | None | None: the packaged puzzles; a CSV path, "hf://owner/name" or a `PuzzleSet` |
| `split` | "train" | "train" or "test", where the data has both |
| `core` | None | None: the packaged core; an `nn.Module`; a run, a checkpoint or a model file |
| `max_steps` | None | segments an episode may run; None: what the core was trained with, else 16 |
| `observation` | "z_H" | see above |
| `flatten` | True | z_H as one vector |
| `ponder_cost` | 0.0 | paid for every CONTINUE that runs a segment |
| `augment` | True | random symmetries{symmetries} |
| `clues` | None | {clues} |
| `device` | "cpu" | where the core runs; an `nn.Module` must already be there |
| `q_head` | None | (B, T, D) -> (B, 2) logits, shown in the rendering; None: the loaded core's own |
| `render_mode` | None | "ansi" (text) or "rgb_array" (uint8 picture) |

## Version History

- v0: first version
"""


def documented(
    env_id: str, puzzle: str, rules: str, sizes: str, default: int, symmetries: str = "",
    clues: str = "(low, high): show more of the answer, up to a random number of givens in this range",
) -> str:  # fmt: skip
    """The docstring of a task's environment. puzzle: "a Sudoku"; rules: what is shown and what is asked for."""
    return DOCUMENTATION.format(env_id=env_id, puzzle=puzzle, rules=rules, sizes=sizes, default=default,
                                symmetries=symmetries, clues=clues)  # fmt: skip


class HaltEnv(gym.Env[np.ndarray, int]):
    """When should a recurrent reasoner stop thinking? The decision process for the puzzles of one `task`.

    Subclasses name the task and document it (`documented`); nothing else differs between them.
    """

    task: ClassVar[str]  # a name or import path of `hrm_rl.tasks.registry`

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 2}

    def __init__(
        self, size: int | None = None, data: PuzzleSet | str | Path | None = None, split: str = "train",
        core: nn.Module | str | Path | None = None, max_steps: int | None = None, observation: str = "z_H",
        flatten: bool = True, ponder_cost: float = 0.0, augment: bool = True,
        clues: tuple[int, int] | None = None, device: str | torch.device = "cpu", q_head: nn.Module | None = None,
        render_mode: str | None = None,
    ):  # fmt: skip
        self._problem = make_problem(
            1, task=self.task, size=size, data=data, split=split, core=core, max_steps=max_steps,
            observation=observation, flatten=flatten, ponder_cost=ponder_cost, augment=augment, clues=clues,
            device=device, q_head=q_head, render_mode=render_mode, differentiable=False,
        )  # fmt: skip
        self.render_mode = render_mode
        self.max_steps = self.engine.max_steps
        self.observation_space = self._problem.single_observation_space
        self.action_space = spaces.Discrete(len(ACTION_NAMES))
        self._keyed_by: np.random.Generator | None = None  # the generator that gave the slot its key
        self._running = False  # between reset and the end of the episode

    @property
    def engine(self) -> SlotEngine:
        return self._problem.engine

    @property
    def q_head(self) -> nn.Module | None:
        """Maps z_H (B, P + S, D) to Q-logits (B, 2): the head that came with the core; None without one."""
        return self._problem.q_head

    @property
    def slots(self) -> Slots:
        """The one slot, as tensors with a leading axis of 1."""
        return self.engine.slots

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode. With a seed: the first of that seed's sequence; without: the next one."""
        super().reset(seed=seed)
        options = check_options(options)
        puzzle = chosen_puzzles(options, self.engine)
        key = None
        if self.np_random is not self._keyed_by:  # seeded, or handed a generator, since the last reset
            key = torch.tensor([slot_key(self.np_random)], device=self.engine.device)
            self._keyed_by = self.np_random
        with torch.no_grad():
            self.engine.reset(key, puzzle, options.get("augment"))
        self._running = True
        return self._observe(), self._info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take HALT or CONTINUE. ResetNeeded after the end of an episode, UserError for another action."""
        if not self._running:
            raise gym.error.ResetNeeded("the episode has ended (or none has begun): call reset() before step()")
        if not self.action_space.contains(action):
            raise UserError(f"action must be 0 (HALT) or 1 (CONTINUE), not {action!r}")
        actions = torch.tensor([int(action)], device=self.engine.device)
        verdict = self.engine.verdict(actions)
        terminated = bool(verdict.terminated)
        if terminated:
            self._running = False
            info = self._info() | {"forced_halt": bool(verdict.forced_halt)}
        else:
            with torch.no_grad():
                self.engine.advance(actions)
            info = self._info()
        return self._observe(), float(verdict.reward), terminated, False, info

    def render(self) -> str | np.ndarray | None:
        """The grid with givens and answers, the step and both Q-values, in the render mode."""
        if self.render_mode is None:
            return None
        if self._keyed_by is None:
            raise gym.error.ResetNeeded("there is nothing to render before the first reset()")
        return self._problem.render(self.slots, 0, ended=not self._running)

    def state_dict(self) -> dict[str, Any]:
        """Where the environment stands: see `SlotEngine.state_dict`."""
        return self.engine.state_dict() | {"running": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. UserError if it belongs to another problem."""
        state = dict(state)
        running = bool(state.pop("running", False))
        with torch.no_grad():
            self.engine.load_state_dict(state)
        self._running, self._keyed_by = running, self.np_random

    def _observe(self) -> np.ndarray:
        return self._problem.observe(self.slots.z_H)[0].cpu().numpy().copy()  # a copy: the state is the engine's

    def _info(self) -> dict[str, Any]:
        return {name: value.item() for name, value in self._problem.facts(self.slots).items()}
