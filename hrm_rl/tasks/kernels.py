"""numba kernels of the puzzle generator: random grids, and puzzles cut out of them.

The cost of a minimal puzzle is one question for every cell: "is this given still needed?". A given that is a
naked or a hidden single of the others is not; only for the rest is a second solution looked for, one that has
another digit in that cell. On one core of a small cloud machine that makes about 4,000 minimal 9x9 puzzles a
second.
"""

from __future__ import annotations

import numpy as np

from hrm_rl.tasks.solver import DONE, jit, load, propagate, search, solve_grid

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)


@jit
def mix(x):
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> _30)) * _MIX_1
    x = (x ^ (x >> _27)) * _MIX_2
    return x ^ (x >> _31)


@jit
def below(rng, high):
    """A random integer in [0, high). rng: one uint64, advanced."""
    rng[0] = rng[0] + _GOLDEN
    return np.int64(np.float64(mix(rng[0]) >> _11) * 2.0**-53 * high)


@jit
def shuffle(rng, items):
    for i in range(items.shape[0] - 1, 0, -1):
        j = below(rng, i + 1)
        items[i], items[j] = items[j], items[i]


@jit
def random_grid(rng, grid, stack, trail, queue, units, cell_units, peers):
    """Fill `grid` (S,) with a random complete grid: random first row, then random guesses on random cells
    among those with the fewest candidates."""
    S, U = peers.shape[0], units.shape[0]
    n = units.shape[1]
    first = np.arange(1, n + 1)
    shuffle(rng, first)
    for c in range(S):
        grid[c] = first[c] if c < n else 0
    load(stack[0], grid, cell_units)
    alive = propagate(stack[0], queue, units, cell_units, peers)
    level = 0
    while True:
        if not alive:
            level -= 1
            stack[level, trail[level, 0]] &= ~trail[level, 1]
            alive = propagate(stack[level], queue, units, cell_units, peers)
            continue
        if stack[level, S + U] == 0:
            break
        best, best_count, ties = 0, 99, 0
        for c in range(S):
            m = stack[level, c]
            if m & DONE:
                continue
            count = 0
            while m:
                m &= m - 1
                count += 1
            if count < best_count:
                best_count, ties = count, 0
            if count == best_count:
                queue[ties] = c
                ties += 1
        best = queue[below(rng, ties)]
        m = stack[level, best]
        for _ in range(below(rng, best_count)):
            m &= m - 1
        bit = m & -m
        for k in range(stack.shape[1]):
            stack[level + 1, k] = stack[level, k]
        trail[level, 0], trail[level, 1] = best, bit
        level += 1
        stack[level, best] = bit
        alive = propagate(stack[level], queue, units, cell_units, peers)
    for c in range(S):
        m, digit = stack[level, c] & ((1 << n) - 1), 0
        while m:
            m >>= 1
            digit += 1
        grid[c] = digit


@jit
def is_forced(puzzle, used, cell, digit, units, cell_units):
    """Whether blank `cell` is a naked or hidden single of the givens (its own digit already taken out)."""
    n = units.shape[1]
    full, bit = (1 << n) - 1, 1 << (digit - 1)
    a, b, c = cell_units[cell, 0], cell_units[cell, 1], cell_units[cell, 2]
    if full & ~(used[a] | used[b] | used[c]) == bit:
        return True
    for k in range(3):
        u = cell_units[cell, k]
        alone = True
        for j in range(n):
            other = units[u, j]
            if other == cell or puzzle[other] != 0:
                continue
            seen = used[cell_units[other, 0]] | used[cell_units[other, 1]] | used[cell_units[other, 2]]
            if seen & bit == 0:
                alone = False
                break
        if alone:
            return True
    return False


@jit
def cut(rng, grid, puzzle, target, stack, trail, queue, order, other, used, units, cell_units, peers):
    """Take givens out of `grid` in random order while one solution remains, down to `target` givens.

    With target 0 the result is minimal: every given was asked for once, and one that was needed among more
    givens is needed among fewer. Writes `puzzle` (S,); returns its number of givens."""
    S, U = peers.shape[0], units.shape[0]
    n = units.shape[1]
    full = (1 << n) - 1
    for u in range(U):
        used[u] = full
    for c in range(S):
        puzzle[c] = grid[c]
        order[c] = c
    shuffle(rng, order)
    clues = S
    for i in range(S):
        if clues <= target:
            break
        cell = order[i]
        digit = puzzle[cell]
        bit = 1 << (digit - 1)
        puzzle[cell] = 0
        for k in range(3):
            used[cell_units[cell, k]] &= ~bit
        needed = False
        if not is_forced(puzzle, used, cell, digit, units, cell_units):
            for c in range(S):
                if puzzle[c] != 0:
                    stack[0, c] = (1 << (puzzle[c] - 1)) | DONE
                else:
                    seen = used[cell_units[c, 0]] | used[cell_units[c, 1]] | used[cell_units[c, 2]]
                    stack[0, c] = full & ~seen
            stack[0, cell] &= ~bit
            for u in range(U):
                stack[0, S + u] = used[u]
            stack[0, S + U] = S - clues + 1
            found, _ = search(stack, trail, queue, other, 1, units, cell_units, peers)
            needed = found > 0
        if needed:
            puzzle[cell] = digit
            for k in range(3):
                used[cell_units[cell, k]] |= bit
        else:
            clues -= 1
    return clues


@jit
def make_puzzles(
    seed, first, attempts, max_attempts, clues, minimal, ratings, questions, answers, rated,
    units, cell_units, peers,
):  # fmt: skip
    """Fill questions and answers (N, S) int64 and rated (N,): row i is puzzle number first + i under `seed`.

    clues (2,) and ratings (2,): smallest and largest accepted. attempts (N,): the attempt to start from, and
    on return the one that succeeded, or -1 where max_attempts failed. Every (seed, number, attempt) has
    random numbers of its own, so a puzzle does not depend on how the work was cut into calls."""
    S, U = peers.shape[0], units.shape[0]
    stack = np.empty((S + 1, S + U + 1), np.int32)
    trail = np.empty((S + 1, 2), np.int32)
    queue = np.empty(S, np.int32)
    order = np.empty(S, np.int64)
    other = np.empty(S, np.int64)
    used = np.empty(U, np.int64)
    rng = np.empty(1, np.uint64)
    for i in range(questions.shape[0]):
        puzzle, grid = questions[i], answers[i]
        key = mix(mix(np.uint64(seed) + _GOLDEN) ^ (np.uint64(first + i) * _MIX_1))
        rng[0] = key
        target = 0 if minimal else clues[0] + below(rng, clues[1] - clues[0] + 1)
        attempt = attempts[i]
        attempts[i] = -1
        while attempt < max_attempts:
            rng[0] = mix(key ^ (np.uint64(attempt + 1) * _GOLDEN))
            random_grid(rng, grid, stack, trail, queue, units, cell_units, peers)
            count = cut(rng, grid, puzzle, target, stack, trail, queue, order, other, used, units, cell_units, peers)
            if (count >= clues[0] and count <= clues[1]) if minimal else count == target:
                rated[i] = solve_grid(puzzle, 2, other, units, cell_units, peers)[1]
                if rated[i] >= ratings[0] and rated[i] <= ratings[1]:
                    attempts[i] = attempt
                    break
            attempt += 1
