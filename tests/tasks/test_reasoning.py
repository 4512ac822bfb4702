"""Grid tasks of reasoning-gym: what its texts say is what our grids hold, and every puzzle has one answer."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hrm_rl.tasks
from hrm_rl import generate, rng
from hrm_rl.errors import UserError
from hrm_rl.tasks import get_task, load_puzzles, reasoning, task_class
from hrm_rl.tasks.csv_io import read_csv, write_csv
from hrm_rl.tasks.geometry import tables

DATA = Path(hrm_rl.tasks.__file__).parent / "data"
NAMES = ("n_queens", "futoshiki", "mini_sudoku")
HEADER = "source,question,answer,rating"


def made(name: str, count: int = 12, **options):
    pytest.importorskip("reasoning_gym")
    kind = task_class(name)
    return kind(kind.default_side), kind.generate(kind.spec(count=count, **options))


@cache
def queens() -> np.ndarray:
    """The columns of all solutions of eight queens, (92, 8)."""
    boards, steps = np.array(list(itertools.permutations(range(8)))), np.arange(8)
    return boards[[len({*(b + steps)}) == 8 == len({*(b - steps)}) for b in boards]]


@cache
def latin(side: int) -> np.ndarray:
    """All Latin squares of a side, (N, side, side)."""
    rows = list(itertools.permutations(range(1, side + 1)))
    found = [()]
    for _ in range(side):
        found = [(*square, row) for square in found for row in rows
                 if all(row[i] != old[i] for old in square for i in range(side))]  # fmt: skip
    return np.array(found)


def kept_by(signs: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """(N,) bool: which squares (N, n, n) keep the signs of a 4x4 Futoshiki's grid of characters (7, 7)."""
    good = np.ones(len(squares), bool)
    for r, c in itertools.product(range(7), range(7)):
        first, second = squares[:, r // 2, c // 2], squares[:, (r + 1) // 2, (c + 1) // 2]
        if signs[r, c] in "<^":
            good &= first < second
        elif signs[r, c] in ">v":
            good &= first > second
    return good


def solutions(name: str, text: str) -> int:
    """How many answers a question of the default side has, by trying all boards there are."""
    if name == "n_queens":
        given = [line.find("Q") for line in re.findall("." * 8, text)]
        return sum(all(g in (-1, column) for g, column in zip(given, board, strict=True)) for board in queens())
    if name == "futoshiki":
        squares, signs = latin(4), np.array(list(text)).reshape(7, 7)
        given = np.array([0 if c == "." else int(c) for c in signs[::2, ::2].ravel()]).reshape(4, 4)
        return int((kept_by(signs, squares) & ((given == 0) | (given == squares)).all((1, 2))).sum())
    squares = latin(4).reshape(-1, 16)
    squares = squares[[all(len({*square[unit]}) == 4 for unit in tables(4).units) for square in squares]]
    given = np.array([0 if c == "." else int(c) for c in text])
    return int(((given == 0) | (given == squares)).all(1).sum())


@pytest.mark.parametrize("name", NAMES)
def test_every_item_has_exactly_one_answer(name):
    task, rows = made(name, count=6, seed=3)
    for question, answer in zip(*rows[:2], strict=True):
        texts = ["".join(task.characters[place] for place in grid) for grid in (question, answer)]
        assert [solutions(name, text) for text in texts] == [1, 1]
    assert len({q.tobytes() for q in rows.questions}) == 6
    assert task.first_fault(*rows[:2], True) is None
    emptied = rows.questions[:1].copy()  # negative control: without its givens a puzzle has many answers
    emptied[emptied <= (task.side if name != "n_queens" else 1)] = 0
    assert solutions(name, "".join(task.characters[place] for place in emptied[0])) > 1
    assert "more than one solution" in task.first_fault(emptied, rows.answers[:1], True)[1]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_does_not_score_is_refused(name, monkeypatch):
    """reasoning-gym's own score of the answer made back from our grid is asked for, item by item."""
    scored = []
    own = reasoning._confirm

    def confirm(data, item, text):
        scored.append((own(data, item, text), own(data, item, text[::-1].replace("Q", "_").replace("1", "2"))))
        return scored[-1][0]

    monkeypatch.setattr(reasoning, "_confirm", confirm)
    made(name, count=5)
    assert len(scored) >= 5 and {first for first, _ in scored} == {True} and {second for _, second in scored} == {False}
    monkeypatch.setattr(reasoning, "_confirm", lambda *_: False)
    with pytest.raises(UserError, match=f"its own answer to item 0 of {name} does not score 1.0"):
        made(name, count=1, seed=0, **({"min_removed": 1, "max_removed": 1} if name == "n_queens" else {}))


def test_a_futoshiki_as_written():
    """The picture of reasoning-gym's documentation, sign by sign."""
    text = "_   _ > _   _\n\u2227            \n2   _   _   _\n    \u2228\n_   _   3 < 4\n\n_   _   4   _"
    grid = reasoning._compact(text, 4)
    assert [grid[i : i + 7] for i in range(0, 49, 7)] == [
        ". .>. .", "^      ", "2 . . .", "  v    ", ". . 3<4", "       ", ". . 4 ."
    ]  # fmt: skip
    again = reasoning._spread(grid, 4)
    assert [line.rstrip() for line in again.split("\n")] == [line.rstrip() for line in text.split("\n")]


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=15)
@given(key=st.integers(-(2**63), 2**63 - 1))
def test_a_symmetry_keeps_the_answer_right(name, key):
    puzzles = load_puzzles(f"{name}-{task_class(name).default_side}", split="test", limit=16)
    task, keys = puzzles.rules, rng.fold(torch.full((16,), key), torch.arange(16))
    questions, answers = puzzles.questions.long(), puzzles.answers.long()
    moved = task.augment(keys, questions, answers)
    back = [(part - 1).numpy().astype(np.uint8) for part in moved]
    assert task.first_fault(*back, True) is None  # unique, right, the rules kept
    assert task.is_consistent(moved[1]).all() and (task.restore(keys, moved[1]) == answers).all()
    kind = task_class(name)
    own = [(part - 1).numpy() for part in (puzzles.questions, puzzles.answers)]
    for before, after in zip(zip(*own, strict=True), zip(*back, strict=True), strict=True):
        assert kind.form(*before) == kind.form(*after)
    # negative control: the answer of another puzzle
    assert task.first_fault(back[0], np.roll(back[1], 1, axis=0), False) is not None


def test_the_sixteen_symmetries_of_futoshiki_are_all_drawn():
    question = load_puzzles("futoshiki-4", limit=1).questions.long()
    images, _ = get_task("futoshiki", 4).augment(torch.arange(3000), *(2 * [question.expand(3000, -1)]))
    assert len(images.unique(dim=0)) == 16


def test_inconsistent_grids():
    squares = {"n_queens": "QQ" + "." * 62, "mini_sudoku": "11" + "." * 14}
    squares["futoshiki"] = "2<1" + "." * 4 + " " * 7
    for name, text in squares.items():
        task = get_task(name, task_class(name).default_side)
        text = text.ljust(task.seq_len, " " if name == "futoshiki" else ".")
        tokens = torch.tensor([[task.characters.index(c) + 1 for c in text]])
        assert not task.is_consistent(tokens).any() and task.is_consistent(torch.ones_like(tokens)).all()


@pytest.mark.parametrize("name", NAMES)
def test_files_round_trip(tmp_path, name):
    path = DATA / f"{name}-{task_class(name).default_side}-test.csv.gz"
    rows = read_csv(path, limit=20, check_unique=True, task=name)
    task = get_task(name, task_class(name).default_side)
    write_csv(tmp_path / "a.csv", rows, task.characters)
    again = read_csv(tmp_path / "a.csv", task.side, task=name)
    assert all(np.array_equal(one, other) for one, other in zip(rows, again, strict=True))


QUEENS = "." * 1 + "Q" + "." * 5 + "Q" + "Q" + "." * 5 + "Q."
SIGNS = "1 2 3 4" + " " * 7 + "2 1 4 3" + " " * 7 + "3 4 1 2" + " " * 7 + "4 3 2 1"
FAULTS = {
    ("n_queens", ".Q..x..........." "", QUEENS): "the question has a character that is not 'Q', '.' or '_' at row 2",
    ("n_queens", "." * 16, ".Q" + "." * 14): "the answer must have 4 queens, not 1",
    ("n_queens", "." * 16, "QQQQ" + "." * 12): "two queens of the answer attack each other",
    ("n_queens", "Q" + "." * 15, QUEENS): "the answer has no queen at row 1, column 1",
    ("n_queens", "." * 16, QUEENS): "the question has more than one solution",
    ("futoshiki", SIGNS[:1] + "^" + SIGNS[2:], SIGNS): "the question has a character that has no place at row 1, colu",
    ("futoshiki", SIGNS, "." + SIGNS[1:]): "the answer has a character that has no place at row 1, column 1",
    ("futoshiki", "2" + SIGNS[1:], SIGNS): "the answer contradicts the question at row 1, column 1",
    ("futoshiki", SIGNS[:1] + ">" + SIGNS[2:], SIGNS[:1] + ">" + SIGNS[2:]): "a sign that is not kept",
    ("futoshiki", re.sub(r"\d", ".", SIGNS), SIGNS): "the question has more than one solution",
    ("mini_sudoku", "." * 16, "1234341221434321"): "the question has more than one solution",
    ("mini_sudoku", "5" + "." * 15, "1234341221434321"): "the question has a character that is not 1 to 4",
}  # fmt: skip


@pytest.mark.parametrize(("name", "question", "answer"), FAULTS)
def test_every_fault_is_named_with_its_line(tmp_path, name, question, answer):
    path = tmp_path / "a.csv"
    path.write_text(f"{HEADER}\nown,{question},{answer},1\n")
    with pytest.raises(UserError, match=re.escape(FAULTS[name, question, answer])) as caught:
        read_csv(path, task=name, check_unique=True)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_sets_that_ship_share_no_solution(name):
    kind = task_class(name)
    forms = []
    for split in ("train", "test"):
        puzzles = load_puzzles(f"{name}-{kind.default_side}", split=split)
        answers = (puzzles.answers - 1).unique(dim=0).numpy()
        forms.append({kind.form(answer, answer) for answer in answers})
        assert len(puzzles.questions.unique(dim=0)) == len(puzzles)
    assert forms[0] and forms[1] and not forms[0] & forms[1]


def test_without_the_package_the_sets_that_ship_load_and_one_line_says_what_others_need(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert len(load_puzzles("futoshiki-4", split="test", limit=5)) == 5
    with pytest.raises(UserError, match=r"reasoning-gym is not installed .pip install .hrm_rl\[reasoning\]"):
        generate.main(["--task", "n_queens", "--count", "3", "--out", str(tmp_path / "x.csv")])
    with pytest.raises(UserError, match="no training set ships for futoshiki-5: make one .* name it as the data"):
        load_puzzles("futoshiki-5")
    with pytest.raises(UserError, match="no test set ships .*--exclude-grids-of .*--test-data in training"):
        load_puzzles("futoshiki-5", split="test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("n_queens", {"side": 11}, "side must be 4 to 10, not 11"), ("n_queens", {"max_removed": 9}, "1 to 8, not 9"),
        ("n_queens", {"min_removed": 5, "max_removed": 4}, r"min_removed \(5\) is above max_removed \(4\)"),
        ("futoshiki", {"side": 3}, "side must be 4 to 9"), ("futoshiki", {"max_difficulty": 4}, "0 to 3, not 4"),
        ("mini_sudoku", {"side": 9}, "side must be one of 4, not 9"), ("mini_sudoku", {"min_empty": 0}, "1 to 12"),
        ("mini_sudoku", {"count": 0}, "count must be at least 1"), ("futoshiki", {"seed": -1}, "seed must be 0"),
        ("n_queens", {"grid_classes": -1}, "grid_classes must not be negative"),
    ],
)  # fmt: skip
def test_bad_requests(name, options, message):
    with pytest.raises(UserError, match=message):
        task_class(name).spec(**options)


def test_requests_for_more_than_there_is_end(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(reasoning, "_MAX_ATTEMPTS", 50)
    with pytest.raises(UserError, match="after .* of 500 puzzles of the task n_queens"):
        reasoning.NQueens.generate(reasoning.NQueensSpec(side=4, count=500))
    board = reasoning.NQueens.generate(reasoning.NQueensSpec(side=4, count=1))
    spec, known = reasoning.NQueensSpec(side=4, count=1), {reasoning.NQueens.form(board.questions[0], board.answers[0])}
    with pytest.raises(UserError, match="leave more solutions to this file: make the other one with --grid-classes"):
        reasoning.NQueens.generate(spec, known)  # 4 queens have one solution, up to symmetry


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_the_readme_makes_the_shipped_files(tmp_path, monkeypatch, name):
    """With the release of reasoning-gym they were made with."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(rf"^python -m hrm_rl.generate (--task {name} .*)$", (DATA / "README.md").read_text(), re.M)
    assert len(commands) == 2
    for command in commands:
        assert generate.main(shlex.split(command)) == 0
    for path in tmp_path.iterdir():
        made, shipped = (read_csv(folder / path.name, task=name) for folder in (tmp_path, DATA))
        assert all(np.array_equal(one, other) for one, other in zip(made, shipped, strict=True))
