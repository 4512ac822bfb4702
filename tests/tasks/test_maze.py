"""Mazes: an independent search agrees with generator, checker and files; symmetries keep what is right."""

from __future__ import annotations

import re
import shlex
import sys
import types
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hrm_rl.tasks
from hrm_rl import generate, rng
from hrm_rl.errors import UserError
from hrm_rl.tasks import get_task, load_puzzles
from hrm_rl.tasks.csv_io import Rows, read_csv, write_csv
from hrm_rl.tasks.maze import CHARACTERS, FREE, GOAL, START, WALL, WAY, Maze, MazeSpec, shortest

DATA = Path(hrm_rl.tasks.__file__).parent / "data"
HEADER = "source,question,answer,rating"
QUESTION = "S   #" "### #" "#   #" "# ###" "#   G"  # one way of 12 steps
ANSWER = "Soooo".replace("oooo", "ooo#") + "###o#" + "#ooo#" + "#o###" + "#oooG"


def search(question: np.ndarray) -> tuple[int, int]:
    """(steps of the shortest way, number of shortest ways), cell by cell; (-1, 0) without a way."""
    side = round(len(question) ** 0.5)
    start, goal = (int(np.flatnonzero(question == place)[0]) for place in (START, GOAL))
    steps, ways, queue = {start: 0}, {start: 1}, deque([start])
    while queue:
        at = queue.popleft()
        row, column = divmod(at, side)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            to = r * side + c
            if not (0 <= r < side and 0 <= c < side) or question[to] == WALL:
                continue
            if to not in steps:
                steps[to], ways[to] = steps[at] + 1, 0
                queue.append(to)
            if steps[to] == steps[at] + 1:
                ways[to] += ways[at]
    return steps.get(goal, -1), ways.get(goal, 0)


def is_way(question: np.ndarray, answer: np.ndarray, length: int) -> bool:
    """Whether the answer marks one connected walk of `length` steps from start to goal, and nothing else differs."""
    marked = answer == WAY
    same = ((question == answer) | ((question == FREE) & marked)).all()
    alone = np.where((question == FREE) & ~marked, WALL, question)  # the way and its ends
    return bool(same) and marked.sum() == length - 1 and search(alone) == (length, 1)


def places(text: str) -> np.ndarray:
    return np.array([CHARACTERS.index(c) for c in text], np.uint8)


def test_the_search_itself():
    assert search(places(QUESTION)) == (12, 1) and is_way(places(QUESTION), places(ANSWER), 12)
    assert search(places("S  " "   " "  G")) == (4, 6)
    assert search(places("S# " "#  " "  G")) == (-1, 0)
    assert not is_way(places(QUESTION), places(QUESTION), 12)  # negative control: nothing marked


@settings(deadline=None, max_examples=30)
@given(
    side=st.integers(5, 14), seed=st.integers(0, 2**62), loops=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    low=st.integers(2, 6), width=st.one_of(st.none(), st.integers(0, 4)),
)  # fmt: skip
def test_every_maze_has_one_shortest_way_and_it_is_the_answer(side, seed, loops, low, width):
    most = None if width is None else low + 2 * width + 2
    try:
        rows = Maze.generate(MazeSpec(side=side, count=8, min_length=low, max_length=most, loops=loops, seed=seed))
    except UserError:  # eight long ways, each the only shortest one, are not to be had in a small open grid
        assume(loops < 1)
        raise
    for question, answer, rating in zip(rows.questions, rows.answers, rows.ratings, strict=True):
        length, ways = search(question)
        assert ways == 1 and length == rating and low <= length <= (most or side * side)
        assert is_way(question, answer, length)
    assert len({q.tobytes() for q in rows.questions}) == 8
    assert shortest(rows.questions, side).tolist() == rows.ratings.tolist()
    assert Maze(side).first_fault(rows.questions, rows.answers, True) is None


def test_without_loops_there_is_one_way_between_any_two_cells():
    """A perfect maze is a tree: one edge less than cells. With loops there are more."""
    for loops, extra in ((0.0, False), (0.5, True)):
        rows = Maze.generate(MazeSpec(side=11, count=5, loops=loops))
        for question in rows.questions:
            free = (question != WALL).reshape(11, 11)
            edges = (free[1:] & free[:-1]).sum() + (free[:, 1:] & free[:, :-1]).sum()
            assert (edges > free.sum() - 1) == extra


def test_a_small_set_is_the_beginning_of_a_large_one():
    small, large, other = (Maze.generate(MazeSpec(count=n, seed=s)) for n, s in ((5, 1), (300, 1), (5, 2)))
    assert (small.questions == large.questions[:5]).all() and (small.questions != other.questions).any()


def test_excluded_mazes_do_not_come_back():
    first = Maze.generate(MazeSpec(side=5, count=300, loops=0.0, min_length=2))
    forms = {Maze.form(q, a) for q, a in zip(first.questions, first.answers, strict=True)}
    rest = Maze.generate(MazeSpec(side=5, count=300, loops=0.0, min_length=2, seed=1), forms)
    assert not forms & {Maze.form(q, a) for q, a in zip(rest.questions, rest.answers, strict=True)}
    again = Maze.generate(MazeSpec(side=5, count=300, loops=0.0, min_length=2, seed=1))  # negative control
    assert forms & {Maze.form(q, a) for q, a in zip(again.questions, again.answers, strict=True)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 4}, "side must be 5 to 30, not 4"), ({"side": 31}, "side must be 5 to 30"),
        ({"count": 0}, "count must be at least 1"), ({"min_length": 1}, "min_length must be 2 to 99 for side 10"),
        ({"min_length": 9, "max_length": 8}, r"min_length \(9\) is above max_length \(8\)"),
        ({"loops": 1.5}, "loops must be between 0 and 1"), ({"seed": -1}, "seed must be 0"),
    ],
)  # fmt: skip
def test_bad_requests(arguments, message):
    with pytest.raises(UserError, match=message):
        MazeSpec(**arguments)


def test_hopeless_requests_end():
    with pytest.raises(UserError, match="after 0 of 3 mazes, 2,000 attempts .*24 to 24 steps"):
        Maze.generate(MazeSpec(side=5, count=3, min_length=24, max_length=24))


# --- symmetries -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(key=st.integers(-(2**63), 2**63 - 1), side=st.integers(5, 12))
def test_a_symmetry_keeps_the_answer_right(key, side):
    rows = Maze.generate(MazeSpec(side=side, count=16))
    task = get_task("maze", side)
    questions, answers = (torch.from_numpy(part).long() + 1 for part in rows[:2])
    keys = rng.fold(torch.full((16,), key), torch.arange(16))
    moved = task.augment(keys, questions, answers)
    assert task.first_fault(*((part - 1).numpy().astype(np.uint8) for part in moved), True) is None
    assert (task.restore(keys, moved[1]) == answers).all() and task.is_consistent(moved[1]).all()
    back = [(part - 1).numpy().astype(np.uint8) for part in moved]
    for before, after in zip(zip(*rows[:2], strict=True), zip(*back, strict=True), strict=True):
        assert Maze.form(*before) == Maze.form(*after)
    moved[1][:, 0] = torch.where(moved[1][:, 0] == WALL + 1, FREE + 1, WALL + 1)  # negative control
    assert task.first_fault(back[0], (moved[1] - 1).numpy().astype(np.uint8), True) is not None


def test_all_eight_symmetries_are_drawn_alike():
    question = torch.from_numpy(Maze.generate(MazeSpec(count=1, seed=3)).questions).long() + 1
    keys = torch.arange(8000)
    images, _ = get_task("maze", 10).augment(keys, question.expand(8000, -1), question.expand(8000, -1))
    _, counts = images.unique(dim=0, return_counts=True)
    assert len(counts) == 8 and ((counts - 1000.0) ** 2 / 1000).sum() < 24.3  # chi-square, 7 degrees, p = 0.001


def test_padding_stays_padding():
    zeros = torch.zeros(2, 100, dtype=torch.int64)
    assert (get_task("maze", 10).augment(torch.arange(2), zeros, zeros)[0] == 0).all()


def test_consistency():
    task, answer = get_task("maze", 5), torch.from_numpy(places(ANSWER)).long()[None] + 1
    assert task.is_consistent(answer).all() and task.is_consistent(torch.full((1, 25), 2)).all()
    assert not task.is_consistent(torch.full((1, 25), WAY + 1)).any()  # a way that crosses itself everywhere
    assert not task.is_consistent(torch.full((1, 25), START + 1)).any()


# --- files ----------------------------------------------------------------------------------------------------


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join([HEADER, *lines, ""]))
    return path


def test_the_public_schema_is_read(tmp_path):
    """Characters "# SGo" become the tokens 1 to 5; the rating is the file's own."""
    path = write(tmp_path / "a.csv", f"maze,{QUESTION},{ANSWER},111", f"maze,{QUESTION[::-1]},{ANSWER[::-1]},3")
    puzzles = load_puzzles(path, task="maze")
    assert (puzzles.task, puzzles.side, puzzles.seq_len, puzzles.vocab_size) == ("maze", 5, 25, 6)
    assert puzzles.questions[0].tolist() == [" # SGo".index(c) if c != " " else 2 for c in QUESTION]
    assert puzzles.ratings.tolist() == [111, 3] and set(puzzles.answers.unique().tolist()) == {1, 3, 4, 5}
    assert puzzles.clues.tolist() == [14, 14]  # walls and ends; every free cell is on the way or may be


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
def test_round_trip(tmp_path, name):
    rows = Maze.generate(MazeSpec(side=30, count=4, min_length=40))
    write_csv(tmp_path / name, rows, CHARACTERS)
    again = read_csv(tmp_path / name, task="maze")
    assert all(np.array_equal(one, other) for one, other in zip(rows, again, strict=True))


SHORTCUT = "S   G" "     " "     " "     " "     "
FAULTS = {
    f"m,{QUESTION[:-1]},{ANSWER},1": "the question must have 25 cells .5x5., not 24",
    f"m,{QUESTION},{ANSWER} ,1": "the answer must have 25 cells .5x5., not 26",
    f"m,x{QUESTION[1:]},{ANSWER},1": "the question has a character that is not one of '# SG' at row 1, column 1",
    f"m,{QUESTION[:1]}o{QUESTION[2:]},{ANSWER},1": "the question has a character that is not one of '# SG' at row 1, c",
    f"m,{QUESTION},{ANSWER[:24]}x,1": "the answer has a character that is not one of '# SGo' at row 5, column 5",
    f"m,{QUESTION.replace('S', ' ')},{ANSWER},1": "the question must have one start .S., not 0",
    f"m,{QUESTION[:-2]}GG,{ANSWER},1": "the question must have one goal .G., not 2",
    f"m,{QUESTION},{ANSWER[:4]} {ANSWER[5:]},1": "the answer contradicts the question at row 1, column 5 .' ', gi",
    f"m,{QUESTION[:3]}#{QUESTION[4:]},{ANSWER[:3]}#{ANSWER[4:]},1": "no way leads from S to G",
    f"m,{QUESTION},{QUESTION},1": "the answer's 'o' do not lead from S to G",
    f"m,{SHORTCUT},{'SoooG' + 'o' * 20},1": "the answer has 'o' beside its way .23 of them, the way has 3.",
    f"m,{SHORTCUT},{'S   GoooooX'.replace('X', '')}{' ' * 15},1": "the answer's way takes 6 steps, the shortest 4",
    f"m,{QUESTION},{ANSWER},hard": "the rating must be a number",
}  # fmt: skip


@pytest.mark.parametrize("line", FAULTS)
def test_every_fault_is_named_with_its_line(tmp_path, line):
    path = write(tmp_path / "a.csv", f"m,{QUESTION},{ANSWER},1", line, "a later fault")
    with pytest.raises(UserError, match=FAULTS[line]) as caught:
        read_csv(path, task="maze")
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_sizes_that_are_no_square_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.csv:2: the question must have 25, 36, 49, ... or 900 cells, not 24"):
        read_csv(write(tmp_path / "a.csv", f"m,{QUESTION[:-1]},{ANSWER},1"), task="maze")
    with pytest.raises(UserError, match="a.csv:2: the question must have 16, 36 or 81 cells, not 25"):
        read_csv(write(tmp_path / "a.csv", f"m,{QUESTION},{ANSWER},1"))  # no task named: Sudoku


def test_of_several_shortest_ways_the_files_own_counts(tmp_path):
    one, other = "S    " "o    " "o    " "o    " "ooooG", "Soooo" "    o" "    o" "    o" "    G"
    question = "S" + " " * 23 + "G"
    path = write(tmp_path / "a.csv", f"m,{question},{one},1", f"m,{question},{other},1")
    puzzles = load_puzzles(path, task="maze", check_unique=True)
    assert (puzzles.answers[0] != puzzles.answers[1]).any()


# --- sets -----------------------------------------------------------------------------------------------------


def test_the_set_that_ships():
    train, test = (load_puzzles("maze-10", split=split) for split in ("train", "test"))
    assert (len(train), len(test), train.side, train.name) == (10_000, 1000, 10, "maze-10 (train)")
    some = [search((question - 1).numpy()) for question in test.questions[:100]]
    assert [(int(rating), 1) for rating in test.ratings[:100]] == some
    forms = [
        {Maze.form((q - 1).numpy(), (a - 1).numpy()) for q, a in zip(part.questions, part.answers, strict=True)}
        for part in (train, test)
    ]
    assert not forms[0] & forms[1]


@pytest.mark.parametrize("files", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_readme_makes_the_shipped_files(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python -m hrm_rl.generate (--task maze .*)$", (DATA / "README.md").read_text(), re.M)
    assert len(commands) == 2
    for command in commands[:files]:
        assert generate.main(shlex.split(command)) == 0
    for path in tmp_path.iterdir():
        made, shipped = (read_csv(folder / path.name, task="maze") for folder in (tmp_path, DATA))
        assert all(np.array_equal(one, other) for one, other in zip(made, shipped, strict=True))


def test_other_sizes_are_made_on_the_spot():
    train, test = (load_puzzles("maze-6", split=split) for split in ("train", "test"))
    assert (len(train), len(test), train.side) == (4000, 1000, 6)
    assert len(load_puzzles("maze-5")) == 4000  # the smallest there are
    assert load_puzzles("maze-6", split="test", limit=3).sha256 == test.select(torch.arange(3)).sha256


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("maze-40", {}, "unknown data 'maze-40'; did you mean 'maze-10'"),
        ("maze-10", {"task": "sudoku"}, "maze-10 holds puzzles of the task maze, not sudoku"),
        ("maze-10", {"side": 9}, "maze-10 holds puzzles of side 10, not 9"),
        ("maze-10", {"side": 4}, "side must be 5 to 30, not 4"),
        ("maze-10", {"split": "dev"}, "has the splits train and test, not 'dev'"),
    ],
)
def test_bad_sources_are_named(source, options, message):
    with pytest.raises(UserError, match=message):
        load_puzzles(source, **options)


def test_the_hub(tmp_path, monkeypatch):
    """A dataset of the public layout (train.csv and test.csv beside each other) behind a hub of our own."""
    asked = []
    write(tmp_path / "test.csv", f"maze,{QUESTION},{ANSWER},111")

    def download(repo_id, filename, repo_type):
        asked.append((repo_id, filename, repo_type))
        return str(tmp_path / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    puzzles = load_puzzles("hf://sapientinc/maze-30x30-hard-1k", split="test", task="maze")
    assert asked == [("sapientinc/maze-30x30-hard-1k", "test.csv", "dataset")]
    assert (puzzles.task, puzzles.side, len(puzzles)) == ("maze", 5, 1)
    with pytest.raises(UserError, match="test.csv:2: the question must have 900 cells .30x30., not 25"):
        load_puzzles("hf://sapientinc/maze-30x30-hard-1k", 30, "test", task="maze")


def test_no_network_is_one_line(monkeypatch):
    from huggingface_hub import errors

    def download(**_):
        raise errors.LocalEntryNotFoundError("cannot reach\nthe hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match="cannot fetch train.csv .the Hub cannot be reached, and no copy") as caught:
        load_puzzles("hf://sapientinc/maze-30x30-hard-1k", task="maze")
    assert "\n" not in str(caught.value)


# --- the command ----------------------------------------------------------------------------------------------


def test_the_command_writes_what_was_asked_for(tmp_path, capsys):
    out = tmp_path / "made.csv"
    words = ["--task", "maze", "--side", "12", "--count", "30", "--min-length", "10", "--loops", "0.3"]
    assert generate.main([*words, "--out", str(out)]) == 0
    puzzles = load_puzzles(out, 12, task="maze")
    assert len(puzzles) == 30 and puzzles.ratings.min() >= 10
    assert "30 puzzles of the task maze, side 12" in capsys.readouterr().out
    assert isinstance(read_csv(out, task="maze"), Rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "maze", "--side", "4"], "side must be 5 to 30, not 4"),
        (["--task", "maze", "--min-clues", "4"], "unknown flag '--min_clues'"),
        (["--task", "mase"], "unknown task 'mase'; did you mean 'maze'"),
        (["--task=maze", "--exclude-grids-of", "absent.csv"], "absent.csv: cannot be read"),
    ],
)
def test_bad_input_of_the_command_is_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        generate.main([*words, "--out", "x.csv"])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_every_flag_has_help():
    text = generate.build_parser("maze").format_help()
    for flag in ("task", "side", "count", "min_length", "max_length", "loops", "seed", "out"):
        assert f"--{flag}" in text
    assert all(action.help for action in generate.build_parser("maze")._actions)
