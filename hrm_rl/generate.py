"""`python -m hrm_rl.generate`: write puzzles with exactly one solution to a CSV file.

Sudoku where no task is named; `--task maze` and the others have flags of their own (`--task maze --help`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hrm_rl import cli
from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import Rows, check_name, check_target, read_csv, write_csv
from hrm_rl.tasks.generate import PuzzleSpec, canonical_grids, generate_puzzles
from hrm_rl.tasks.registry import DEFAULT_TASK, get_task, task_class, task_name


def build_parser(task: str = DEFAULT_TASK):
    """The flags: those of the task's own specification, and where to write."""
    parser = cli.make_parser(
        "python -m hrm_rl.generate",
        f"Write puzzles of the task {task}, each with exactly one solution, to a CSV file "
        "(source,question,answer,rating).",
    )
    parser.add_argument("--task", type=str, default=task,
                        help="sudoku, maze, n_queens, futoshiki, mini_sudoku or an import path; each has flags of its "
                        "own, shown by --task NAME --help.")  # fmt: skip
    parser.add_class_arguments(spec_of(task), as_group=False)
    parser.add_argument("--out", type=str, required=True, help="File to write: .csv or .csv.gz.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file where it exists.")
    parser.add_argument(
        "--exclude_grids_of", type=str, nargs="+", default=[],
        help="CSV files whose solution grids (of mazes: whose mazes) may not occur, not even up to symmetry (a "
        "test set, say).",
    )  # fmt: skip
    return parser


def spec_of(task: str) -> type:
    """The dataclass of what can be asked for. UserError for a task that has no generator."""
    if task == DEFAULT_TASK:
        return PuzzleSpec
    spec = getattr(task_class(task), "spec", None)
    if spec is None:
        raise UserError(f"task {task!r} has no generator")
    return spec


def named_task(argv: Sequence[str]) -> str:
    """The task that the flags name, before the others are read: which there are depends on it."""
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--task" and (equals or position + 1 < len(argv)):
            return task_name(value if equals else argv[position + 1])
    return DEFAULT_TASK


def make_file(
    spec: Any, path: Path, exclude_grids_of: Sequence[str | Path] = (), overwrite: bool = False,
    task: str = DEFAULT_TASK,
) -> str:  # fmt: skip
    """Generate, write, and return the closing line. UserError for bad input; the file is whole or absent."""
    check_name(path)
    check_target(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; add --overwrite to replace it")
    make = generate_puzzles if task == DEFAULT_TASK else task_class(task).generate
    exclude: set[bytes] = set()
    for other in exclude_grids_of:
        exclude |= _forms(read_csv(Path(other).expanduser(), spec.side, task=task), task)
    if task == DEFAULT_TASK:
        generate_puzzles(PuzzleSpec(side=4, count=1, grid_classes=1))  # compiles, so that the rate is the work's
    start = time.perf_counter()
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=spec.count, unit=" puzzles", leave=False) as bar:
            rows = make(spec, exclude, bar.update)
    else:
        print(f"making {spec.count:,} puzzles of side {spec.side} for {path}", file=sys.stderr)
        rows = make(spec, exclude)
    seconds = time.perf_counter() - start
    write_csv(path, rows, get_task(task, spec.side).characters)
    if task != DEFAULT_TASK:
        rate = f"{seconds:.1f} s ({len(rows.ratings) / seconds:,.0f} a second)"
        low, mean, high = rows.ratings.min(), rows.ratings.mean(), rows.ratings.max()
        return (
            f"{len(rows.ratings):,} puzzles of the task {task}, side {spec.side}, in {rate}, "
            f"rating {low:g} to {high:g} (mean {mean:.1f}): {path}"
        )
    clues = (rows.questions > 0).sum(1)
    kind = "minimal " if spec.is_minimal else ""
    rate = f"{seconds:.1f} s ({spec.count / seconds:,.0f} a second)"
    return (
        f"{spec.count:,} {kind}{spec.side}x{spec.side} puzzles in {rate}, "
        f"{clues.min()} to {clues.max()} givens (mean {clues.mean():.1f}), "
        f"rating 0 for {(rows.ratings == 0).mean():.0%}, largest {rows.ratings.max():.0f}: {path}"
    )


def _forms(rows: Rows, task: str) -> set[bytes]:
    """What of these puzzles may not occur again, up to symmetry."""
    if task == DEFAULT_TASK:
        return canonical_grids(rows.answers)
    form = task_class(task).form
    return {form(question, answer) for question, answer in zip(rows.questions, rows.answers, strict=True)}


def main(argv: Sequence[str]) -> int:
    task = named_task(argv)
    kind = spec_of(task)
    args = cli.parse(build_parser(task), argv)
    if task_name(args.task) != task:  # of a YAML file
        raise UserError(f"--task {args.task}: name the task as a flag, not in a file")
    spec = kind(**{field.name: args[field.name] for field in fields(kind)})
    try:
        print(make_file(spec, Path(args.out).expanduser(), args.exclude_grids_of, args.overwrite, task))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    cli.run(main)
