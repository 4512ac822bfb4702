"""What tasks on a square grid of cells share: its sizes, and symmetries drawn row by row."""

from __future__ import annotations

from torch import Tensor

from hrm_rl.tasks.symmetry import apply_symmetry, undo_symmetry


class SquareGrid:
    """Base of tasks with one token a cell, side * side = S in all, row by row. A subclass has `side` and `symmetry`."""

    side: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def box(self) -> tuple[int, int]:
        """(rows, columns) of the blocks that a picture frames: the whole grid."""
        return self.side, self.side

    @property
    def seq_len(self) -> int:
        return self.side * self.side

    @property
    def cells(self) -> int:
        return self.seq_len

    def symmetry(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """A random symmetry for every key (B,) int64 (hrm_rl/rng.py): what becomes of the cells, and of the tokens."""
        raise NotImplementedError

    def augment(self, key: Tensor, questions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """A random symmetry for every row, the same for question and answer: key (B,), the others (B, S), int64 each.

        Padding stays padding."""
        cells, labels = self.symmetry(key)
        return apply_symmetry(cells, labels, questions), apply_symmetry(cells, labels, answers)

    def restore(self, key: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `augment` under the same key (B,): tokens (B, S) -> (B, S) int64."""
        return undo_symmetry(*self.symmetry(key), tokens)
