"""Puzzles with exactly one solution, fixed by a seed.

Puzzle number i under a seed has random numbers of its own, so a small set is the beginning of a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import Rows
from hrm_rl.tasks.geometry import box_of, tables

FEWEST_CLUES = {4: 4, 6: 8, 9: 17}  # no puzzle with one solution has fewer givens
_CHUNK = 32
_MAX_ATTEMPTS = 20_000  # grids tried for one puzzle before the request is called hopeless
_MAX_RATING = 1 << 40


@dataclass(frozen=True)
class PuzzleSpec:
    """What puzzles to make.

    Args:
        side: Side of the grid: 4, 6 or 9.
        count: How many puzzles, all different.
        min_clues: Fewest givens a puzzle may have.
        max_clues: Most givens a puzzle may have.
        minimal: Whether no given may be redundant. Otherwise the number of givens is uniform over the range.
            By default puzzles are minimal exactly where no range is given.
        min_rating: Smallest accepted rating (guesses needed; 0 is solved by singles alone).
        max_rating: Largest accepted rating.
        seed: Fixes the result.
        grid_classes: Draw the solutions from no more than this many grids that differ up to symmetry
            (0: no limit); so that for small sides another set can be made from the other grids.
    """

    side: int = 9
    count: int = 1000
    min_clues: int | None = None
    max_clues: int | None = None
    minimal: bool | None = None
    min_rating: int = 0
    max_rating: int | None = None
    seed: int = 0
    grid_classes: int = 0

    def __post_init__(self) -> None:
        box_of(self.side)
        fewest, cells = FEWEST_CLUES[self.side], self.side**2
        if self.count < 1:
            raise UserError(f"count must be at least 1, not {self.count}")
        for name in ("min_clues", "max_clues"):
            value = getattr(self, name)
            if value is not None and not fewest <= value <= cells:
                raise UserError(
                    f"{name} must be {fewest} to {cells} for side {self.side} "
                    f"(no puzzle with one solution has fewer than {fewest} givens), not {value}"
                )
        low, high = self.clue_range
        if low > high:
            raise UserError(f"min_clues ({low}) is above max_clues ({high})")
        if self.min_rating < 0:
            raise UserError(f"min_rating must not be negative, not {self.min_rating}")
        if self.max_rating is not None and self.max_rating < self.min_rating:
            raise UserError(f"min_rating ({self.min_rating}) is above max_rating ({self.max_rating})")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be 0 to 2^63 - 1, not {self.seed}")
        if self.grid_classes < 0:
            raise UserError(f"grid_classes must not be negative, not {self.grid_classes}")

    @property
    def is_minimal(self) -> bool:
        return self.minimal if self.minimal is not None else self.min_clues is None and self.max_clues is None

    @property
    def clue_range(self) -> tuple[int, int]:
        low = FEWEST_CLUES[self.side] if self.min_clues is None else self.min_clues
        return low, self.side**2 if self.max_clues is None else self.max_clues


def generate_puzzles(
    spec: PuzzleSpec, exclude: Iterable[bytes] = (), progress: Callable[[int], None] | None = None
) -> Rows:
    """Make `spec.count` different puzzles.

    exclude: canonical forms (`canonical.canonical`) of solution grids that may not occur, up to symmetry.
    progress: called with the number of puzzles done since the last call.
    Raises UserError where no such puzzle turns up in 20,000 attempts."""
    from hrm_rl.tasks import canonical, kernels  # numba is only loaded where puzzles are made

    S = spec.side**2
    clues = np.array(spec.clue_range, np.int64)
    hardest = _MAX_RATING if spec.max_rating is None else spec.max_rating
    ratings = np.array((spec.min_rating, hardest), np.int64)
    questions, answers = np.zeros((spec.count, S), np.int64), np.zeros((spec.count, S), np.int64)
    rated, attempts = np.zeros(spec.count, np.int64), np.zeros(spec.count, np.int64)
    excluded, allowed, seen = frozenset(exclude), set(), set()

    def make(first: int, last: int) -> None:
        part = slice(first, last)
        kernels.make_puzzles(
            spec.seed, first, attempts[part], _MAX_ATTEMPTS, clues, spec.is_minimal, ratings,
            questions[part], answers[part], rated[part], *tables(spec.side),
        )  # fmt: skip

    def accept(index: int) -> bool:
        puzzle = questions[index].astype(np.uint8).tobytes()
        if puzzle in seen:
            return False
        if excluded or spec.grid_classes:
            form = canonical.canonical(answers[index])
            if form in excluded:
                return False
            if spec.grid_classes and form not in allowed:
                if len(allowed) == spec.grid_classes:
                    return False
                allowed.add(form)
        seen.add(puzzle)
        return True

    for first in range(0, spec.count, _CHUNK):
        last = min(first + _CHUNK, spec.count)
        make(first, last)
        for index in range(first, last):
            while attempts[index] >= 0 and not accept(index):
                attempts[index] += 1
                make(index, index + 1)
            if attempts[index] < 0:
                raise UserError(
                    f"after {index} of {spec.count} puzzles, {_MAX_ATTEMPTS:,} attempts made no further one "
                    f"({_describe(spec)}); ask for a wider range or fewer puzzles"
                )
        if progress is not None:
            progress(last - first)
    sources = (f"hrm_rl-{'minimal' if spec.is_minimal else 'uniform'}",) * spec.count
    return Rows(questions.astype(np.uint8), answers.astype(np.uint8), rated.astype(np.float32), sources)


def canonical_grids(answers: np.ndarray) -> set[bytes]:
    """The canonical forms of complete grids (N, S)."""
    from hrm_rl.tasks.canonical import canonical

    return {canonical(grid) for grid in np.unique(answers, axis=0)}


def _describe(spec: PuzzleSpec) -> str:
    low, high = spec.clue_range
    kind = "minimal, " if spec.is_minimal else ""
    top = "" if spec.max_rating is None else f" to {spec.max_rating}"
    return f"{kind}{low} to {high} givens, rating from {spec.min_rating}{top}"
