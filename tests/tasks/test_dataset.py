"""Sets of puzzles: the ones that ship, files, the Hub."""

from __future__ import annotations

import gzip
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

import hrm_rl.tasks
from hrm_rl import evaluate, generate
from hrm_rl.errors import UserError
from hrm_rl.tasks import get_task, load_puzzles, task_class
from hrm_rl.tasks.generate import canonical_grids

DATA = Path(hrm_rl.tasks.__file__).parent / "data"
SIDES = (4, 6, 9)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_shipped_sets(side, split):
    puzzles = load_puzzles(f"sudoku-{side}", side, split, check_unique=True)
    assert puzzles.side == side and puzzles.task == "sudoku" and puzzles.name == f"sudoku-{side} ({split})"
    assert puzzles.seq_len == side**2 and puzzles.vocab_size == side + 2
    assert puzzles.questions.dtype == puzzles.answers.dtype == torch.uint8
    assert puzzles.questions.min() == 1 and puzzles.answers.min() == 2
    assert get_task("sudoku", side).is_consistent(puzzles.answers).all()
    assert len(puzzles.questions.unique(dim=0)) == len(puzzles) == len(puzzles.sources)
    assert (puzzles.clues == (puzzles.questions != 1).sum(1)).all()


def shared_grids(side: int, train: int | None, test: int | None) -> set[bytes]:
    splits = (("train", train), ("test", test))
    sets = [load_puzzles(f"sudoku-{side}", split=split, limit=limit) for split, limit in splits]
    first, second = (canonical_grids((puzzles.answers - 1).numpy()) for puzzles in sets)
    return first & second


@pytest.mark.parametrize(("side", "limit"), [(4, None), (6, None), (9, 1500)])
def test_train_and_test_share_no_grid_up_to_symmetry(side, limit):
    assert not shared_grids(side, limit, limit)


@pytest.mark.slow
def test_train_and_test_share_no_9x9_grid():
    assert not shared_grids(9, None, None)


def test_each_pair_is_small():
    for side in SIDES:
        assert sum((DATA / f"sudoku-{side}-{split}.csv.gz").stat().st_size for split in ("train", "test")) < 2e6


def commands(side: int) -> list[list[str]]:
    found = re.findall(rf"^python -m hrm_rl.generate (--side {side} .*)$", (DATA / "README.md").read_text(), re.M)
    return [shlex.split(command) for command in found]


@pytest.mark.slow
@pytest.mark.parametrize("side", [4, 6, pytest.param(9, marks=pytest.mark.slow)])
def test_the_readme_makes_the_shipped_files(side, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(commands(side)) == 2
    for arguments in commands(side):
        assert generate.main(arguments) == 0
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [f"sudoku-{side}-test.csv.gz", f"sudoku-{side}-train.csv.gz"]
    for name in made:
        assert gzip.decompress((tmp_path / name).read_bytes()) == gzip.decompress((DATA / name).read_bytes())


def test_limit_select_and_digest():
    puzzles = load_puzzles("sudoku-4", limit=10)
    assert len(puzzles) == 10
    assert puzzles.sha256 == load_puzzles("sudoku-4", limit=10).sha256 and len(puzzles.sha256) == 64
    part = puzzles.select(torch.tensor([3, 3, 0]))
    assert len(part) == 3 and (part.questions[0] == puzzles.questions[3]).all()
    assert part.sha256 != puzzles.sha256 and part.sources == puzzles.sources[:3]
    mask = torch.arange(10) < 4
    assert puzzles.select(mask).sha256 == load_puzzles("sudoku-4", limit=4).sha256
    assert puzzles.to("cpu").sha256 == puzzles.sha256


def test_plain_and_gzipped_files_are_the_same_set(tmp_path):
    plain = tmp_path / "a.csv"
    plain.write_bytes(gzip.decompress((DATA / "sudoku-6-test.csv.gz").read_bytes()))
    read, shipped = load_puzzles(plain), load_puzzles("sudoku-6", split="test")
    assert read.sha256 == shipped.sha256 and read.name == str(plain)
    assert load_puzzles(str(plain), side=6).side == 6


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("sudoku-8", {}, "unknown data 'sudoku-8'; did you mean 'sudoku-"),
        ("sudoku-9", {"side": 4}, "sudoku-9 holds puzzles of side 9, not 4"),
        ("sudoku-9", {"split": "dev"}, "has the splits train and test, not 'dev'"),
        ("sudoku-9", {"side": 7}, "side must be one of 4, 6, 9, not 7"),
        ("nowhere.csv", {}, "nowhere.csv: cannot be read"),
        ("hf://only-a-name", {}, "must read hf://owner/name"),
    ],
)
def test_bad_sources_are_named(source, options, message):
    with pytest.raises(UserError, match=message):
        load_puzzles(source, **options)


def test_the_hub(monkeypatch):
    asked = []

    def download(**options):
        asked.append(options)
        if options["filename"] == "none.csv":
            raise RuntimeError("404:\nno such file")
        return str(DATA / "sudoku-4-test.csv.gz")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    puzzles = load_puzzles("hf://owner/name", split="test")
    assert asked == [{"repo_id": "owner/name", "filename": "test.csv", "repo_type": "dataset"}]
    assert puzzles.side == 4 and puzzles.name == "hf://owner/name (test)"
    assert load_puzzles(Path("hf://owner/name")).side == 4  # a Path loses a slash
    with pytest.raises(UserError, match=r"cannot fetch none.csv \(RuntimeError: 404: no such file\)"):
        load_puzzles("hf://owner/name", split="none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        load_puzzles("hf://owner/name")


def test_shapes_are_checked():
    puzzles = load_puzzles("sudoku-4", limit=2)
    with pytest.raises(ValueError, match=r"questions must be \(2, 81\)"):
        hrm_rl.tasks.PuzzleSet("sudoku", 9, puzzles.questions, puzzles.answers, puzzles.ratings, puzzles.sources, "x")


def test_a_short_name_may_have_hyphens(tmp_path):
    """In every place that takes one; what comes out has the name's own spelling."""
    assert task_class("mini-sudoku") is task_class("mini_sudoku") and get_task("mini-sudoku", 4).name == "mini_sudoku"
    one, other = (load_puzzles("mini-sudoku-4", 4, "test", 3, task=task) for task in (None, "mini-sudoku"))
    assert one.task == other.task == "mini_sudoku" and one.sha256 == other.sha256 and one.name == "mini_sudoku-4 (test)"
    assert generate.named_task(["--task", "mini-sudoku"]) == "mini_sudoku"
    loaded = evaluate.load_asked(None, task="mini-sudoku")
    assert evaluate.task_of(loaded, "mini-sudoku") == evaluate.task_of(loaded) == ("mini_sudoku", 4)
    with pytest.raises(UserError, match="unknown task 'mini-sudku'; did you mean 'mini_sudoku'"):
        task_class("mini-sudku")
    with pytest.raises(UserError, match="has no attribute 'Sudok'.; did you mean 'Sudoku'"):
        task_class("hrm_rl.tasks.sudoku.Sudok")
