"""The solver against known counts and against a plain backtracking search."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.errors import UserError
from hrm_rl.tasks import solver
from hrm_rl.tasks.geometry import tables

EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
EASY_ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def digits(text: str) -> np.ndarray:
    return np.array([0 if character == "." else int(character) for character in text])


def plain_count(grid: list[int], side: int, limit: int) -> int:
    """Backtracking without any cleverness: the first blank, every digit."""
    if 0 not in grid:
        return 1
    cell = grid.index(0)
    used = {grid[peer] for peer in tables(side).peers[cell]}
    count = 0
    for digit in range(1, side + 1):
        if digit not in used and count < limit:
            grid[cell] = digit
            count += plain_count(grid, side, limit - count)
    grid[cell] = 0
    return count


def test_known_solution():
    assert (solver.solve(digits(EASY)) == digits(EASY_ANSWER)).all()
    assert solver.count_solutions(digits(EASY)) == 1
    assert solver.rate(digits(EASY)) == 0


def test_known_counts():
    assert solver.count_solutions(np.zeros((4, 4)), limit=0) == 288
    six = np.zeros((6, 6), int)
    six[0] = range(1, 7)
    assert solver.count_solutions(six, limit=0) * 720 == 28_200_960  # all 6x6 grids
    assert solver.count_solutions(np.zeros(81), limit=7) == 7


def test_no_solution():
    grid = digits(EASY)
    grid[2] = 5  # twice in the first row
    assert solver.count_solutions(grid) == 0 and solver.solve(grid) is None
    trapped = np.zeros((4, 4), int)
    trapped[0, :3], trapped[1, 3] = (1, 2, 3), 4  # nothing is left for the fourth cell
    assert solver.solve(trapped) is None


def test_several_solutions_need_guesses():
    swapped = digits(EASY_ANSWER).reshape(9, 9)
    rectangle = ((0, 3), (0, 5), (1, 3), (1, 5))
    swapped[tuple(zip(*rectangle, strict=True))] = 0
    assert solver.count_solutions(swapped, limit=0) == plain_count(swapped.ravel().tolist(), 9, 99)
    assert solver.rate(np.zeros((4, 4))) > 0


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([4, 6]), st.integers(0, 2**32 - 1), st.floats(0.3, 0.9))
def test_agrees_with_plain_backtracking(side, seed, share):
    random = np.random.default_rng(seed)
    grid = solver.solve(np.zeros(side * side))
    relabelled = (random.permutation(side) + 1)[grid - 1]
    puzzle = np.where(random.random(side * side) < share, relabelled, 0)
    if random.random() < 0.3:
        puzzle[random.integers(side * side)] = random.integers(1, side + 1)  # often a contradiction
    cells = [int(c) for c in puzzle]
    legal = all(cells[c] == 0 or cells[c] not in {cells[p] for p in tables(side).peers[c]} for c in range(side**2))
    expected = plain_count(cells, side, 5) if legal else 0
    assert solver.count_solutions(puzzle, limit=5) == expected
    solution = solver.solve(puzzle)
    assert (solution is not None) == (expected > 0)
    if solution is not None:
        assert ((puzzle == 0) | (puzzle == solution)).all()


def test_bad_grids_are_named():
    with pytest.raises(UserError, match="not 25"):
        solver.solve(np.zeros(25))
    with pytest.raises(UserError, match="0 to 4"):
        solver.solve(np.full(16, 5))


def test_jit_works_where_no_cache_can_be_written(monkeypatch):
    real = numba.njit

    def refuses(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", refuses)

    @solver.jit
    def double(x):
        return 2 * x

    assert double(21) == 42
