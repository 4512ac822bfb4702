"""numba kernels of the maze generator: a perfect maze, some walls opened, and two ends with one shortest way.

A maze is carved by a depth-first walk over rooms in every second row and column (long corridors); where the side is
even, the row and the column that are left over are wall, on a side drawn at random. Opened walls make loops, and so
a choice. The start is a random room; the goal is drawn among the free cells that exactly one shortest way leads to.
"""

from __future__ import annotations

import numpy as np

from hrm_rl.tasks.kernels import _GOLDEN, _MIX_1, below, mix, shuffle
from hrm_rl.tasks.solver import jit


@jit
def carve(rng, side, loops, grid, stack):
    """Fill grid (S,) with 0 wall and 1 free; stack (S,) is room to work in."""
    rooms = (side + 1) // 2
    top, left = 0, 0
    if side % 2 == 0:
        rooms = side // 2
        top, left = below(rng, 2), below(rng, 2)
    grid[:] = 0
    order = np.arange(4)
    steps = np.array([-2 * side, 2 * side, -2, 2])
    at = (top + 2 * below(rng, rooms)) * side + left + 2 * below(rng, rooms)
    grid[at] = 1
    stack[0] = at
    depth = 1
    while depth > 0:
        at = stack[depth - 1]
        row, column = at // side, at % side
        shuffle(rng, order)
        moved = False
        for k in range(4):
            way = order[k]
            if way == 0 and row < 2 or way == 1 and row > side - 3:
                continue
            if way == 2 and column < 2 or way == 3 and column > side - 3:
                continue
            to = at + steps[way]
            if grid[to] == 0:
                grid[to] = 1
                grid[at + steps[way] // 2] = 1
                stack[depth] = to
                depth += 1
                moved = True
                break
        if not moved:
            depth -= 1
    for r in range(rooms):
        for c in range(rooms):
            at = (top + 2 * r) * side + left + 2 * c
            if c + 1 < rooms and grid[at + 1] == 0 and below(rng, 1 << 30) < loops * (1 << 30):
                grid[at + 1] = 1
            if r + 1 < rooms and grid[at + side] == 0 and below(rng, 1 << 30) < loops * (1 << 30):
                grid[at + side] = 1
    at = (top + 2 * below(rng, rooms)) * side + left + 2 * below(rng, rooms)
    return at  # a random room


@jit
def explore(grid, side, start, distance, ways, queue):
    """Steps from `start` and number of shortest ways (2 stands for more) of every cell; distance -1: not reached."""
    distance[:] = -1
    ways[:] = 0
    distance[start], ways[start] = 0, 1
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        at = queue[head]
        head += 1
        row, column = at // side, at % side
        for k in range(4):
            if k == 0 and row == 0 or k == 1 and row == side - 1:
                continue
            if k == 2 and column == 0 or k == 3 and column == side - 1:
                continue
            to = at + (-side if k == 0 else side if k == 1 else -1 if k == 2 else 1)
            if grid[to] == 0:
                continue
            if distance[to] < 0:
                distance[to] = distance[at] + 1
                queue[tail] = to
                tail += 1
            if distance[to] == distance[at] + 1:
                ways[to] = min(2, ways[to] + ways[at])


@jit
def make_mazes(seed, first, attempts, max_attempts, side, low, high, loops, questions, answers, lengths):
    """Fill questions and answers (N, S) uint8 with places in "# SGo" and lengths (N,): row i is maze number first + i.

    attempts (N,): the attempt to start from, and on return the one that succeeded, or -1 where max_attempts failed.
    Every (seed, number, attempt) has random numbers of its own."""
    S = side * side
    grid, stack, queue = np.empty(S, np.int64), np.empty(S, np.int64), np.empty(S, np.int64)
    distance, ways, fit = np.empty(S, np.int64), np.empty(S, np.int64), np.empty(S, np.int64)
    rng = np.empty(1, np.uint64)
    for i in range(questions.shape[0]):
        key = mix(mix(np.uint64(seed) + _GOLDEN) ^ (np.uint64(first + i) * _MIX_1))
        attempt = attempts[i]
        attempts[i] = -1
        while attempt < max_attempts:
            rng[0] = mix(key ^ (np.uint64(attempt + 1) * _GOLDEN))
            start = carve(rng, side, loops, grid, stack)
            explore(grid, side, start, distance, ways, queue)
            fits = 0
            for c in range(S):
                if ways[c] == 1 and distance[c] >= low and distance[c] <= high:
                    fit[fits] = c
                    fits += 1
            if fits > 0:
                goal = fit[below(rng, fits)]
                for c in range(S):
                    questions[i, c] = grid[c]
                    answers[i, c] = grid[c]
                at = goal
                while at != start:  # back along the one way
                    answers[i, at] = 4
                    row, column = at // side, at % side
                    back = distance[at] - 1
                    if row > 0 and distance[at - side] == back:
                        at -= side
                    elif row < side - 1 and distance[at + side] == back:
                        at += side
                    elif column > 0 and distance[at - 1] == back:
                        at -= 1
                    else:
                        at += 1
                questions[i, start], questions[i, goal] = 2, 3
                answers[i, start], answers[i, goal] = 2, 3
                lengths[i] = distance[goal]
                attempts[i] = attempt
                break
            attempt += 1
