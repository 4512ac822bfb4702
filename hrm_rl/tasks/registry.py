"""What a task is, and how one is found.

A new task is one file: a class with the members of `Task`, named by its import path ("my_package.my_file.MyTask") or
by a short name in TASKS, and an environment of two lines for it (docs/TASKS.md). Nothing else names it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from hrm_rl.errors import UserError, near_class, nearest

TASKS = {
    "sudoku": "hrm_rl.tasks.sudoku.Sudoku",
    "maze": "hrm_rl.tasks.maze.Maze",
    "n_queens": "hrm_rl.tasks.reasoning.NQueens",
    "futoshiki": "hrm_rl.tasks.reasoning.Futoshiki",
    "mini_sudoku": "hrm_rl.tasks.reasoning.MiniSudoku",
}
DEFAULT_TASK = "sudoku"


@runtime_checkable
class Task(Protocol):
    """The rules of one kind of puzzle at one size. N or B puzzles, S tokens in a grid, row by row; V token values.

    Token 0 is padding, token t > 0 stands for the character `characters[t - 1]` of a file. A puzzle has one right
    answer, the one it comes with: an answer counts where every token is that one. `side` is the one argument of the
    class; UserError where it is not among `sides`.
    """

    name: ClassVar[str]
    sides: ClassVar[Sequence[int]]  # the sizes there are
    default_side: ClassVar[int]
    geometry: ClassVar[str]  # how two cells are related, for a core with grid mixing (CoreConfig.geometry)
    reveals: ClassVar[bool]  # whether a puzzle gets easier with more of its answer shown (clues, curriculum)
    aliases: ClassVar[dict[str, str]]  # other characters a file may hold, and what each stands for

    side: int
    shape: tuple[int, int]  # rows and columns of the grid of tokens
    box: tuple[int, int]  # rows and columns of the blocks that a picture frames
    seq_len: int  # S
    vocab_size: int  # V
    cells: int  # how many of the S the puzzle may leave open
    open_token: int  # what stands in the puzzle where the answer is not given
    characters: str  # of the tokens 1, 2, ... in a file

    def augment(self, key: Tensor, questions: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """A random symmetry a row. key (B,) int64; questions, answers (B, S) int64."""
        ...

    def restore(self, key: Tensor, tokens: Tensor) -> Tensor:
        """The inverse of `augment` under the same key, for answers: tokens (B, S) -> (B, S) int64."""
        ...

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: no rule is broken by the cells that are filled."""
        ...

    def glyph(self, token: int) -> str:
        """One character for pictures; a full block fills the cell."""
        ...

    def first_fault(self, questions: np.ndarray, answers: np.ndarray, check_unique: bool) -> tuple[int, str] | None:
        """(row, reason) of the first puzzle that breaks a rule or whose answer is wrong; None where all are right.

        questions, answers (N, S) uint8: places in `characters`, 255 for a character that is not among them.
        check_unique: refuse a question with several right answers too, where the task's rules allow that at all.
        """
        ...


class Makes(Protocol):
    """What `hrm_rl.generate` and sets that do not ship ask of a task besides."""

    spec: ClassVar[type]  # a frozen dataclass: side, count, seed and what else can be asked for
    quick: ClassVar[bool]  # whether thousands take seconds, so that a set that does not ship is made where it is needed

    @staticmethod
    def generate(spec: Any, exclude: Collection[bytes] = (), progress: Callable[[int], None] | None = None) -> Any:
        """`spec.count` different puzzles as `csv_io.Rows`; none whose `form` is in `exclude`."""
        ...

    @staticmethod
    def form(question: np.ndarray, answer: np.ndarray) -> bytes:
        """What two puzzles share where one gives the other away, (S,) both: the same under every symmetry."""
        ...


def task_name(word: str) -> str:
    """A short name as TASKS spells it, where it was written with hyphens (mini-sudoku); anything else as it is."""
    spelt = word.replace("-", "_")
    return spelt if spelt in TASKS else word


def task_class(name: str) -> type[Task]:
    """The class of that name ("sudoku") or import path ("package.module.Class"). UserError names the known ones."""
    path = TASKS.get(task_name(name), name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)} (known: {', '.join(TASKS)})")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        hint = near_class(error, attribute, lambda kind: hasattr(kind, "sides"))
        raise UserError(f"task {name!r} cannot be imported ({error}){hint}") from None


@lru_cache(maxsize=64)
def get_task(name: str, side: int) -> Task:
    """The task of that name ("sudoku") or import path ("package.module.Class"), at that size."""
    return task_class(name)(side)


def check_side(sides: Sequence[int], side: int, name: str = "side") -> None:
    """UserError unless `side` is one of `sides`; `name` is what the argument is called."""
    if isinstance(side, bool) or side not in sides:
        said = f"{sides[0]} to {sides[-1]}" if isinstance(sides, range) else f"one of {', '.join(map(str, sides))}"
        raise UserError(f"{name} must be {said}, not {side!r}")


def task_of_core(vocab_size: int, seq_len: int) -> tuple[str, int]:
    """(task, side) whose puzzles have these sizes, for a core that does not say what it was made for.

    The first of TASKS that fits; UserError where none does."""
    for name in TASKS:
        for side in task_class(name).sides:
            task = get_task(name, side)
            if (task.vocab_size, task.seq_len) == (vocab_size, seq_len):
                return name, side
    raise UserError(f"no task has puzzles of {seq_len} tokens with {vocab_size} values (known: {', '.join(TASKS)})")
