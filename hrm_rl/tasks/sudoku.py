"""Sudoku of side 4 (2x2 boxes), 6 (2 rows x 3 columns) and 9 (3x3).

Tokens: 0 padding, 1 blank, digit d = d + 1 (the encoding of the HRM release).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_rl.tasks.geometry import box_of
from hrm_rl.tasks.symmetry import apply_symmetry, random_symmetry, undo_symmetry

PADDING, BLANK = 0, 1


@dataclass(frozen=True)
class Sudoku:
    """The rules of one size. B puzzles, S = side * side tokens, row by row."""

    side: int = 9

    def __post_init__(self) -> None:
        box_of(self.side)

    @property
    def box(self) -> tuple[int, int]:
        """(rows, columns) of a box."""
        return box_of(self.side)

    @property
    def seq_len(self) -> int:
        return self.side * self.side

    @property
    def vocab_size(self) -> int:
        return self.side + 2

    def augment(self, key: Tensor, questions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """A uniformly random symmetry for every row, the same for question and answer.

        key (B,) int64 (hrm_rl/rng.py); questions, answers (B, S). Returns int64. Padding stays padding."""
        cells, labels = random_symmetry(key, self.side, self.box)
        return apply_symmetry(cells, labels, questions), apply_symmetry(cells, labels, answers)

    def restore(self, key: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `augment` under the same key (B,): tokens (B, S) -> (B, S) int64."""
        return undo_symmetry(*random_symmetry(key, self.side, self.box), tokens)

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: no digit twice in a row, column or box; blanks and padding break nothing."""
        n, (rows, columns) = self.side, self.box
        digits = torch.arange(2, n + 2, device=tokens.device)
        grid = (tokens.unflatten(1, (n, n))[..., None] == digits).to(torch.uint8)  # (B, row, column, digit)
        boxes = grid.unflatten(1, (-1, rows)).unflatten(3, (-1, columns))
        counts = (grid.sum(2), grid.sum(1), boxes.sum((2, 4)).flatten(1, 2))  # (B, n, digit) each
        return (torch.stack(counts, dim=1) <= 1).flatten(1).all(1)
