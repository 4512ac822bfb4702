"""The canonical form: the same under every symmetry, and as many forms as there are grids up to symmetry."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.tasks import get_task
from hrm_rl.tasks.canonical import canonical
from hrm_rl.tasks.generate import PuzzleSpec, generate_puzzles


def all_grids_of_side_4() -> list[tuple[int, ...]]:
    lines = list(permutations((1, 2, 3, 4)))
    grids = []
    for a in lines:
        for b in (b for b in lines if {*a[:2], *b[:2]} == {*a[2:], *b[2:]} == {1, 2, 3, 4}):
            for c in lines:
                for d in (d for d in lines if {*c[:2], *d[:2]} == {*c[2:], *d[2:]} == {1, 2, 3, 4}):
                    if all(len({a[i], b[i], c[i], d[i]}) == 4 for i in range(4)):
                        grids.append(a + b + c + d)
    return grids


def smallest_image(grid: np.ndarray) -> bytes:
    """The definition: every row order, column order and transpose of 4x4, digits relabelled in order."""
    orders = [
        [2 * band + i for band, inner in zip(bands, inners, strict=True) for i in inner]
        for bands in ((0, 1), (1, 0))
        for inners in ((x, y) for x in ((0, 1), (1, 0)) for y in ((0, 1), (1, 0)))
    ]
    images = []
    for turned in (grid, grid.T):
        for rows in orders:
            for columns in orders:
                image = turned[rows][:, columns].ravel()
                label = {digit: i + 1 for i, digit in enumerate(image[:4])}
                images.append(bytes(label[digit] for digit in image))
    return min(images)


def test_side_4_completely():
    grids = all_grids_of_side_4()
    assert len(grids) == 288
    forms = Counter(canonical(np.array(grid)) for grid in grids)
    assert sorted(forms.values()) == [96, 192]
    for grid in grids[::17]:
        assert canonical(np.array(grid)) == smallest_image(np.array(grid).reshape(4, 4))


def test_side_6_has_49_forms():
    rows = generate_puzzles(PuzzleSpec(side=6, count=4000, seed=0))
    assert len({canonical(answer) for answer in rows.answers}) == 49


@pytest.mark.parametrize("side", [4, 6, 9])
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), key=st.integers(-(2**63), 2**63 - 1))
def test_unchanged_by_every_symmetry(side, seed, key):
    answer = generate_puzzles(PuzzleSpec(side=side, count=1, seed=seed)).answers
    tokens = torch.from_numpy(answer).long() + 1
    moved, _ = get_task("sudoku", side).augment(torch.tensor([key]), tokens, tokens)
    form = canonical(answer[0])
    assert canonical((moved[0] - 1).numpy()) == form
    image = torch.tensor(list(form))[None] + 1  # the form is itself a grid with the digits in order at the top
    assert get_task("sudoku", side).is_consistent(image).all()
    assert list(form[:side]) == list(range(1, side + 1))


def test_random_9x9_grids_differ():
    rows = generate_puzzles(PuzzleSpec(count=300, seed=4))
    assert len({canonical(answer) for answer in rows.answers}) == 300
