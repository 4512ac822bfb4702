"""What docs/STUDIES.md shows is what runs: its files, its arms, its flags and what it says of them."""

from __future__ import annotations

import re

import pytest
from hrm_testing import ROOT

from agents.arm import Arm
from hrm_rl.ablate import build_parser
from hrm_rl.errors import UserError
from hrm_rl.settings import hints_of
from hrm_rl.study import spec

PAGE = (ROOT / "docs" / "STUDIES.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def names(text: str, path) -> list[str]:
    (path / "s.yaml").write_text(text)
    return [arm.name for arm in spec.load_study(path / "s.yaml").arms]


def test_there_is_a_whole_file_of_each_kind(tmp_path):
    found = {}
    for text in FILES:
        (tmp_path / "s.yaml").write_text(text)
        study = spec.load_study(tmp_path / "s.yaml")
        assert study.without_effect == () and len(study.arms) > 3
        found.setdefault(study.kind, study)
    assert list(found) == ["q_only", "joint", "train"]
    q = found["q_only"]
    assert (q.seeds, q.updates, q.checkpoints, q.size, q.max_steps) == (5, 500, 10, 6, 16)
    assert (q.train.count, q.probe.count, q.baseline.values["weight_decay"]) == (500, 300, 0)
    assert [arm.name for arm in found["train"].arms[1:3]] == ["two_networks_merged", "fixed"]


def test_what_counts_where_a_line_is_left_out():
    """The numbers in brackets behind the settings of the first file."""
    said = dict(re.findall(r"^ *(\w+): .*# .*\((\d+)\)", FILES[0], re.MULTILINE))
    usual = {name: getattr(spec.Study, name) for name in ("seeds", "updates", "checkpoints", "size", "max_steps")}
    usual |= {"train": spec.Study.train.count}
    for name, value in usual.items():
        assert said.get(name, str(value)) == str(value), name
    assert set(said) >= {"seeds", "updates", "checkpoints", "max_steps"} and spec.Study.probe.count == 1000


def test_blocks_cross_and_stand_beside_each_other_as_it_says(tmp_path):
    arms = names(FILES[3], tmp_path)
    assert arms[0] == "baseline" and len(arms) == 1 + 5 + 5 + 1
    assert "1 + 5 + 5 + 1 arms are left" in " ".join(PAGE.split())
    assert {"loss=mse_values weight_decay=0", "loss=mse_logits", "weight_decay=0", "num_envs=128", "wild"} <= set(arms)
    with pytest.raises(UserError, match=r"\{any_name: \{gamma: \[0.5, 0.9\]\}\}, or a list, - \{gamma: \[0.5, 0.9\]\}"):
        names("kind: q_only\narms: {gamma: [0.5, 0.9]}\n", tmp_path)
    for cure in ("arms: {any_name: {gamma: [0.5, 0.9]}}", "arms:\n  - {gamma: [0.5, 0.9]}"):
        assert names(f"kind: q_only\n{cure}\n", tmp_path) == ["baseline", "gamma=0.5", "gamma=0.9"]
    pairs = "kind: train\narms: {a: {clues: [[30, 40], [25, 30]]}}\n"
    assert "clues: [[30, 40], [25, 30]]" in PAGE and names(pairs, tmp_path)[1:] == ["clues=30,40", "clues=25,30"]


def test_names_of_fields_and_of_what_the_study_decides():
    text = " ".join(PAGE.split())
    listed = text.partition("The fields of an arm are")[2].partition("`agents/arm.py` says")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(hints_of(Arm))
    decided = text.partition("is no field of an arm:")[2].partition(".")[0]
    assert set(re.findall(r"\w+", decided.replace(" and ", " "))) == set(spec._STUDYS_OWN)


def test_the_flags_it_shows_exist():
    known = {action.dest for action in build_parser()._actions}
    flags = re.findall(r"(?<![\w-])--([a-z][a-z-]*)", PAGE)
    assert len(set(flags)) >= 10
    for flag in flags:
        assert flag.replace("-", "_") in known | {"help"}, flag
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE))
