"""Puzzles on disk: CSV with the header `source,question,answer,rating` (DESIGN section 6), plain or gzipped.

Every line is checked: schema, length, alphabet, the rules, and that the answer keeps the givens. The first
bad one raises a UserError "file:line: reason". LF and CRLF line ends, a byte order mark and blank lines at the
end are accepted.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hrm_rl.errors import UserError
from hrm_rl.tasks.geometry import BOXES, box_of, tables

HEADER = ("source", "question", "answer", "rating")
_CHUNK = 1 << 15  # lines checked at a time
_LONGEST_LINE = 1 << 16  # bytes, so that a file without line ends does not fill the memory
_MAX_RATING = float(np.finfo(np.float32).max)


class Rows(NamedTuple):
    """N puzzles as digits. S cells, row by row; 0 is a blank."""

    questions: np.ndarray  # (N, S) uint8
    answers: np.ndarray  # (N, S) uint8
    ratings: np.ndarray  # (N,) float32
    sources: tuple[str, ...]

    @property
    def side(self) -> int:
        return math.isqrt(self.questions.shape[1])


class _Fault(Exception):
    """Why a line is refused; the reader adds file and line."""


def read_csv(path: str | Path, side: int | None = None, limit: int | None = None, check_unique: bool = False) -> Rows:
    """Read and check a .csv or .csv.gz file.

    side: the side every grid must have; None takes it from the first line. limit: read no more than that many
    puzzles. check_unique: refuse questions with more than one solution (needs the solver).
    Raises UserError naming file, line and reason."""
    path = Path(path)
    if side is not None:
        box_of(side)
    if limit is not None and limit < 1:
        raise UserError(f"{path}: the limit must be at least 1, not {limit}")
    chunks: list[Rows] = []
    try:
        with _open(path) as stream:
            lines = _numbered(stream, path)
            _check_header(lines, path)
            while limit is None or limit > 0:
                size = _CHUNK if limit is None else min(_CHUNK, limit)
                rows, side = _read_chunk(lines, path, side, size, check_unique)
                if rows is None:
                    break
                chunks.append(rows)
                limit = None if limit is None else limit - len(rows.questions)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # a NUL in the name
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not chunks:
        raise UserError(f"{path}:2: no puzzle after the header")
    if len(chunks) == 1:
        return chunks[0]
    merged = (np.concatenate([chunk[field] for chunk in chunks]) for field in range(3))
    return Rows(*merged, tuple(source for chunk in chunks for source in chunk.sources))


def write_csv(path: str | Path, rows: Rows) -> None:
    """Write puzzles; `path` ends in .csv or .csv.gz. The file appears complete or not at all."""
    path = Path(path)
    check_name(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for question, answer, rating, source in zip(*rows, strict=True):
        if any(end in source for end in "\r\n"):
            raise UserError(f"{path}: the source {source!r} contains a line end")
        writer.writerow((source, to_text(question), to_text(answer), f"{float(rating):.9g}"))
    data = text.getvalue().encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, 9, mtime=0)  # no time stamp: the same puzzles are the same bytes
    replace_file(path, lambda stream: stream.write(data))


def check_name(path: Path) -> None:
    """UserError unless the name ends in .csv or .csv.gz."""
    if not path.name.endswith((".csv", ".csv.gz")):
        raise UserError(f"{path}: the name must end in .csv or .csv.gz")


def check_target(path: Path) -> None:
    """UserError where no file can be put at `path`, before the work that fills it."""
    try:
        path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name too long or with a NUL, a folder that may not be entered
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} does not exist or cannot be written")


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write through a temporary file beside `path`, then rename it into place."""
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def to_text(digits: np.ndarray) -> str:
    """Digits (S,) as a string, '.' for a blank."""
    return (np.asarray(digits, np.uint8) + ord("0")).tobytes().decode("ascii").replace("0", ".")


def _open(path: Path) -> BinaryIO:
    check_name(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file")
    if path.exists() and not path.is_file():  # a pipe or a device could keep us waiting for ever
        raise UserError(f"{path}: not a regular file")
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _numbered(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line without its end); damaged compression is named with the line it cuts off."""
    number, blanks = 0, []
    while True:
        number += 1
        try:
            line = stream.readline(_LONGEST_LINE + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}:{number}: damaged gzip data ({error})") from None
        if not line:  # blank lines at the end are dropped
            return
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{path}:{number}: longer than any line of puzzles ({_LONGEST_LINE} bytes)")
        line = line[:-1] if line.endswith(b"\n") else line
        line = line[:-1] if line.endswith(b"\r") else line
        if not line and number > 1:
            blanks.append(number)
            continue
        yield from ((blank, b"") for blank in blanks)
        blanks.clear()
        yield number, line


def _check_header(lines: Iterator[tuple[int, bytes]], path: Path) -> None:
    _, line = next(lines, (1, b""))
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: not UTF-8 text (UTF-16, it seems)")
    found = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    if found != ",".join(HEADER):
        raise UserError(f"{path}:1: the header must be {','.join(HEADER)}, not {_short(found)}")


def _read_chunk(
    lines: Iterator[tuple[int, bytes]], path: Path, side: int | None, size: int, check_unique: bool
) -> tuple[Rows | None, int | None]:
    """The next `size` puzzles, or None at the end. Line by line for the schema, all at once for the rules."""
    numbers, sources, questions, answers, ratings = [], [], [], [], []
    late: UserError | None = None  # a fault of schema; a line before it may break the rules
    for number, line in lines:
        try:
            source, question, answer, rating = _split(line)
            side = side or _side_of(question)
            _check_length("question", question, side)
            _check_length("answer", answer, side)
            ratings.append(_number(rating))
        except _Fault as fault:
            late = UserError(f"{path}:{number}: {fault}")
            break
        except UserError as damaged:
            late = damaged
            break
        numbers.append(number)
        sources.append(source)
        questions.append(question)
        answers.append(answer)
        if len(numbers) == size:
            break
    if numbers:
        grids = _digits(questions, side), _digits(answers, side)
        rows = Rows(*grids, np.array(ratings, np.float32), tuple(sources))
        bad = _first_bad(rows, side, check_unique)
        if bad is not None:
            raise UserError(f"{path}:{numbers[bad[0]]}: {bad[1]}")
    if late is not None:
        raise late
    return (rows, side) if numbers else (None, side)


def _split(line: bytes) -> list[str]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    if not text:
        raise _Fault("empty line")
    if "\r" in text:
        raise _Fault("a carriage return inside the line")
    if '"' in text:
        try:
            fields = next(csv.reader([text], strict=True))
        except csv.Error as error:
            raise _Fault(f"broken quotes ({error})") from None
    else:
        fields = text.split(",")
    if len(fields) != len(HEADER):
        raise _Fault(f"{len(HEADER)} fields expected ({','.join(HEADER)}), not {len(fields)}")
    return fields


def _side_of(question: str) -> int:
    for side in BOXES:
        if len(question) == side * side:
            return side
    raise _Fault(f"the question must have 16, 36 or 81 cells, not {len(question)}")


def _check_length(name: str, cells: str, side: int) -> None:
    if len(cells) != side * side:
        raise _Fault(f"the {name} must have {side * side} cells ({side}x{side}), not {len(cells)}")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _MAX_RATING or "_" in text:  # also refuses nan
        raise _Fault(f"the rating must be a number, not {_short(text)}")
    return value


def _digits(grids: Sequence[str], side: int) -> np.ndarray:
    """(N, S) uint8: digits, 0 for a blank, 255 for anything that is no digit of this side."""
    lookup = np.full(256, 255, np.uint8)
    lookup[ord(".")] = 0
    lookup[ord("0") : ord("0") + side + 1] = np.arange(side + 1)
    text = "".join(grids).encode("ascii", "replace")  # one byte a character, '?' for what is not ASCII
    return lookup[np.frombuffer(text, np.uint8)].reshape(len(grids), side * side)


def _first_bad(rows: Rows, side: int, check_unique: bool) -> tuple[int, str] | None:
    """(row, reason) of the first puzzle that breaks a rule."""
    questions, answers = rows.questions, rows.answers
    units = tables(side).units
    known = (questions <= side).all(1) & (answers <= side).all(1)
    placed = np.where(answers <= side, np.left_shift(1, answers.clip(0, side), dtype=np.int16), 0)
    full = sum(1 << digit for digit in range(1, side + 1))
    solved = (np.bitwise_or.reduce(placed[:, units], axis=-1) == full).all(1)
    kept = ((questions == 0) | (questions == answers)).all(1)
    good = known & solved & kept
    stop = len(good) if good.all() else int(good.argmin())
    if check_unique and stop:
        from hrm_rl.tasks.solver import check_many  # numba is only loaded where it is needed

        counts, _ = check_many(questions[:stop])
        if (counts != 1).any():
            return int((counts != 1).argmax()), "the question has more than one solution"
    return None if stop == len(good) else (stop, _reason(questions[stop], answers[stop], side))


def _reason(question: np.ndarray, answer: np.ndarray, side: int) -> str:
    def where(cell: int) -> str:
        return f"row {cell // side + 1}, column {cell % side + 1}"

    for name, cells, blank in (("question", question, True), ("answer", answer, False)):
        bad = np.flatnonzero(cells > side) if blank else np.flatnonzero((cells > side) | (cells == 0))
        if bad.size:
            allowed = f"1 to {side}" + (", '.' or '0'" if blank else "")
            return f"the {name} has a character that is not {allowed} at {where(int(bad[0]))}"
    for name, cells in (("question", question), ("answer", answer)):
        for index, unit in enumerate(tables(side).units):
            counts = np.bincount(cells[unit], minlength=side + 1)[1:]
            if (counts > 1).any():
                kind = ("row", "column", "box")[index // side]
                digit = int(counts.argmax()) + 1
                return f"the {name} breaks the rules: {digit} more than once in {kind} {index % side + 1}"
    cell = int(np.flatnonzero((question != 0) & (question != answer))[0])
    return f"the answer contradicts the question at {where(cell)} ({answer[cell]}, given {question[cell]})"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
