"""Rules and symmetries as tensor operations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl import rng
from hrm_rl.errors import UserError
from hrm_rl.tasks import Task, get_task, load_puzzles
from hrm_rl.tasks.geometry import tables
from hrm_rl.tasks.symmetry import apply_symmetry, random_symmetry

SIDES = (4, 6, 9)
keys = st.integers(-(2**63), 2**63 - 1)


def batch(side: int, count: int = 8):
    puzzles = load_puzzles(f"sudoku-{side}", split="test", limit=count)
    return puzzles.questions.long(), puzzles.answers.long()


@pytest.mark.parametrize("side", SIDES)
def test_shape_of_the_task(side):
    task = get_task("sudoku", side)
    assert isinstance(task, Task)
    assert task.side == side and task.seq_len == side**2 and task.vocab_size == side + 2
    assert task.box[0] * task.box[1] == side
    assert get_task("hrm_rl.tasks.sudoku.Sudoku", side) == task


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("sudokku", 9, "unknown task 'sudokku'; did you mean 'sudoku'"),
        ("sudoku", 8, "side must be one of 4, 6, 9, not 8"),
        ("no.such.Task", 9, "cannot be imported"),
        ("hrm_rl.tasks.sudoku.Nothing", 9, "cannot be imported"),
    ],
)
def test_unknown_tasks(name, side, message):
    with pytest.raises(UserError, match=message):
        get_task(name, side)


@pytest.mark.parametrize("side", SIDES)
def test_is_consistent(side):
    """Each pair of cells with the same digit breaks a rule exactly where they share a unit."""
    task = get_task("sudoku", side)
    questions, answers = batch(side)
    assert task.is_consistent(answers).all() and task.is_consistent(questions).all()
    assert task.is_consistent(torch.zeros(2, side**2, dtype=torch.long)).all()
    pairs = torch.tensor([(a, b) for a, b in product(range(side**2), repeat=2) if a < b])
    tokens = torch.ones(len(pairs), side**2, dtype=torch.uint8).scatter(1, pairs, side + 1)
    shares = torch.tensor([b in tables(side).peers[a] for a, b in pairs.tolist()])
    assert (task.is_consistent(tokens) == ~shares).all()
    tokens.scatter_(1, pairs[:, :1], 2)  # different digits never clash
    assert task.is_consistent(tokens).all()


@pytest.mark.parametrize("side", SIDES)
@settings(deadline=None, max_examples=60)
@given(key=keys)
def test_augmentation_keeps_what_matters(side, key):
    task = get_task("sudoku", side)
    questions, answers = batch(side)
    key = rng.fold(torch.full((len(questions),), key), torch.arange(len(questions)))
    moved_questions, moved_answers = task.augment(key, questions, answers)
    assert moved_questions.dtype == moved_answers.dtype == torch.int64
    assert task.is_consistent(moved_answers).all() and (moved_answers > 1).all()  # still a solution
    given_cells = moved_questions > 1
    assert (moved_questions[given_cells] == moved_answers[given_cells]).all()  # of the same puzzle
    cells, labels = random_symmetry(key, side, task.box)
    assert (given_cells == (questions > 1).gather(1, cells)).all()  # the pattern of givens moved along
    assert (given_cells.sum(1) == (questions > 1).sum(1)).all()
    assert (labels[:, :2] == torch.tensor([0, 1])).all()
    assert (labels.sort(1).values == torch.arange(side + 2)).all()
    # negative control: one foreign cell breaks the solution
    moved_answers[:, 0] = moved_answers[:, 1]
    assert not task.is_consistent(moved_answers).any()


@pytest.mark.parametrize("side", SIDES)
@settings(deadline=None, max_examples=40)
@given(key=keys)
def test_cells_that_share_a_unit_still_do(side, key):
    """Closure for any size: the composition of two symmetries maps rows, columns and boxes to such units."""
    rows, columns = box = get_task("sudoku", side).box
    key = torch.tensor([key])
    first, second = (random_symmetry(rng.fold(key, torch.tensor([i])), side, box)[0] for i in (1, 2))
    both = first.gather(1, second)[0].numpy()
    assert sorted(both) == list(range(side**2))
    units = {frozenset(unit) for unit in tables(side).units.tolist()}
    assert {frozenset(both[unit].tolist()) for unit in tables(side).units} == units
    kinds, images = (
        [{frozenset(cells[unit].tolist()) for unit in kind} for kind in np.split(tables(side).units, 3)]
        for cells in (np.arange(side**2), both)
    )
    assert images[2] == kinds[2]  # boxes stay boxes
    assert images[:2] == kinds[:2] or (rows == columns and images[:2] == kinds[1::-1])


@pytest.mark.parametrize(("side", "size"), [(4, 2 * 8 * 8), (6, 48 * 72)])
def test_the_whole_group_is_drawn_uniformly_and_is_closed(side, size):
    draws = 40 * size
    key = rng.fold(torch.full((draws,), 5), torch.arange(draws))
    cells, _ = random_symmetry(key, side, get_task("sudoku", side).box)
    group, counts = cells.unique(dim=0, return_counts=True)
    assert len(group) == size
    chi_square = ((counts - 40.0) ** 2 / 40).sum().item()
    assert abs(chi_square - (size - 1)) < 5 * (2 * size) ** 0.5
    members = {tuple(member) for member in group.tolist()}
    some = group[torch.arange(0, size, max(1, size // 64))]
    products = some[:, None, :].expand(-1, len(some), -1).gather(2, some[None].expand(len(some), -1, -1))
    assert {tuple(member) for member in products.flatten(0, 1).tolist()} <= members
    assert {tuple(member) for member in some.argsort(1).tolist()} <= members  # inverses


def test_digits_are_relabelled_uniformly():
    key = rng.fold(torch.full((12_000,), 1), torch.arange(12_000))
    _, labels = random_symmetry(key, 4, (2, 2))
    _, counts = labels.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 400 and counts.max() < 600


def test_transpose_only_where_boxes_are_square():
    key = rng.fold(torch.full((400,), 9), torch.arange(400))
    for side, expected in ((4, 0.5), (6, 0.0), (9, 0.5)):
        cells, _ = random_symmetry(key, side, get_task("sudoku", side).box)
        turned = (cells[:, 1] // side != cells[:, 0] // side).double().mean().item()
        assert turned == pytest.approx(expected, abs=0.1 if expected else 0.0)


def test_rows_are_independent_and_fixed_by_their_key():
    questions, answers = batch(9)
    task = get_task("sudoku", 9)
    key = torch.arange(len(questions))
    together = task.augment(key, questions, answers)
    for i in (0, 5):
        alone = task.augment(key[i : i + 1], questions[i : i + 1], answers[i : i + 1])
        assert (alone[0] == together[0][i]).all() and (alone[1] == together[1][i]).all()
    same = task.augment(torch.zeros(2, dtype=torch.long), questions[:1].expand(2, -1), answers[:1].expand(2, -1))
    assert (same[0][0] == same[0][1]).all()
    assert (together[0] != questions).any()


def test_padding_stays_padding():
    questions, answers = batch(9, 3)
    questions[1], answers[1] = 0, 0
    moved = get_task("sudoku", 9).augment(torch.tensor([1, 2, 3]), questions, answers)
    assert (moved[0][1] == 0).all() and (moved[1][1] == 0).all()
    assert (moved[1][0] > 1).all()


def test_augment_traces_into_one_graph():
    task = get_task("sudoku", 6)
    questions, answers = batch(6)
    key = torch.arange(len(questions))
    compiled = torch.compile(task.augment, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(key, questions, answers), task.augment(key, questions, answers), strict=True):
        assert (got == expected).all()


def test_apply_takes_any_integer_tokens():
    cells, labels = random_symmetry(torch.tensor([3]), 4, (2, 2))
    tokens = torch.arange(16, dtype=torch.uint8)[None] % 6
    assert (apply_symmetry(cells, labels, tokens) == apply_symmetry(cells, labels, tokens.long())).all()
