"""The tidy table of a study: one row for each arm, seed and update, as CSV and as Parquet.

Columns: arm, seed, status, reason, seconds, puzzles, update; then the arm's settings under `arm.NAME`, then the metrics
under their names. A run without a checkpoint (it failed before the first) has one row without an update. What was
measured by segment is in a second table, with one row for each arm, seed, update and step. In the CSV an undefined
value is `nan` and a missing one is empty; in Parquet they are NaN and null.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hrm_rl.checkpoint import write_atomically
from hrm_rl.errors import UserError
from hrm_rl.study.info import StudyInfo
from hrm_rl.study.results import RunResult

TABLE, BY_STEP = "table", "by_step"  # file names without their endings
_RUN = {"arm": str, "seed": int, "status": str, "reason": str, "seconds": float, "puzzles": str, "update": int}

Columns = dict[str, tuple[type, list[Any]]]  # name -> type, values (None where there is none)


def write_tables(folder: Path, info: StudyInfo, results: Sequence[RunResult]) -> list[Path]:
    """Write table.csv and table.parquet into `folder`, and by_step.* where anything was measured by segment.

    Each file is written whole or not at all; the order of `results` does not matter. Returns the paths. UserError where
    pyarrow is missing, after the CSV is written. OSError passes through.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = info.in_order(results)
    tables = {TABLE: columns(info, runs)}
    if any(run.by_step for run in runs):
        tables[BY_STEP] = step_columns(runs)
    written = []
    for name, table in tables.items():
        written.append(folder / f"{name}.csv")
        write_atomically(written[-1], to_csv(table))
    for name, table in tables.items():
        content = to_parquet(table, folder)
        written.append(folder / f"{name}.parquet")
        write_atomically(written[-1], content)
    return written


def columns(info: StudyInfo, runs: Sequence[RunResult]) -> Columns:
    """The table of one row for each (arm, seed, update), in the order of `runs`."""
    settings = {run.arm: dict(info.arms.get(run.arm, run.changes)) for run in runs}
    names = list(dict.fromkeys(name for held in settings.values() for name in held))
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    rows = [(run, c) for run in runs for c in (range(len(run.updates)) or [None])]
    table: Columns = {name: (kind, []) for name, kind in _RUN.items()}
    for run, c in rows:
        for name, value in _identity(run, c).items():
            table[name][1].append(value)
    for name in names:
        values = [settings[run.arm].get(name) for run, _ in rows]
        kind = _type_of(values)
        table[f"arm.{name}"] = (kind, [_as(kind, value) for value in values])
    for name in metrics:
        table[name] = (float, [_at(run.metrics.get(name), c) for run, c in rows])
    return table


def step_columns(runs: Sequence[RunResult]) -> Columns:
    """The table of one row for each (arm, seed, update, step), in the order of `runs`; steps count from 1."""
    names = list(dict.fromkeys(name for run in runs for name in run.by_step))
    rows = [(run, c, m) for run in runs if run.by_step for c in range(len(run.updates))
            for m in range(max(value.shape[-1] for value in run.by_step.values()))]  # fmt: skip
    table: Columns = {
        "arm": (str, [run.arm for run, _, _ in rows]), "seed": (int, [run.seed for run, _, _ in rows]),
        "update": (int, [int(run.updates[c]) for run, c, _ in rows]), "step": (int, [m + 1 for _, _, m in rows]),
    }  # fmt: skip
    for name in names:
        table[name] = (float, [_at(None if run.by_step.get(name) is None else run.by_step[name][c], m)
                               for run, c, m in rows])  # fmt: skip
    return table


def to_csv(table: Columns) -> bytes:
    """UTF-8, a header, lines that end in \\n; numbers as Python prints them, so that they read back exactly."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*(values for _, values in table.values()), strict=True):
        writer.writerow(["" if value is None else repr(value) if isinstance(value, float) else value for value in row])
    return file.getvalue().encode()


def to_parquet(table: Columns, where: Path) -> bytes:
    """Parquet of the same columns. UserError where pyarrow is missing, naming the folder that holds the CSV."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{where}: a table as Parquet needs pyarrow (pip install pyarrow); the CSV is there") from error
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    held = {name: pa.array(values, type=types[kind], from_pandas=False) for name, (kind, values) in table.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(held), sink, compression="zstd")
    return sink.getvalue()


def _identity(run: RunResult, c: int | None) -> dict[str, Any]:
    own = {name: getattr(run, name) for name in ("arm", "seed", "status", "reason", "seconds", "puzzles")}
    return own | {"seconds": float(run.seconds), "update": None if c is None else int(run.updates[c])}


def _at(series, place: int | None) -> float | None:
    """One value of a series; None where there is no series, or no such place in it."""
    return None if series is None or place is None or place >= len(series) else float(series[place])


def _type_of(values: Iterable[Any]) -> type:
    """The narrowest type that holds all values of a setting: bool, int, float, else text."""
    kinds = {type(value) for value in values if value is not None}
    for kind, wide in ((bool, {bool}), (int, {int}), (float, {int, float})):
        if kinds and kinds <= wide:
            return kind
    return str


def _as(kind: type, value: Any) -> Any:
    if value is None or kind is not str:
        return None if value is None else kind(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)
