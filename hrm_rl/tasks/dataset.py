"""A set of puzzles in memory, and where it comes from: the package, a CSV file, or the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hrm_rl.errors import UserError, nearest
from hrm_rl.hub import fetch, on_hub
from hrm_rl.tasks.csv_io import Rows, read_csv
from hrm_rl.tasks.registry import DEFAULT_TASK, TASKS, Task, check_side, get_task, task_class, task_name

SPLITS = ("train", "test")
_DATA = Path(__file__).parent / "data"
SHIPPED = {"sudoku-4", "sudoku-6", "sudoku-9", "maze-10", "futoshiki-4", "n_queens-8", "mini_sudoku-4"}
_MADE = {"train": 4000, "test": 1000}  # puzzles of a set that does not ship


@dataclass(frozen=True)
class PuzzleSet:
    """N puzzles of one task and side as tokens (0 is padding, the rest the task's; in Sudoku 1 is a blank and digit d
    is d + 1). S cells, row by row."""

    task: str
    side: int
    questions: Tensor  # (N, S) uint8
    answers: Tensor  # (N, S) uint8, the one right answer; 0 where a row is padding
    ratings: Tensor  # (N,) float32, larger is harder
    sources: tuple[str, ...]
    name: str  # where it came from, for reports
    sha256: str = ""  # of the content; worked out where it is not given

    def __post_init__(self) -> None:
        grid = (len(self.sources), self.seq_len)
        for field, shape in (("questions", grid), ("answers", grid), ("ratings", grid[:1])):
            if tuple(getattr(self, field).shape) != shape:
                raise ValueError(f"{field} must be {shape}, not {tuple(getattr(self, field).shape)}")
        if not self.sha256:
            object.__setattr__(self, "sha256", self._digest())

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.task}-{self.side}".encode())
        for tensor in (self.questions, self.answers, self.ratings):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.sources)

    def to(self, device: torch.device | str) -> PuzzleSet:
        """The same set with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("questions", "answers", "ratings")}
        return replace(self, **moved)

    def select(self, index: Tensor) -> PuzzleSet:
        """The puzzles at `index`: (K,) integers, or a (N,) bool mask. Asks the host for the sources."""
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        index = index.to(self.questions.device)
        sources = tuple(self.sources[i] for i in index.tolist())
        parts = {name: getattr(self, name)[index] for name in ("questions", "answers", "ratings")}
        return replace(self, **parts, sources=sources, sha256="")

    @property
    def rules(self) -> Task:
        """The task at this size."""
        return get_task(self.task, self.side)

    @property
    def seq_len(self) -> int:
        return self.rules.seq_len

    @property
    def vocab_size(self) -> int:
        return self.rules.vocab_size

    @property
    def clues(self) -> Tensor:
        """(N,) int64: how many of the cells that a puzzle may leave open are given."""
        rules = self.rules
        given = (self.questions != rules.open_token) & (self.questions > 0)
        return (given.sum(1) - (rules.seq_len - rules.cells)).clamp(min=0)


def load_puzzles(
    source: str | Path,
    side: int | None = None,
    split: str = "train",
    limit: int | None = None,
    check_unique: bool = False,
    task: str | None = None,
) -> PuzzleSet:
    """Read and check a set of puzzles.

    source: "TASK-SIDE" ("sudoku-9", "maze-10": ships with the package; mazes of other sides are made on the spot,
    always the same), a path that ends in .csv or .csv.gz, or "hf://owner/name" (the file {split}.csv of a dataset on
    the Hub).
    side: the side it must have; None takes what the file holds. split: "train" or "test" (not for a path).
    limit: read no more than the first so many. check_unique: also refuse puzzles with several solutions.
    task: what the puzzles are; None takes it from the name, and Sudoku for a file.
    Raises UserError, one line, "file:line: reason"."""
    task = task and task_name(task)
    text = str(source)
    named = _named(text, task)
    text = f"{named[0]}-{named[1]}" if named else text
    if side is not None:
        check_side(task_class(named[0] if named else task or DEFAULT_TASK).sides, side)
    if hub := on_hub(source):
        path = fetch(hub, f"{split}.csv", "dataset")
    elif text.endswith((".csv", ".csv.gz")):
        path = Path(text).expanduser()
    elif named is not None:
        if task not in (None, named[0]):
            raise UserError(f"{text} holds puzzles of the task {named[0]}, not {task}")
        if split not in SPLITS:
            raise UserError(f"{text} has the splits {' and '.join(SPLITS)}, not {split!r}")
        if side not in (None, named[1]):
            raise UserError(f"{text} holds puzzles of side {named[1]}, not {side}")
        task = named[0]
        if text not in SHIPPED and not task_class(task).quick:
            raise UserError(_how_to_make(*named, split))
        if text not in SHIPPED:
            return _made(*named, split, limit)
        path = _DATA / f"{text}-{split}.csv.gz"
    else:
        known = sorted(SHIPPED)
        raise UserError(
            f"unknown data {text!r}{nearest(text, known)} (a path ending in .csv or .csv.gz, "
            f"hf://owner/name, or one of {', '.join(known)})"
        )
    shown = text if path == Path(text) else f"{text} ({split})"
    task = task or DEFAULT_TASK
    return from_rows(read_csv(path, side, limit, check_unique, task), shown, task, side)


def _how_to_make(task: str, side: int, split: str) -> str:
    """What to do about a set that neither ships nor is made on the spot: the command, and where the file is named."""
    what, more, named = "training set", "--count 5000", "name it as the data (--data, in compare --validation)"
    if split == "test":
        what, more = "test set", "--count 1000 --exclude-grids-of TRAINING.csv"
        named = "name it (--test-data in training, elsewhere --data)"
    command = f"python -m hrm_rl.generate --task {task} --side {side} {more} --out FILE.csv"
    return f"no {what} ships for {task}-{side}: make one ({command}) and {named}"


def _named(text: str, task: str | None) -> tuple[str, int] | None:
    """("maze", 10) of "maze-10"; None for anything else, and where no such set ships nor can be made.

    Of tasks without a short name that of `task` alone is known."""
    word, _, side = text.rpartition("-")
    name = task_name(word)
    if name not in (*TASKS, task) or not side.isdecimal() or int(side) not in task_class(name).sides:
        return None
    return (name, int(side)) if f"{name}-{side}" in SHIPPED or hasattr(task_class(name), "quick") else None


def _made(task: str, side: int, split: str, limit: int | None) -> PuzzleSet:
    """A set that does not ship, made on the spot: always the same puzzles, train and test without a form in common."""
    maker = task_class(task)
    rows = maker.generate(maker.spec(side=side, count=_MADE["test"], seed=2))
    if split == "train":
        forms = {maker.form(*puzzle) for puzzle in zip(rows.questions, rows.answers, strict=True)}
        rows = maker.generate(maker.spec(side=side, count=_MADE["train"], seed=1), forms)
    if limit is not None:
        rows = Rows(*(part[:limit] for part in rows))
    return from_rows(rows, f"{task}-{side} ({split})", task, side)


def from_rows(rows: Rows, name: str, task: str = DEFAULT_TASK, side: int | None = None) -> PuzzleSet:
    """Places in the task's characters, as read from a file or generated, to tokens."""
    questions, answers = torch.from_numpy(rows.questions) + 1, torch.from_numpy(rows.answers) + 1
    ratings = torch.from_numpy(rows.ratings).clone()
    if side is None:
        side = next(s for s in task_class(task).sides if get_task(task, s).seq_len == rows.questions.shape[1])
    return PuzzleSet(task, side, questions, answers, ratings, rows.sources, name)


def shared_puzzles(train: PuzzleSet, test: PuzzleSet) -> str | None:
    """One line that says how many test puzzles stand in the training set, None where none does.

    A puzzle is shared where its question is, or its solution grid: the report would then tell of memory."""
    if (train.task, train.side) != (test.task, test.side):
        return None
    said = []
    for name, plural in (("questions", "questions"), ("answers", "solution grids")):
        known = {row.tobytes() for row in getattr(train, name).cpu().numpy()}
        count = sum(row.tobytes() in known for row in getattr(test, name).cpu().numpy())
        if count:
            said.append(f"{count} of {len(test)} {plural}")
    if not said:
        return None
    return f"{test.name}: {' and '.join(said)} stand in {train.name} as well, so the report is not of unseen puzzles"
