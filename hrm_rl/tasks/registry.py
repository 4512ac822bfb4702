"""What the environments ask of a task, and how a task is found."""

from __future__ import annotations

import importlib
from typing import Protocol, runtime_checkable

from torch import Tensor

from hrm_rl.errors import UserError, nearest

TASKS = {"sudoku": "hrm_rl.tasks.sudoku.Sudoku"}


@runtime_checkable
class Task(Protocol):
    """The rules of one kind of puzzle at one size, as tensor operations. B puzzles, S tokens."""

    side: int
    box: tuple[int, int]
    seq_len: int
    vocab_size: int

    def augment(self, key: Tensor, questions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """A random symmetry a row. key (B,) int64; questions, answers (B, S) int64."""
        ...

    def restore(self, key: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `augment` under the same key, for answers: tokens (B, S) -> (B, S) int64."""
        ...

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: no rule is broken by the cells that are filled."""
        ...


def get_task(name: str, side: int) -> Task:
    """The task of that name ("sudoku") or import path ("package.module.Class"), at that size."""
    path = TASKS.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)} (known: {', '.join(TASKS)})")
    try:
        module = importlib.import_module(module_name)
        task = getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"task {name!r} cannot be imported ({error})") from None
    return task(side)
