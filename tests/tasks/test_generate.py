"""The generator: one solution, minimality, ranges, seeds, exclusion up to symmetry; and its speed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hrm_rl.errors import UserError
from hrm_rl.tasks import generate, solver
from hrm_rl.tasks.generate import PuzzleSpec, canonical_grids, generate_puzzles


def clue_counts(rows):
    return (rows.questions > 0).sum(1)


@pytest.mark.parametrize("side", [4, 6, 9])
def test_minimal_puzzles(side):
    rows = generate_puzzles(PuzzleSpec(side=side, count=40, seed=3))
    assert rows.side == side and len({q.tobytes() for q in rows.questions}) == 40
    for question, answer, rating in zip(rows.questions, rows.answers, rows.ratings, strict=True):
        assert (solver.solve(question) == answer).all() and solver.count_solutions(question) == 1
        assert solver.rate(question) == rating
        for cell in np.flatnonzero(question):  # every given is needed
            fewer = question.copy()
            fewer[cell] = 0
            assert solver.count_solutions(fewer) == 2


def test_clue_range_is_uniform():
    rows = generate_puzzles(PuzzleSpec(count=1200, min_clues=30, max_clues=35, seed=1))
    values, counts = np.unique(clue_counts(rows), return_counts=True)
    assert values.tolist() == [30, 31, 32, 33, 34, 35]
    assert counts.min() > 150 and counts.max() < 250  # 200 each, 13 a standard deviation
    assert (solver.check_many(rows.questions)[0] == 1).all()


def test_minimal_within_a_clue_range():
    rows = generate_puzzles(PuzzleSpec(count=50, minimal=True, min_clues=26))
    assert clue_counts(rows).min() >= 26
    assert clue_counts(generate_puzzles(PuzzleSpec(count=50))).min() < 26


def test_rating_range():
    rows = generate_puzzles(PuzzleSpec(count=50, min_rating=2, max_rating=5))
    assert rows.ratings.min() >= 2 and rows.ratings.max() <= 5
    assert (solver.check_many(rows.questions)[1] == rows.ratings).all()


def test_the_seed_fixes_the_result():
    many, few = (generate_puzzles(PuzzleSpec(count=count, seed=5)) for count in (70, 20))
    assert (many.questions[:20] == few.questions).all() and (many.answers[:20] == few.answers).all()
    assert (generate_puzzles(PuzzleSpec(count=20, seed=6)).answers != few.answers).any()


@pytest.mark.parametrize(("side", "classes"), [(4, 1), (6, 9)])
def test_excluded_grids_do_not_occur_up_to_symmetry(side, classes):
    test = generate_puzzles(PuzzleSpec(side=side, count=200, seed=2, grid_classes=classes))
    forms = canonical_grids(test.answers)
    assert len(forms) == classes
    train = generate_puzzles(PuzzleSpec(side=side, count=300, seed=1), exclude=forms)
    assert not forms & canonical_grids(train.answers)
    free = generate_puzzles(PuzzleSpec(side=side, count=300, seed=1))  # negative control
    assert forms & canonical_grids(free.answers)


def test_progress_adds_up():
    steps = []
    generate_puzzles(PuzzleSpec(side=4, count=77), progress=steps.append)
    assert sum(steps) == 77


def test_a_hopeless_request_is_an_error(monkeypatch):
    monkeypatch.setattr(generate, "_MAX_ATTEMPTS", 50)
    with pytest.raises(UserError, match="after 0 of 1 puzzles, 50 attempts"):
        generate_puzzles(PuzzleSpec(count=1, min_clues=17, max_clues=17))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 5}, "side must be one of 4, 6, 9, not 5"),
        ({"count": 0}, "count must be at least 1"),
        ({"min_clues": 16}, "min_clues must be 17 to 81"),
        ({"max_clues": 82}, "max_clues must be 17 to 81"),
        ({"min_clues": 30, "max_clues": 29}, r"min_clues \(30\) is above max_clues \(29\)"),
        ({"min_rating": -1}, "min_rating must not be negative"),
        ({"min_rating": 3, "max_rating": 2}, "is above max_rating"),
        ({"seed": -1}, "seed must be"),
        ({"grid_classes": -1}, "grid_classes must not"),
    ],
)
def test_bad_specs_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        PuzzleSpec(**settings)


@pytest.mark.slow
def test_a_thousand_minimal_puzzles_a_second():
    generate_puzzles(PuzzleSpec(count=1))  # compiles
    start = time.process_time()
    generate_puzzles(PuzzleSpec(count=2000, seed=9))
    assert 2000 / (time.process_time() - start) >= 1000
