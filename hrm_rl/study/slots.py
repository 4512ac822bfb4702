"""Live processes as numbers: what every slot of every learner works on, and what replay remembers of it.

A row of a recording is (m - 1) N + n for segment m of puzzle n, so that going on is adding N. Every draw is a pure
function of (seed, slot, episode or update) through `hrm_rl.rng`, keyed as the environment's slots are. So learners do
not notice each other, and one seed under two arms sees the same puzzles in the same order in every slot, and the same
floors in the same episodes (common random numbers): only what the arms decide differs. L learners, E slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents import exploration, q_targets
from hrm_rl import rng

# Purposes of a seed's draws, each with a stream of its own.
_SLOT, _PUZZLE, _SAMPLE, _COIN = 0x534C4F54, 0x50555A5A, 0x53414D50, 0x434F494E


class Slots:
    """E slots of each of L learners, on M segments of N puzzles.

    Attributes: puzzle, steps (m, from 1), row: (L, E) int64 each.
    """

    def __init__(self, seed: Tensor, num_envs: int, shape: tuple[int, int], epsilon: Tensor, per_step: Sequence[bool]):
        """seed (L,) int64, epsilon (L,) float64 and per_step (L) as `agents.exploration.floor` has them."""
        self.max_steps, self.count = shape
        self.epsilon, self.per_step = epsilon[:, None], list(per_step)
        self._mixed = torch.tensor(self.per_step, device=seed.device)[:, None]
        slots = torch.arange(num_envs, device=seed.device)
        self.key = rng.fold(rng.fold(seed, _SLOT)[:, None], slots)  # (L, E)
        self.episode = torch.zeros_like(self.key)
        self.steps = torch.ones_like(self.key)
        self.episode_key, self.puzzle = self._drawn()

    def _drawn(self) -> tuple[Tensor, Tensor]:
        key = rng.fold(self.key, self.episode)
        return key, rng.integers(rng.fold(key, _PUZZLE), self.count)

    @property
    def row(self) -> Tensor:
        return (self.steps - 1) * self.count + self.puzzle

    def floor(self) -> Tensor:
        """HRM's exploration floor of every slot, (L, E) int64."""
        if all(self.per_step) or not any(self.per_step):
            return self._floor(self.per_step[0])
        return torch.where(self._mixed, self._floor(True), self._floor(False))

    def _floor(self, per_step: bool) -> Tensor:
        return exploration.floor(self.episode_key, self.steps, self.max_steps, self.epsilon, per_step)

    def ends(self, q_logits: Tensor) -> Tensor:
        """Which episodes end here, (L, E) bool: by the greedy rule over the floor, or at the budget.

        q_logits (L, E, 2)."""
        wish = q_targets.wants_halt(q_logits, "next_observation")
        return q_targets.halts(wish, self.steps, self.floor(), self.max_steps)

    def move(self, ended: Tensor) -> None:
        """Segment 1 of a new puzzle where the episode ended, the next segment elsewhere. ended (L, E) bool."""
        self.episode += ended
        key, puzzle = self._drawn()
        self.episode_key = torch.where(ended, key, self.episode_key)
        self.puzzle = torch.where(ended, puzzle, self.puzzle)
        self.steps = torch.where(ended, torch.ones_like(self.steps), self.steps + 1)


def uniform_of_update(seed: Tensor, update: int, count: int, coin: bool = False) -> Tensor:
    """Numbers in [0, 1) for the rows of one update: seed (L,) int64 -> (L, count) float64. Coins have their own."""
    return rng.uniform(rng.fold(rng.fold(seed, _COIN if coin else _SAMPLE), update), count)


class Fifo:
    """The last transitions of every learner, each with a size of its own. A transition is (row, went on)."""

    def __init__(self, size: Tensor, num_envs: int):
        """size (L,) int64, each at least num_envs."""
        self.size, self.written = size[:, None], 0
        self.held = torch.zeros(len(size), int(size.max()), dtype=torch.int32, device=size.device)
        self._slots = torch.arange(num_envs, device=size.device)

    def add(self, row: Tensor, continued: Tensor) -> None:
        """row (L, E) int64, continued (L, E) bool, in place of the oldest."""
        place = (self.written + self._slots) % self.size
        self.held.scatter_(1, place, (2 * row + continued).int())
        self.written += len(self._slots)

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(row, continued) of transitions drawn with replacement by u (L, E) uniform in [0, 1)."""
        filled = self.size.clamp(max=self.written)
        code = self.held.gather(1, (u * filled).long()).long()
        return code >> 1, (code & 1).bool()
