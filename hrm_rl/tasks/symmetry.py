"""Symmetries of puzzles as tensor operations: one random symmetry for every row of a batch.

Of Sudoku: a symmetry is a permutation of the cells and a permutation of the digits. Cells: the bands change places, the
rows in each band, the stacks, the columns in each stack, and where boxes are square the grid may be
transposed (a 2x3 box would become a 3x2 box: another puzzle). All choices are independent and uniform.

Of grids with few symmetries (`Symmetries`): a table of all of them, from which one is drawn.

Letters: B puzzles, n side, S = n * n cells. Everything stays on the device of the key, without a host sync.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hrm_rl import rng


def random_symmetry(key: Tensor, side: int, box: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """One symmetry for every key: (B,) int64 -> cells (B, S), labels (B, n + 2), both int64.

    cells[b, i] is the cell that cell i takes its token from; labels[b, t] is what token t becomes (padding
    and blank stay what they are)."""
    rows, columns = box
    bands, stacks = side // rows, side // columns
    draws = rng.uniform(key, 3 * side + bands + stacks + 1)  # a permutation is the argsort of its draws
    digits, row, column, band, stack, turn = draws.split((side, side, side, bands, stacks, 1), dim=-1)
    row = _line_order(band.argsort(-1), row, rows)
    column = _line_order(stack.argsort(-1), column, columns)
    cells = row[:, :, None] * side + column[:, None, :]  # (B, n, n)
    if rows == columns:
        cells = torch.where(turn[:, :, None] < 0.5, cells.transpose(1, 2), cells)
    labels = torch.nn.functional.pad(digits.argsort(-1) + 2, (2, 0))
    labels[:, 1] = 1
    return cells.flatten(1), labels


def apply_symmetry(cells: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """tokens (B, S) -> (B, S) int64. A row of padding stays padding."""
    return labels.gather(1, tokens.long().gather(1, cells))


def undo_symmetry(cells: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """The inverse of `apply_symmetry`: tokens (B, S) -> (B, S) int64."""
    named = labels.argsort(-1).gather(1, tokens.long())
    return torch.zeros_like(named).scatter(1, cells, named)


def _line_order(blocks: Tensor, draws: Tensor, size: int) -> Tensor:
    """blocks (B, n / size) order of the blocks, draws (B, n) -> the order of all lines (B, n)."""
    within = draws.unflatten(-1, (-1, size)).argsort(-1)
    return (blocks[:, :, None] * size + within).flatten(1)


class Symmetries:
    """A small group of symmetries by its table: K of them, each a permutation of the cells and one of the tokens.

    cells (K, S): cells[k, i] is the cell that cell i takes its token from; labels (K, V): what each token becomes.
    """

    def __init__(self, cells: np.ndarray, labels: np.ndarray):
        self.cells, self.labels = cells, labels
        self._on = lru_cache(maxsize=8)(self._put)

    def _put(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(table.astype(np.int64)).to(device) for table in (self.cells, self.labels))

    def draw(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """A uniformly random one for every key: (B,) int64 -> cells (B, S), labels (B, V)."""
        chosen = rng.integers(key, len(self.cells))
        cells, labels = self._on(key.device)
        return cells[chosen], labels[chosen]

    def images(self, values: np.ndarray) -> np.ndarray:
        """All images of one grid: (S,) tokens -> (K, S)."""
        return np.take_along_axis(self.labels, values[self.cells].astype(np.int64), axis=1)


def of_the_square(side: int) -> np.ndarray:
    """(8, side * side): the cells of a square grid under its rotations and reflections, as in `Symmetries`."""
    cell = np.arange(side * side).reshape(side, side)
    turned: Sequence[np.ndarray] = [np.rot90(flip, turns) for flip in (cell, cell.T) for turns in range(4)]
    return np.stack([grid.ravel() for grid in turned])
