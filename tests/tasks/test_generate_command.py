"""`python -m hrm_rl.generate`."""

from __future__ import annotations

import re

import pytest

from hrm_rl import generate
from hrm_rl.errors import UserError
from hrm_rl.tasks import load_puzzles


@pytest.mark.parametrize("flags", [["--min-clues", "5", "--max-clues", "7"], ["--min_clues=5", "--max_clues=7"]])
def test_writes_what_was_asked_for(tmp_path, capsys, flags):
    out = tmp_path / "made.csv"
    assert generate.main(["--side", "4", "--count", "30", "--seed", "4", "--out", str(out), *flags]) == 0
    puzzles = load_puzzles(out, side=4, check_unique=True)
    assert len(puzzles) == 30 and puzzles.clues.min() >= 5 and puzzles.clues.max() <= 7
    captured = capsys.readouterr()
    assert re.search(r"^30 4x4 puzzles in .* a second\), 5 to 7 givens .*made\.csv$", captured.out.strip())
    assert captured.err.count("\n") == 1  # no progress bar where nobody watches


def test_excludes_the_grids_of_other_files(tmp_path, capsys):
    test, train = tmp_path / "test.csv", tmp_path / "train.csv"
    generate.main(["--side", "4", "--count", "20", "--grid-classes", "1", "--out", str(test)])
    generate.main(["--side", "4", "--count", "20", "--exclude-grids-of", str(test), "--out", str(train)])
    assert len(load_puzzles(train)) == 20
    with pytest.raises(UserError, match="after 0 of 5 puzzles"):  # both of the two grids are excluded
        arguments = ["--side", "4", "--count", "5", "--exclude-grids-of", str(test), str(train)]
        generate.main([*arguments, "--out", str(tmp_path / "none.csv")])
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--side", "5"], "side must be one of 4, 6, 9"),
        (["--count", "many"], "count"),
        (["--cuont", "3"], "cuont"),
        (["--min-clues", "40", "--max-clues", "30"], "above max_clues"),
        (["--out", "/no/such/folder/x.csv"], "does not exist"),
        (["--out", "x.txt"], "must end in .csv"),
        (["--exclude-grids-of", "absent.csv"], "absent.csv: cannot be read"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    base = [] if "--out" in arguments else ["--out", "x.csv"]
    with pytest.raises(UserError, match=message) as caught:
        generate.main([*base, *arguments])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_puzzles", interrupted)
    assert generate.main(["--out", str(tmp_path / "x.csv")]) == 130
    assert not list(tmp_path.iterdir()) and "nothing was written" in capsys.readouterr().err


def test_every_flag_has_help():
    text = generate.build_parser().format_help()
    for flag in ("side", "count", "min_clues", "max_clues", "minimal", "min_rating", "max_rating", "seed", "out"):
        assert f"--{flag}" in text
    for action in generate.build_parser()._actions:
        assert action.help, action.dest
