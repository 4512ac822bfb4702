"""Mazes of side 5 to 30: find the shortest way from S to G.

Encoding of the HRM release (dataset/build_maze_dataset.py): the characters "# SGo" are the tokens 1 to 5 (wall, free,
start, goal, way), 0 is padding. The answer is the question with 'o' in every free cell of the way. The public set
(sapientinc/maze-30x30-hard-1k) is scored by exact match with the way it gives, and so are we: a file may hold mazes
with several shortest ways, of which its own counts. Ours have exactly one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import Rows
from hrm_rl.tasks.registry import check_side
from hrm_rl.tasks.square import SquareGrid
from hrm_rl.tasks.symmetry import Symmetries, of_the_square

CHARACTERS = "# SGo"
WALL, FREE, START, GOAL, WAY = range(5)  # places in CHARACTERS; a token is one more
SIDES = range(5, 31)
_MAX_ATTEMPTS = 2000  # mazes tried for one puzzle before the request is called hopeless
_CHUNK = 256


@dataclass(frozen=True)
class MazeSpec:
    """What mazes to make. Their walls stand on a lattice: rooms in every second row and column, passages between.

    Args:
        side: Side of the grid: 5 to 30.
        count: How many mazes, all different.
        min_length: Fewest steps from start to goal.
        max_length: Most steps from start to goal; nothing: no limit.
        loops: Share of the walls between rooms that are taken out of a maze without loops, so that there are ways to
            choose from.
        seed: Fixes the result.
    """

    side: int = 10
    count: int = 1000
    min_length: int = 4
    max_length: int | None = None
    loops: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        check_side(SIDES, self.side)
        if self.count < 1:
            raise UserError(f"count must be at least 1, not {self.count}")
        most = self.side**2 - 1
        if not 2 <= self.min_length <= most:
            raise UserError(f"min_length must be 2 to {most} for side {self.side}, not {self.min_length}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise UserError(f"min_length ({self.min_length}) is above max_length ({self.max_length})")
        if not 0 <= self.loops <= 1:
            raise UserError(f"loops must be between 0 and 1, not {self.loops}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True)
class Maze(SquareGrid):
    """The rules of one size. B or N mazes, S = side * side tokens, row by row."""

    name: ClassVar[str] = "maze"
    sides: ClassVar[range] = SIDES
    default_side: ClassVar[int] = 10
    geometry: ClassVar[str] = "neighbours"
    reveals: ClassVar[bool] = False  # part of the way shown leaves another, shorter problem: ask for shorter mazes
    aliases: ClassVar[dict[str, str]] = {}
    characters: ClassVar[str] = CHARACTERS
    open_token: ClassVar[int] = FREE + 1
    vocab_size: ClassVar[int] = len(CHARACTERS) + 1
    spec: ClassVar[type] = MazeSpec
    quick: ClassVar[bool] = True

    side: int = 10

    def __post_init__(self) -> None:
        check_side(SIDES, self.side)

    def glyph(self, token: int) -> str:
        return " █·SGo"[token]

    def symmetry(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """One of the 8 symmetries of the square for every key (B,)."""
        return _symmetries(self.side).draw(key)

    def is_consistent(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B,) bool: at most one start and goal, no cell of the way with more than two neighbours on it."""
        start, goal = ((tokens == place + 1).sum(1) for place in (START, GOAL))
        grid = torch.nn.functional.pad((tokens > FREE + 1).unflatten(1, self.shape).int(), (1, 1, 1, 1))
        beside = grid[:, 2:, 1:-1] + grid[:, :-2, 1:-1] + grid[:, 1:-1, 2:] + grid[:, 1:-1, :-2]
        crossing = (tokens == WAY + 1) & (beside.flatten(1) > 2)
        return (start <= 1) & (goal <= 1) & ~crossing.any(1)

    def first_fault(self, questions: np.ndarray, answers: np.ndarray, check_unique: bool) -> tuple[int, str] | None:
        """(row, reason) of the first maze whose answer is no shortest way; (N, S) uint8 places in CHARACTERS.

        check_unique has no say: of several shortest ways the file's own counts (see the head of this file)."""
        known = (questions <= GOAL).all(1) & (answers <= WAY).all(1)
        ends = ((questions == START).sum(1) == 1) & ((questions == GOAL).sum(1) == 1)
        kept = ((questions == answers) | ((questions == FREE) & (answers == WAY))).all(1)
        good = known & ends & kept
        length = np.full(len(good), -1)
        if good.any():
            length[good] = shortest(questions[good], self.side)
            way = np.where(answers[good] == FREE, WALL, answers[good])  # walk on the way alone
            good[good] = (length[good] > 0) & (shortest(way, self.side) == length[good]) & (
                (answers[good] == WAY).sum(1) == length[good] - 1
            )  # fmt: skip
        if good.all():
            return None
        row = int(good.argmin())
        return row, _reason(questions[row], answers[row], int(length[row]), self.side)

    @staticmethod
    def generate(
        spec: MazeSpec, exclude: Collection[bytes] = (), progress: Callable[[int], None] | None = None
    ) -> Rows:
        """`spec.count` different mazes with one shortest way each, rated by its length in steps.

        exclude: `form`s that may not occur. progress: called with the number of mazes done since the last call.
        UserError where 2,000 attempts make no maze that was asked for."""
        from hrm_rl.tasks.maze_kernels import make_mazes  # numba is only loaded where mazes are made

        cells = spec.side**2
        questions, answers = (np.zeros((spec.count, cells), np.uint8) for _ in range(2))
        lengths, attempts = (np.zeros(spec.count, np.int64) for _ in range(2))
        most = cells if spec.max_length is None else spec.max_length
        excluded, seen = frozenset(exclude), set()

        def make(first: int, last: int) -> None:
            part = slice(first, last)
            make_mazes(spec.seed, first, attempts[part], _MAX_ATTEMPTS, spec.side, spec.min_length, most, spec.loops,
                       questions[part], answers[part], lengths[part])  # fmt: skip

        for first in range(0, spec.count, _CHUNK):
            last = min(first + _CHUNK, spec.count)
            make(first, last)
            for index in range(first, last):
                while attempts[index] >= 0:
                    maze = questions[index].tobytes()
                    form = Maze.form(questions[index], answers[index]) if excluded else b""
                    if maze not in seen and form not in excluded:
                        seen.add(maze)
                        break
                    attempts[index] += 1
                    make(index, index + 1)
                if attempts[index] < 0:
                    raise UserError(
                        f"after {index} of {spec.count} mazes, {_MAX_ATTEMPTS:,} attempts made no further one (side "
                        f"{spec.side}, {spec.min_length} to {most} steps); ask for other lengths or fewer mazes"
                    )
            if progress is not None:
                progress(last - first)
        return Rows(questions, answers, lengths.astype(np.float32), (f"hrm_rl-maze-{spec.loops:g}",) * spec.count)

    @staticmethod
    def form(question: np.ndarray, answer: np.ndarray) -> bytes:
        """The maze up to symmetry, start and goal included: (S,) places -> S bytes."""
        side = round(len(question) ** 0.5)
        return min(image.astype(np.uint8).tobytes() for image in _symmetries(side).images(question))


@lru_cache
def _symmetries(side: int) -> Symmetries:
    return Symmetries(of_the_square(side), np.tile(np.arange(len(CHARACTERS) + 1), (8, 1)))


def shortest(mazes: np.ndarray, side: int) -> np.ndarray:
    """Steps from start to goal of every maze, -1 where there is no way: (N, S) places in CHARACTERS -> (N,) int64.

    One breadth-first search over all of them at once."""
    grid = np.pad(mazes.reshape(-1, side, side), ((0, 0), (1, 1), (1, 1)), constant_values=WALL)
    walkable, goal = grid != WALL, grid == GOAL
    reached, found = grid == START, np.full(len(mazes), -1)
    for step in range(1, side * side):
        new = np.zeros_like(reached)
        inner = new[:, 1:-1, 1:-1]
        for rows, columns in ((slice(2, None), slice(1, -1)), (slice(None, -2), slice(1, -1)),
                              (slice(1, -1), slice(2, None)), (slice(1, -1), slice(None, -2))):  # fmt: skip
            inner |= reached[:, rows, columns]
        new &= walkable & ~reached
        found[(found < 0) & (new & goal).any((1, 2))] = step
        if not new.any() or (found >= 0).all():
            break
        reached |= new
    return found


def _reason(question: np.ndarray, answer: np.ndarray, length: int, side: int) -> str:
    for name, cells, most in (("question", question, GOAL), ("answer", answer, WAY)):
        bad = np.flatnonzero(cells > most)
        if bad.size:
            return f"the {name} has a character that is not one of {CHARACTERS[: most + 1]!r} at {_where(bad[0], side)}"
    for place, word in ((START, "start (S)"), (GOAL, "goal (G)")):
        count = int((question == place).sum())
        if count != 1:
            return f"the question must have one {word}, not {count}"
    differs = np.flatnonzero((question != answer) & ~((question == FREE) & (answer == WAY)))
    if differs.size:
        cell = int(differs[0])
        given, found = CHARACTERS[question[cell]], CHARACTERS[answer[cell]]
        return f"the answer contradicts the question at {_where(cell, side)} ({found!r}, given {given!r})"
    if length < 0:
        return "no way leads from S to G"
    way = int((answer == WAY).sum()) + 1
    on_way = shortest(np.where(answer == FREE, WALL, answer)[None], side)[0]
    if on_way < 0:
        return "the answer's 'o' do not lead from S to G"
    if on_way == length:
        return f"the answer has 'o' beside its way ({way - 1} of them, the way has {length - 1})"
    return f"the answer's way takes {on_way} steps, the shortest {length}"


def _where(cell: int, side: int) -> str:
    return f"row {cell // side + 1}, column {cell % side + 1}"
