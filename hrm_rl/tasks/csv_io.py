"""Puzzles on disk: CSV with the header `source,question,answer,rating` (DESIGN section 6), plain or gzipped.

One character a cell; which ones, and what they must obey, is the task's to say (`tasks.registry`): Sudoku's where
none is named. Every line is checked: schema, length, alphabet, the rules, and that the answer keeps the givens. The
first bad one raises a UserError "file:line: reason". LF and CRLF line ends, a byte order mark and blank lines at the
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
from hrm_rl.tasks.registry import DEFAULT_TASK, Task, check_side, get_task, task_class

HEADER = ("source", "question", "answer", "rating")
_CHUNK = 1 << 15  # lines checked at a time
_LONGEST_LINE = 1 << 16  # bytes, so that a file without line ends does not fill the memory
_MAX_RATING = float(np.finfo(np.float32).max)


class Rows(NamedTuple):
    """N puzzles as places in their task's `characters` (in Sudoku: digits, 0 is a blank). S cells, row by row."""

    questions: np.ndarray  # (N, S) uint8
    answers: np.ndarray  # (N, S) uint8
    ratings: np.ndarray  # (N,) float32
    sources: tuple[str, ...]

    @property
    def side(self) -> int:
        """Of a grid of S cells."""
        return math.isqrt(self.questions.shape[1])


class _Fault(Exception):
    """Why a line is refused; the reader adds file and line."""


def read_csv(
    path: str | Path, side: int | None = None, limit: int | None = None, check_unique: bool = False,
    task: str = DEFAULT_TASK,
) -> Rows:  # fmt: skip
    """Read and check a .csv or .csv.gz file.

    side: the side every grid must have; None takes it from the first line. limit: read no more than that many
    puzzles. check_unique: refuse questions with more than one solution (needs the solver).
    Raises UserError naming file, line and reason."""
    path = Path(path)
    if side is not None:
        check_side(task_class(task).sides, side)
    if limit is not None and limit < 1:
        raise UserError(f"{path}: the limit must be at least 1, not {limit}")
    chunks: list[Rows] = []
    try:
        with _open(path) as stream:
            lines = _numbered(stream, path)
            _check_header(lines, path)
            while limit is None or limit > 0:
                size = _CHUNK if limit is None else min(_CHUNK, limit)
                rows, side = _read_chunk(lines, path, task, side, size, check_unique)
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


def write_csv(path: str | Path, rows: Rows, characters: str = ".123456789") -> None:
    """Write puzzles; `path` ends in .csv or .csv.gz. The file appears complete or not at all."""
    path = Path(path)
    check_name(path)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    for question, answer, rating, source in zip(*rows, strict=True):
        if any(end in source for end in "\r\n"):
            raise UserError(f"{path}: the source {source!r} contains a line end")
        written = (to_text(cells, characters) for cells in (question, answer))
        writer.writerow((source, *written, f"{float(rating):.9g}"))
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


def to_text(cells: np.ndarray, characters: str = ".123456789") -> str:
    """Places in `characters`, (S,), as a string; by default digits, '.' for a blank."""
    return np.frombuffer(characters.encode("ascii"), np.uint8)[np.asarray(cells)].tobytes().decode("ascii")


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
    lines: Iterator[tuple[int, bytes]], path: Path, task: str, side: int | None, size: int, check_unique: bool
) -> tuple[Rows | None, int | None]:
    """The next `size` puzzles, or None at the end. Line by line for the schema, all at once for the rules."""
    numbers, sources, questions, answers, ratings = [], [], [], [], []
    late: UserError | None = None  # a fault of schema; a line before it may break the rules
    for number, line in lines:
        try:
            source, question, answer, rating = _split(line)
            side = side or _side_of(question, task)
            shape = get_task(task, side).shape
            _check_length("question", question, shape)
            _check_length("answer", answer, shape)
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
        rules = get_task(task, side)
        grids = _places(questions, rules), _places(answers, rules)
        rows = Rows(*grids, np.array(ratings, np.float32), tuple(sources))
        bad = rules.first_fault(rows.questions, rows.answers, check_unique)
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


def _side_of(question: str, task: str) -> int:
    sizes = {get_task(task, side).seq_len: side for side in task_class(task).sides}
    if len(question) in sizes:
        return sizes[len(question)]
    *most, last = map(str, sizes)
    if len(most) > 6:
        most[3:] = ["..."]
    known = f"{', '.join(most)} or {last}" if most else last
    raise _Fault(f"the question must have {known} cells, not {len(question)}")


def _check_length(name: str, cells: str, shape: tuple[int, int]) -> None:
    wanted = shape[0] * shape[1]
    if len(cells) != wanted:
        raise _Fault(f"the {name} must have {wanted} cells ({shape[0]}x{shape[1]}), not {len(cells)}")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= _MAX_RATING or "_" in text:  # also refuses nan
        raise _Fault(f"the rating must be a number, not {_short(text)}")
    return value


def _places(grids: Sequence[str], task: Task) -> np.ndarray:
    """(N, S) uint8: places in the task's `characters`, 255 for a character that is not among them."""
    lookup = np.full(256, 255, np.uint8)
    for place, character in enumerate(task.characters):
        lookup[ord(character)] = place
    for other, character in task.aliases.items():
        lookup[ord(other)] = task.characters.index(character)
    text = "".join(grids).encode("ascii", "replace")  # one byte a character, '?' for what is not ASCII
    return lookup[np.frombuffer(text, np.uint8)].reshape(len(grids), task.seq_len)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
