"""What an agent remembers from one step of a slot to its next, and forgets when the slot gets a new puzzle."""

from __future__ import annotations

import torch
from torch import Tensor

from envs.previous import choose
from hrm_rl.errors import UserError


class Memory(dict):
    """Tensors (B, ...) by name, row i belonging to slot i. Saved with a run's checkpoint."""

    def recall(self, name: str, steps: Tensor, fresh: Tensor | float) -> Tensor:
        """What was kept under `name`, (B, ...), with `fresh` in the rows whose episode begins (steps (B,) is 1).

        fresh: a tensor (B, ...), or a number for a (B,) tensor; its type is the result's. With nothing kept yet all
        is fresh. UserError where the memory is of another number of slots.
        """
        if not isinstance(fresh, Tensor):
            kind = torch.float32 if isinstance(fresh, float) else torch.int64
            fresh = torch.full(steps.shape, fresh, dtype=kind, device=steps.device)
        held = self.get(name)
        if held is None:
            return fresh
        if held.shape != fresh.shape:
            now, then = tuple(fresh.shape), tuple(held.shape)
            raise UserError(f"memory {name!r} is {then}, now {now} is needed; empty it for other slots (fresh_memory)")
        return choose(steps == 1, fresh, held)

    def select(self, rows: Tensor) -> None:
        """Go on with the slots `rows` (K,) int64 alone, in that order."""
        for name, held in self.items():
            self[name] = held[rows]

    def keep(self, name: str, value: Tensor) -> None:
        """Keep `value` (B, ...) until the next step, without gradient."""
        self[name] = value.detach()
