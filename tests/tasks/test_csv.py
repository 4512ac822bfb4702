"""The CSV reader names every fault with its line; the writer leaves a whole file or none."""

from __future__ import annotations

import gzip
import os
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_rl.errors import UserError
from hrm_rl.tasks import csv_io
from hrm_rl.tasks.csv_io import Rows, read_csv, write_csv
from hrm_rl.tasks.geometry import tables

HEADER = "source,question,answer,rating"
ANSWER = "1234341221434321"
GOOD = [f"own,1...34..2.4.43.1,{ANSWER},0", f"own,.2.......1......,{ANSWER},2.5", f"own,000.34........21,{ANSWER},7"]


def write(path, lines, end="\n"):
    path.write_bytes(end.join([HEADER, *lines, ""]).encode())
    return path


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.csv", GOOD)


def test_reads_digits(good):
    rows = read_csv(good)
    assert rows.side == 4 and rows.sources == ("own",) * 3 and rows.ratings.tolist() == [0, 2.5, 7]
    assert rows.questions[0].tolist() == [1, 0, 0, 0, 3, 4, 0, 0, 2, 0, 4, 0, 4, 3, 0, 1]
    assert rows.questions[2].tolist() == [0, 0, 0, 0, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert "".join(map(str, rows.answers[1])) == ANSWER


def same(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
def test_round_trip(good, tmp_path, name):
    rows = read_csv(good)._replace(sources=("a", 'with "quotes"', "with, comma"))
    write_csv(tmp_path / name, rows)
    assert same(read_csv(tmp_path / name), rows)
    first = (tmp_path / name).read_bytes()
    write_csv(tmp_path / name, rows)
    assert (tmp_path / name).read_bytes() == first  # no time stamps
    assert sorted(os.listdir(tmp_path)) == ["good.csv", name]  # no temporary file left


def test_line_ends_and_byte_order_mark(good, tmp_path):
    expected = read_csv(good)
    assert same(read_csv(write(tmp_path / "crlf.csv", GOOD, "\r\n")), expected)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + good.read_bytes())
    assert same(read_csv(tmp_path / "bom.csv"), expected)
    (tmp_path / "open.csv").write_bytes(good.read_bytes().rstrip(b"\n"))
    assert same(read_csv(tmp_path / "open.csv"), expected)
    (tmp_path / "good.csv.gz").write_bytes(gzip.compress(good.read_bytes()))
    assert same(read_csv(tmp_path / "good.csv.gz"), expected)


def test_limit_stops_before_the_fault(tmp_path):
    path = write(tmp_path / "a.csv", [*GOOD, "broken"])
    assert len(read_csv(path, limit=3).sources) == 3
    with pytest.raises(UserError, match="a.csv:5: 4 fields"):
        read_csv(path, limit=4)
    with pytest.raises(UserError, match="limit must be at least 1"):
        read_csv(path, limit=0)


WRONG_ANSWER = "2" + ANSWER[1:]
FAULTS = {
    "": "empty line",
    "own,....": "4 fields expected",
    f"{GOOD[0]},more": "4 fields expected .*, not 5",
    f"own,...,{ANSWER},0": "the question must have 16 cells",
    f"own,{'.' * 17},{ANSWER},0": "the question must have 16 cells .*, not 17",
    f"own,{'.' * 16},{ANSWER}1,0": "the answer must have 16 cells .*, not 17",
    f"own,5{'.' * 15},{ANSWER},0": "the question has a character that is not 1 to 4, '.' or '0' at row 1, column 1",
    f"own,{'.' * 15}x,{ANSWER},0": "the question has a character .* at row 4, column 4",
    f"own,{'.' * 15}é,{ANSWER},0": "the question has a character .* at row 4, column 4",
    f"own,{'.' * 16},{ANSWER[:-1]}.,0": "the answer has a character that is not 1 to 4 at row 4, column 4",
    f"own,{'.' * 16},{WRONG_ANSWER},0": "the answer breaks the rules: 2 more than once in row 1",
    f"own,{'.' * 16},1234123412341234,0": "the answer breaks the rules: 1 more than once in column 1",
    f"own,{'.' * 16},1234234134124123,0": "the answer breaks the rules: 2 more than once in box 1",
    f"own,11{'.' * 14},{ANSWER},0": "the question breaks the rules: 1 more than once in row 1",
    f"own,2{'.' * 15},{ANSWER},0": "the answer contradicts the question at row 1, column 1 .1, given 2.",
    f"own,{'.' * 16},{ANSWER},": "the rating must be a number, not ''",
    f"own,{'.' * 16},{ANSWER},hard": "the rating must be a number, not 'hard'",
    f"own,{'.' * 16},{ANSWER},nan": "the rating must be a number, not 'nan'",
    f"own,{'.' * 16},{ANSWER},1e39": "the rating must be a number",
    f"own,{'.' * 16},{ANSWER},1_0": "the rating must be a number",
    f'"own,{"." * 16},{ANSWER},0': "broken quotes",
}


@pytest.mark.parametrize("line", FAULTS)
@pytest.mark.parametrize("before", [0, 3])
def test_every_fault_is_named_with_its_line(tmp_path, line, before):
    path = write(tmp_path / "a.csv", [*GOOD[:before], line, "a later fault"])
    with pytest.raises(UserError, match=FAULTS[line]) as caught:
        read_csv(path, side=4)
    assert str(caught.value).startswith(f"{path}:{before + 2}: ") and "\n" not in str(caught.value)


def test_the_first_of_two_faults_is_named(tmp_path):
    """A broken rule is found later than a broken schema, yet named if it comes first."""
    path = write(tmp_path / "a.csv", [GOOD[0], f"own,2{'.' * 15},{ANSWER},0", "no,fields"])
    with pytest.raises(UserError, match="a.csv:3: the answer contradicts"):
        read_csv(path)


def test_uniqueness_on_request(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    read_csv(path)
    with pytest.raises(UserError, match="a.csv:3: the question has more than one solution"):
        read_csv(path, check_unique=True)
    read_csv(path, check_unique=True, limit=1)


def test_faults_of_the_whole_file(tmp_path, good):
    def refused(path, message, **options):
        with pytest.raises(UserError, match=message):
            read_csv(path, **options)

    refused(tmp_path / "none.csv", r"none\.csv: cannot be read \(No such file")
    refused(tmp_path / "a.txt", "must end in .csv or .csv.gz")
    (tmp_path / "dir.csv").mkdir()
    refused(tmp_path / "dir.csv", "is a folder")
    refused(write(tmp_path / "only.csv", []), "only.csv:2: no puzzle after the header")
    (tmp_path / "empty.csv").write_bytes(b"")
    refused(tmp_path / "empty.csv", "empty.csv:1: the header must be source,question,answer,rating, not ''")
    (tmp_path / "head.csv").write_bytes(b"question,answer\n")
    refused(tmp_path / "head.csv", "head.csv:1: the header must be")
    (tmp_path / "latin.csv").write_bytes(good.read_bytes() + b"\xe9,,,\n")
    refused(tmp_path / "latin.csv", "latin.csv:5: not UTF-8 text .byte 1")
    refused(good, "good.csv:2: the question must have 81 cells", side=9)
    refused(good, "side must be one of 4, 6, 9, not 5", side=5)
    (tmp_path / "plain.csv.gz").write_bytes(good.read_bytes())
    refused(tmp_path / "plain.csv.gz", "plain.csv.gz:1: damaged gzip data")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(good.read_bytes())[:-12])
    refused(tmp_path / "cut.csv.gz", r"cut.csv.gz:\d+: damaged gzip data")


def test_a_failed_write_keeps_the_old_file(good, tmp_path, monkeypatch):
    rows, before = read_csv(good), good.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv_io.os, "replace", full)
    with pytest.raises(UserError, match="good.csv: cannot be written .No space left on device"):
        write_csv(good, rows)
    assert good.read_bytes() == before and os.listdir(tmp_path) == ["good.csv"]
    with pytest.raises(UserError, match="contains a line end"):
        write_csv(good, rows._replace(sources=("a\nb",) * 3))
    with pytest.raises(UserError, match="cannot be written"):
        write_csv(tmp_path / "none" / "a.csv", rows)


def test_forty_thousand_rows_in_two_seconds(tmp_path):
    answer = "123456789456789123789123456231564897564897231897231564312645978645978312978312645"
    line = f"own,{'.' * 81},{answer},0"
    path = write(tmp_path / "large.csv", [line] * 40_000)
    start = time.process_time()
    assert len(read_csv(path).questions) == 40_000
    assert time.process_time() - start < 2


def is_valid(rows: Rows) -> bool:
    """The rules once more, in plain Python."""
    for question, answer, rating in zip(rows.questions.tolist(), rows.answers.tolist(), rows.ratings, strict=True):
        if not all({answer[cell] for cell in unit} == {1, 2, 3, 4} for unit in tables(4).units):
            return False
        if not all(q in (0, a) for q, a in zip(question, answer, strict=True)) or not np.isfinite(rating):
            return False
    return True


@st.composite
def mutated_files(draw) -> bytes:
    data = bytearray("\n".join([HEADER, *GOOD, ""]).encode())
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["set", "insert", "delete", "copy"]))
        piece = draw(st.one_of(st.sampled_from([b"1", b"4", b".", b",", b"\n", b'"', b"\r"]), st.binary(max_size=3)))
        stop = start + draw(st.integers(0, 20)) if kind in ("delete", "copy") else start + len(piece)
        if kind == "copy":
            piece = bytes(data[start:stop])
            stop = start = draw(st.integers(0, len(data)))
        data[start : start if kind == "insert" else stop] = b"" if kind == "delete" else piece
    return bytes(data)


@settings(deadline=None, max_examples=300)
@given(data=mutated_files())
def test_a_mutated_file_is_valid_or_its_line_is_named(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.csv"
    path.write_bytes(data)
    lines = data.split(b"\n")
    try:
        rows = read_csv(path)
    except UserError as error:
        named = re.match(rf"{re.escape(str(path))}:(\d+): \S", str(error))
        assert named and "\n" not in str(error)
        number = int(named[1])
        assert 1 <= number <= len(lines)
        if number > 2:  # everything before the named line is fine
            path.write_bytes(b"\n".join(lines[: number - 1]) + b"\n")
            assert is_valid(read_csv(path))
    else:
        assert is_valid(rows)
        assert len(rows.questions) == len([line for line in lines[1:] if line])
