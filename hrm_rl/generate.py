"""`python -m hrm_rl.generate`: write Sudoku puzzles with exactly one solution to a CSV file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hrm_rl import cli
from hrm_rl.errors import UserError
from hrm_rl.tasks.csv_io import check_name, check_target, read_csv, write_csv
from hrm_rl.tasks.generate import PuzzleSpec, canonical_grids, generate_puzzles


def build_parser():
    """The flags: those of PuzzleSpec, and where to write."""
    parser = cli.make_parser(
        "python -m hrm_rl.generate",
        "Write Sudoku puzzles with exactly one solution to a CSV file (source,question,answer,rating).",
    )
    parser.add_class_arguments(PuzzleSpec, as_group=False)
    parser.add_argument("--out", type=str, required=True, help="File to write: .csv or .csv.gz.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the file where it exists.")
    parser.add_argument(
        "--exclude_grids_of", type=str, nargs="+", default=[],
        help="CSV files whose solution grids may not occur, not even up to symmetry (a test set, say).",
    )  # fmt: skip
    return parser


def make_file(
    spec: PuzzleSpec, path: Path, exclude_grids_of: Sequence[str | Path] = (), overwrite: bool = False
) -> str:
    """Generate, write, and return the closing line. UserError for bad input; the file is whole or absent."""
    check_name(path)
    check_target(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; add --overwrite to replace it")
    exclude: set[bytes] = set()
    for other in exclude_grids_of:
        exclude |= canonical_grids(read_csv(Path(other).expanduser(), spec.side).answers)
    generate_puzzles(PuzzleSpec(side=4, count=1, grid_classes=1))  # compiles, so that the rate is the work's
    start = time.perf_counter()
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=spec.count, unit=" puzzles", leave=False) as bar:
            rows = generate_puzzles(spec, exclude, bar.update)
    else:
        print(f"making {spec.count:,} puzzles of side {spec.side} for {path}", file=sys.stderr)
        rows = generate_puzzles(spec, exclude)
    seconds = time.perf_counter() - start
    write_csv(path, rows)
    clues = (rows.questions > 0).sum(1)
    kind = "minimal " if spec.is_minimal else ""
    rate = f"{seconds:.1f} s ({spec.count / seconds:,.0f} a second)"
    return (
        f"{spec.count:,} {kind}{spec.side}x{spec.side} puzzles in {rate}, "
        f"{clues.min()} to {clues.max()} givens (mean {clues.mean():.1f}), "
        f"rating 0 for {(rows.ratings == 0).mean():.0%}, largest {rows.ratings.max():.0f}: {path}"
    )


def main(argv: Sequence[str]) -> int:
    args = cli.parse(build_parser(), argv)
    spec = PuzzleSpec(**{field.name: args[field.name] for field in fields(PuzzleSpec)})
    try:
        print(make_file(spec, Path(args.out).expanduser(), args.exclude_grids_of, args.overwrite))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    cli.run(main)
