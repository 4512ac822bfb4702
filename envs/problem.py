"""From keyword arguments to a decision process: what the single and the vector form have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from envs.rendering import RENDER_MODES, render
from envs.slots import SlotEngine, Slots
from hrm_rl.errors import UserError, nearest
from hrm_rl.tasks import PuzzleSet, check_side, get_task, load_puzzles, task_class

DEFAULT_MAX_STEPS = 16
OBSERVATIONS = ("z_H", "q_token", "mean")
SPLITS = ("train", "test")
RESET_OPTIONS = ("puzzle", "augment")


@dataclass(frozen=True)
class Problem:
    """A decision process ready to run."""

    engine: SlotEngine
    observation: str  # one of OBSERVATIONS
    single_observation_space: spaces.Box
    q_head: nn.Module | None  # shown in the rendering only
    render_mode: str | None

    def observe(self, z_H: Tensor) -> Tensor:
        """z_H (B, P + S, D) -> observations (B, *single_observation_space.shape) float32."""
        if self.observation == "q_token":
            z_H = z_H[:, 0]
        elif self.observation == "mean":
            z_H = z_H.float().mean(dim=1)
        return z_H.float().reshape(-1, *self.single_observation_space.shape)

    def facts(self, slots: Slots) -> dict[str, Tensor]:
        """The info fields of every slot, (B,) each."""
        return {
            "steps": slots.steps,
            "is_correct": slots.is_correct,
            "token_accuracy": slots.token_accuracy,
            "puzzle": slots.puzzle,
            "rating": self.engine.puzzles.ratings[slots.puzzle].double(),
        }

    def render(self, slots: Slots, index: int, ended: bool = False) -> str | np.ndarray | None:
        """A picture of one slot, in the render mode; None without one."""
        if self.render_mode is None:
            return None
        return render(self.render_mode, self.engine, slots, index, self.q_head, ended)


def make_problem(
    num_slots: int, *, task: str, size: int | None, data: PuzzleSet | str | Path | None, split: str,
    core: nn.Module | str | Path | None, max_steps: int | None, observation: str, flatten: bool,
    ponder_cost: float, augment: bool, clues: tuple[int, int] | None, device: str | torch.device,
    q_head: nn.Module | None, render_mode: str | None, differentiable: bool,
) -> Problem:  # fmt: skip
    """Check every argument, load what is named and put it together. UserError names the first bad one."""
    check_count("num_envs", num_slots)
    check_choice("split", split, SPLITS)
    check_choice("observation", observation, OBSERVATIONS)
    check_choice("render_mode", render_mode, (None, *RENDER_MODES))
    check_choice("flatten", flatten, (True, False))
    check_choice("augment", augment, (True, False))
    if max_steps is not None:
        check_count("max_steps", max_steps)
    number = isinstance(ponder_cost, (int, float)) and not isinstance(ponder_cost, bool)
    if not number or not 0 <= ponder_cost < math.inf:
        raise UserError(f"ponder_cost must be a finite number, 0 or more, not {ponder_cost!r}")
    if clues is not None:
        check_clues(clues)
    device = _device(device)
    core, q_head, meta, size = _core(core, q_head, task, size, data, device)
    puzzles = _puzzles(data, task, size, split)
    if clues is not None and not puzzles.rules.reveals:
        raise UserError(f"clues: the task {task} has no givens to show more of")
    check_fit(core, puzzles)
    engine = SlotEngine(
        puzzles, core, num_slots, max_steps=max_steps or meta.get("max_steps", DEFAULT_MAX_STEPS),
        ponder_cost=ponder_cost, augment=augment, clues=clues, device=device, differentiable=differentiable,
    )  # fmt: skip
    shape = (core.num_positions, core.hidden_size) if observation == "z_H" else (core.hidden_size,)
    if flatten:
        shape = (math.prod(shape),)
    bound = float(getattr(core, "observation_bound", math.inf))
    return Problem(engine, observation, spaces.Box(-bound, bound, shape, np.float32), q_head, render_mode)


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """UserError unless `value` is one of `choices`."""
    if not any(value is c or (isinstance(c, str) and isinstance(value, str) and value == c) for c in choices):
        hint = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
        raise UserError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")


def check_count(name: str, value: Any) -> None:
    """UserError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_clues(clues: Any) -> None:
    """UserError unless `clues` is (low, high), whole numbers with 0 <= low <= high."""
    whole = isinstance(clues, (tuple, list)) and len(clues) == 2 and all(type(c) is int for c in clues)
    if not whole or not 0 <= clues[0] <= clues[1]:
        raise UserError(f"clues must be None or two whole numbers (low, high), not {clues!r}")


def check_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """The options of `reset`, checked."""
    options = dict(options or {})
    for name in options:
        check_choice("a key of options", name, RESET_OPTIONS)
    check_choice("options['augment']", options.get("augment"), (None, True, False))
    return options


def chosen_puzzles(options: dict[str, Any], engine: SlotEngine) -> Tensor | None:
    """options["puzzle"] as (B,) int64: one index for all slots, or one for each."""
    chosen = options.get("puzzle")
    if chosen is None:
        return None
    index = np.asarray(chosen)
    count = len(engine.puzzles)
    if index.dtype.kind not in "iu" or index.shape not in ((), (engine.num_slots,)):
        raise UserError(f"options['puzzle'] must be a whole number or one for each slot, not {chosen!r}")
    if index.min() < 0 or index.max() >= count:
        raise UserError(f"options['puzzle'] must lie in 0..{count - 1} ({engine.puzzles.name}), not {chosen!r}")
    index = np.broadcast_to(index, (engine.num_slots,)).astype(np.int64)
    return torch.from_numpy(index.copy()).to(engine.device)


def slot_key(generator: np.random.Generator) -> int:
    """One slot's random key: a single draw, so that a slot is fixed by its seed alone."""
    return int(generator.integers(2**62))


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def _core(core, q_head, task, size, data, device) -> tuple[nn.Module, nn.Module | None, dict, int]:
    """(core, q_head, what is noted beside it, size) with everything that was left open filled in."""
    kind = task_class(task)
    if size is not None:
        check_side(kind.sides, size, "size")
    if size is None and isinstance(data, PuzzleSet):
        size = data.side
    meta = {}
    if core is None or isinstance(core, (str, Path)):
        from hrm_rl.core.io import load_core

        loaded = load_core(core, device=device, size=size or kind.default_side, task=task)
        core, meta, q_head = loaded.core.eval(), loaded.meta, q_head if q_head is not None else loaded.q_head
    elif not isinstance(core, nn.Module):
        raise UserError(f"core must be None, a path or an nn.Module, not {type(core).__name__}")
    else:
        held = next((t for t in (*core.parameters(), *core.buffers())), None)
        if held is not None and held.device.type != device.type:
            raise UserError(f"core is on {held.device} and device is {str(device)!r}; put both in one place")
    if size is None:
        tokens = getattr(getattr(core, "config", None), "seq_len", None)
        size = next((side for side in kind.sides if get_task(task, side).seq_len == tokens), kind.default_side)
    return core, q_head, meta, size


def _puzzles(data: PuzzleSet | str | Path | None, task: str, size: int, split: str) -> PuzzleSet:
    if isinstance(data, PuzzleSet):
        if data.task != task:
            raise UserError(f"data ({data.name}) holds puzzles of the task {data.task}, not {task}")
        if data.side != size:
            raise UserError(f"size is {size} and data ({data.name}) holds puzzles of side {data.side}")
        puzzles = data
    elif data is None or isinstance(data, (str, Path)):
        puzzles = load_puzzles(f"{task}-{size}" if data is None else data, size, split, task=task)
    else:
        kind = type(data).__name__
        raise UserError(f"data must be None, a path, 'hf://owner/name' or a PuzzleSet, not {kind}")
    if len(puzzles) == 0:
        raise UserError(f"data: {puzzles.name} holds no puzzle")
    return puzzles


def check_fit(core: nn.Module, puzzles: PuzzleSet) -> None:
    """UserError unless the core was made for puzzles of this side."""
    for attribute in ("initial_state", "num_positions", "hidden_size"):
        if not hasattr(core, attribute):
            raise UserError(f"core: {type(core).__name__} has no {attribute} (see hrm_rl.core.Core)")
    config = getattr(core, "config", None)
    for attribute in ("seq_len", "vocab_size"):
        made_for, needed = getattr(config, attribute, None), getattr(puzzles, attribute)
        if made_for is not None and made_for != needed:
            need = f"puzzles of side {puzzles.side} ({puzzles.name}) need {needed}"
            raise UserError(f"core: made for {attribute} {made_for}, but {need}")
