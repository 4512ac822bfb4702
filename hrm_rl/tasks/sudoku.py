"""Sudoku of side 4 (2x2 boxes), 6 (2 rows x 3 columns) and 9 (3x3).

Tokens: 0 padding, 1 blank, digit d = d + 1 (the encoding of the HRM release).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hrm_rl.tasks.geometry import BOXES, box_of, tables
from hrm_rl.tasks.square import SquareGrid
from hrm_rl.tasks.symmetry import random_symmetry

PADDING, BLANK = 0, 1


@dataclass(frozen=True)
class Sudoku(SquareGrid):
    """The rules of one size. B puzzles, S = side * side tokens, row by row."""

    name: ClassVar[str] = "sudoku"
    sides: ClassVar[tuple[int, ...]] = tuple(BOXES)
    default_side: ClassVar[int] = 9
    geometry: ClassVar[str] = "boxes"
    reveals: ClassVar[bool] = True
    aliases: ClassVar[dict[str, str]] = {"0": "."}
    open_token: ClassVar[int] = BLANK

    side: int = 9

    def __post_init__(self) -> None:
        box_of(self.side)

    @property
    def box(self) -> tuple[int, int]:
        """(rows, columns) of a box."""
        return box_of(self.side)

    @property
    def vocab_size(self) -> int:
        return self.side + 2

    @property
    def characters(self) -> str:
        return ".123456789"[: self.side + 1]

    def glyph(self, token: int) -> str:
        return str(token - 1) if token > BLANK else "·"

    def symmetry(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """A uniformly random symmetry for every key (B,): digits, bands, rows, stacks, columns, transpose."""
        return random_symmetry(key, self.side, self.box)

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: no digit twice in a row, column or box; blanks and padding break nothing."""
        n, (rows, columns) = self.side, self.box
        digits = torch.arange(2, n + 2, device=tokens.device)
        grid = (tokens.unflatten(1, (n, n))[..., None] == digits).to(torch.uint8)  # (B, row, column, digit)
        boxes = grid.unflatten(1, (-1, rows)).unflatten(3, (-1, columns))
        counts = (grid.sum(2), grid.sum(1), boxes.sum((2, 4)).flatten(1, 2))  # (B, n, digit) each
        return (torch.stack(counts, dim=1) <= 1).flatten(1).all(1)

    def first_fault(self, questions: np.ndarray, answers: np.ndarray, check_unique: bool) -> tuple[int, str] | None:
        """(row, reason) of the first puzzle that breaks a rule. questions, answers (N, S) uint8 digits."""
        side, units = self.side, tables(self.side).units
        known = (questions <= side).all(1) & (answers <= side).all(1)
        placed = np.where(answers <= side, np.left_shift(1, answers.clip(0, side), dtype=np.int16), 0)
        full = sum(1 << digit for digit in range(1, side + 1))
        solved = (np.bitwise_or.reduce(placed[:, units], axis=-1) == full).all(1)
        kept = ((questions == 0) | (questions == answers)).all(1)
        good = known & solved & kept
        stop = len(good) if good.all() else int(good.argmin())
        if check_unique and stop:
            from hrm_rl.tasks.solver import check_many  # numba is only loaded where it is needed

            counts, _ = check_many(questions[:stop])
            if (counts != 1).any():
                return int((counts != 1).argmax()), "the question has more than one solution"
        return None if stop == len(good) else (stop, _reason(questions[stop], answers[stop], side))


def _reason(question: np.ndarray, answer: np.ndarray, side: int) -> str:
    def where(cell: int) -> str:
        return f"row {cell // side + 1}, column {cell % side + 1}"

    for name, cells, blank in (("question", question, True), ("answer", answer, False)):
        bad = np.flatnonzero(cells > side) if blank else np.flatnonzero((cells > side) | (cells == 0))
        if bad.size:
            allowed = f"1 to {side}" + (", '.' or '0'" if blank else "")
            return f"the {name} has a character that is not {allowed} at {where(int(bad[0]))}"
    for name, cells in (("question", question), ("answer", answer)):
        for index, unit in enumerate(tables(side).units):
            counts = np.bincount(cells[unit], minlength=side + 1)[1:]
            if (counts > 1).any():
                kind = ("row", "column", "box")[index // side]
                digit = int(counts.argmax()) + 1
                return f"the {name} breaks the rules: {digit} more than once in {kind} {index % side + 1}"
    cell = int(np.flatnonzero((question != 0) & (question != answer))[0])
    return f"the answer contradicts the question at {where(cell)} ({answer[cell]}, given {question[cell]})"
