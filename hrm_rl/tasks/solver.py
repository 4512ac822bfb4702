"""A small exact solver: counts solutions, solves, and rates puzzles by the guesses they need.

Constraint propagation (naked and hidden singles) on candidate bit masks, then depth-first search on the cell
with the fewest candidates. A guess that fails, or that has been counted, is struck from its cell and the
consequences are propagated before the next guess. Grids are (S,) or (n, n) arrays of digits, 0 for a blank.

The state of a search level is one int32 row: S candidate masks (a placed cell carries `DONE`), then the
3n masks of the digits placed in each unit, then the number of cells still open. A level is one row copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from hrm_rl.errors import UserError
from hrm_rl.tasks.geometry import BOXES, Tables, tables

DONE = 1 << 12  # marks a placed cell
_NO_LIMIT = 1 << 62


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba.njit with an on-disk cache; without one where no folder can be written (read-only installs).

    The cache notices a change in a function's own file only: after an edit here, touch kernels.py too."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@jit
def load(state, grid, cell_units):
    """Fill `state` from digits (S,), 0 blank. False where two givens share a unit."""
    S, U = cell_units.shape[0], state.shape[0] - cell_units.shape[0] - 1
    full = (1 << (U // 3)) - 1
    for u in range(U):
        state[S + u] = 0
    open_cells = 0
    for c in range(S):
        if grid[c] == 0:
            open_cells += 1
            continue
        bit = 1 << (grid[c] - 1)
        for k in range(3):
            u = S + cell_units[c, k]
            if state[u] & bit:
                return False
            state[u] |= bit
    state[S + U] = open_cells
    for c in range(S):
        if grid[c] == 0:
            used = state[S + cell_units[c, 0]] | state[S + cell_units[c, 1]] | state[S + cell_units[c, 2]]
            state[c] = full & ~used
        else:
            state[c] = (1 << (grid[c] - 1)) | DONE
    return True


@jit
def propagate(state, queue, units, cell_units, peers):
    """Place naked and hidden singles until none is left. False on a contradiction.

    On entry any open cell may hold a single candidate that has not been placed yet."""
    S, P = peers.shape
    U, n = units.shape
    full = (1 << n) - 1
    waiting = 0
    for c in range(S):
        m = state[c]
        if m & DONE:
            continue
        if m == 0:
            return False
        if m & (m - 1) == 0:
            queue[waiting] = c
            waiting += 1
    head = 0
    while True:
        while head < waiting:
            c = queue[head]
            head += 1
            bit = state[c]
            state[c] = bit | DONE
            state[S + cell_units[c, 0]] |= bit
            state[S + cell_units[c, 1]] |= bit
            state[S + cell_units[c, 2]] |= bit
            state[S + U] -= 1
            for k in range(P):
                p = peers[c, k]
                m = state[p]
                if m & bit:
                    m ^= bit
                    if m == 0 or m & DONE:
                        return False
                    state[p] = m
                    if m & (m - 1) == 0:
                        queue[waiting] = p
                        waiting += 1
        if state[S + U] == 0:
            return True
        head = waiting = 0
        for u in range(U):
            once, twice = 0, 0
            for k in range(n):
                m = state[units[u, k]]
                twice |= once & m
                once |= m
            if once & full != full:
                return False  # some digit has no place left in this unit
            hidden = once & ~twice & ~state[S + u] & full
            if hidden == 0:
                continue
            for k in range(n):
                c = units[u, k]
                m = state[c]
                bit = m & hidden
                if bit == 0 or m & DONE:
                    continue
                if bit & (bit - 1):
                    return False  # two digits want the same cell
                if m != bit:
                    state[c] = bit
                    queue[waiting] = c
                    waiting += 1
        if waiting == 0:
            return True


@jit
def fewest(state, S):
    """The first open cell with the fewest candidates."""
    best, best_count = -1, 99
    for c in range(S):
        m = state[c]
        if m & DONE:
            continue
        count = 0
        while m:
            m &= m - 1
            count += 1
        if count < best_count:
            best, best_count = c, count
            if count == 2:
                break
    return best


@jit
def search(stack, trail, queue, solution, limit, units, cell_units, peers):
    """Count solutions of stack[0] up to `limit`; the first one is written into `solution` (S,).

    stack (S + 1, state); trail (S + 1, 2): cell and bit guessed at each level. Returns (solutions, guesses)."""
    S, U = peers.shape[0], units.shape[0]
    width = S + U + 1
    found, guesses, level = 0, 0, 0
    alive = propagate(stack[0], queue, units, cell_units, peers)
    while True:
        if alive and stack[level, S + U] == 0:
            if found == 0:
                for c in range(S):
                    m, digit = stack[level, c] & ~DONE, 0
                    while m:
                        m >>= 1
                        digit += 1
                    solution[c] = digit
            found += 1
            if found >= limit:
                return found, guesses
            alive = False
        if not alive:
            if level == 0:
                return found, guesses
            level -= 1
            stack[level, trail[level, 0]] &= ~trail[level, 1]
            alive = propagate(stack[level], queue, units, cell_units, peers)
            continue
        c = fewest(stack[level], S)
        bit = stack[level, c] & -stack[level, c]
        for k in range(width):
            stack[level + 1, k] = stack[level, k]
        trail[level, 0], trail[level, 1] = c, bit
        level += 1
        guesses += 1
        stack[level, c] = bit
        alive = propagate(stack[level], queue, units, cell_units, peers)


@jit
def solve_grid(grid, limit, solution, units, cell_units, peers):
    """`search` from digits: (solutions up to limit, guesses)."""
    S, U = peers.shape[0], units.shape[0]
    stack = np.empty((S + 1, S + U + 1), np.int32)
    trail = np.empty((S + 1, 2), np.int32)
    queue = np.empty(S, np.int32)
    if not load(stack[0], grid, cell_units):
        return 0, 0
    return search(stack, trail, queue, solution, limit, units, cell_units, peers)


@jit
def solve_many(grids, limit, counts, guesses, units, cell_units, peers):
    """`solve_grid` for every row of grids (N, S); fills counts and guesses (N,)."""
    solution = np.empty(grids.shape[1], np.int64)
    for i in range(grids.shape[0]):
        counts[i], guesses[i] = solve_grid(grids[i], limit, solution, units, cell_units, peers)


def _as_cells(grid: np.ndarray) -> tuple[np.ndarray, Tables]:
    cells = np.ascontiguousarray(grid, dtype=np.int64).reshape(-1)
    side = math.isqrt(cells.size)
    if side * side != cells.size or side not in BOXES:
        raise UserError(f"a grid has 16, 36 or 81 cells, not {cells.size}")
    if cells.min() < 0 or cells.max() > side:
        raise UserError(f"the cells of a {side}x{side} grid are 0 to {side}")
    return cells, tables(side)


def count_solutions(grid: np.ndarray, limit: int = 2) -> int:
    """Number of solutions, counted up to `limit` (0: all of them)."""
    cells, geometry = _as_cells(grid)
    return int(solve_grid(cells, limit or _NO_LIMIT, np.empty_like(cells), *geometry)[0])


def solve(grid: np.ndarray) -> np.ndarray | None:
    """The first solution found, in the shape of `grid`, or None."""
    cells, geometry = _as_cells(grid)
    solution = np.empty_like(cells)
    found, _ = solve_grid(cells, 1, solution, *geometry)
    return solution.reshape(np.shape(grid)) if found else None


def rate(grid: np.ndarray) -> int:
    """Difficulty: the guesses needed to find the solution and to rule out any other.

    0: naked and hidden singles alone solve it. A digit forced because its rivals failed is no guess."""
    cells, geometry = _as_cells(grid)
    return int(solve_grid(cells, 2, np.empty_like(cells), *geometry)[1])


def check_many(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of solutions up to 2, rating) of every row of grids (N, S)."""
    grids = np.ascontiguousarray(grids, dtype=np.int64)
    geometry = _as_cells(grids[0])[1]
    counts, guesses = np.empty(len(grids), np.int64), np.empty(len(grids), np.int64)
    solve_many(grids, 2, counts, guesses, *geometry)
    return counts, guesses
