"""`python -m hrm_rl.ablate`: what it runs, goes on with, reports and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import study_stand_ins
import torch
from hrm_testing import ROOT

from hrm_rl import ablate, cli
from hrm_rl.checkpoint import lock_run
from hrm_rl.study import sweep

SMALL = """kind: q_only
title: A small study
seeds: 3
updates: 4
checkpoints: 2
size: 6
baseline: {weight_decay: 0}
arms:
  a: {lr: [0.01, 0.02], num_envs: [32, 8]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small study, in which the command runs; learners stand in."""
    monkeypatch.chdir(tmp_path)
    study_stand_ins.install(lambda held, name, value: monkeypatch.setitem(held, name, value))
    Path("small.yaml").write_text(SMALL)
    return tmp_path


def run(*words: str) -> int:
    return ablate.main([*words, "--cache", "cache", "--device", "cpu"])


def refusal(words, monkeypatch, capsys) -> str:
    """The one line on stderr without "error: "."""
    monkeypatch.setattr(sys, "argv", ["ablate", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run(ablate.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said.removeprefix("error: ").rstrip("\n")


def test_a_study_from_start_to_report_and_more_seeds_later(place, capsys):
    assert run("small.yaml") == 0
    out = capsys.readouterr().out
    assert "small: 5 arms x 3 seeds = 15 runs of 4 updates; 0 are there already (studies/small)" in out
    assert "on this process" in out and re.search(r"runs 15/15  failed 0  unstable \d+  learner-updates/s [\d,]+", out)
    found = sweep.results_in(place / "studies/small/runs", pytest.fail)
    assert len(found) == 15 and torch.equal(found["lr=0.01", 2].right, study_stand_ins.result("lr=0.01", 2).right)
    assert found["lr=0.02 num_envs=8", 0].changes == {"lr": 0.02, "num_envs": 8} and not found["baseline", 1].changes
    assert {"report.html", "table.csv", "table.parquet"} <= {path.name for path in (place / "studies/small").iterdir()}
    rows = [line for line in out.splitlines() if re.search(r"\d/3$", line)]
    assert len(rows) == 5 and rows[0].startswith("baseline ") and "%" in rows[0] and "[" in rows[0]
    assert "A small study" in (place / "studies/small/report.html").read_text()
    assert run("small.yaml") == 0
    assert "15 runs of 4 updates; 15 are there already" in capsys.readouterr().out
    assert run("small.yaml", "--seeds", "4", "--arms", "lr=0.01") == 0
    out = capsys.readouterr().out
    assert "2 arms x 4 seeds = 8 runs of 4 updates; 6 are there already" in out
    assert len(sweep.results_in(place / "studies/small/runs", pytest.fail)) == 17
    assert run("small.yaml", "--report", "--seeds", "4") == 0
    assert "17 runs, 3 are missing" in capsys.readouterr().out


def test_failures_are_results_and_done_again_on_request(place, capsys, monkeypatch):
    Path("f.yaml").write_text("kind: q_only\nseeds: 2\nupdates: 4\nsize: 6\narms:\n  a: {lr: [13, 14, 0.01]}\n")
    assert run("f.yaml", "--out", "o") == 0
    out = capsys.readouterr().out
    found = sweep.results_in(place / "o/runs", pytest.fail)
    statuses = {arm: found[arm, 1].status for arm in ("baseline", "lr=13", "lr=14", "lr=0.01")}
    assert statuses == {"baseline": "finished", "lr=13": "failed", "lr=14": "diverged", "lr=0.01": "finished"}
    assert found["lr=13", 0].reason == "RuntimeError: unlucky" and "2 of 8 runs failed (see o/failures.log)" in out
    run("f.yaml", "--out", "o")
    assert "8 are there already" in capsys.readouterr().out
    better = lambda group, *rest: [study_stand_ins.result(name, seed) for name, _, seed in group]  # noqa: E731
    monkeypatch.setattr(sys.modules["hrm_rl.study.learners"], "train_group", better)
    run("f.yaml", "--out", "o", "--retry-failed")
    assert "6 are there already" in capsys.readouterr().out
    found = sweep.results_in(place / "o/runs", pytest.fail)
    assert (found["lr=13", 0].status, found["lr=14", 0].status) == ("finished", "diverged")


def test_a_sweep_that_is_stopped_says_how_to_go_on(place, capsys, monkeypatch):
    calls = []

    def stopped(group, *rest):
        if len(calls) == 2 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), 15)
        calls.append(group)
        return [study_stand_ins.result(name, seed) for name, _, seed in group]

    monkeypatch.setattr(sys.modules["hrm_rl.study.learners"], "train_group", stopped)
    assert run("small.yaml") == 143
    out = capsys.readouterr().out
    assert "SIGTERM: 8 of 15 runs are finished and safe. Go on with:\n" in out and "-m hrm_rl.ablate small.yaml" in out
    assert not Path("studies/small/report.html").exists()
    assert run("small.yaml") == 0 and "8 are there already" in capsys.readouterr().out
    found = sweep.results_in(place / "studies/small/runs", pytest.fail)
    assert len(found) == 15 and len({id(group) for group in calls}) == len(calls)


def test_list_names_the_arms_and_leaves_nothing(place, capsys):
    assert run("small.yaml", "--list", "--arms", "lr=0.02*") == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["baseline", "lr=0.02", "lr=0.02 num_envs=8", "",
                   "small: 3 arms x 3 seeds = 9 runs of 4 updates"]  # fmt: skip
    assert sorted(path.name for path in place.iterdir()) == ["small.yaml"]


def test_what_has_no_effect_is_one_line_in_the_list_and_at_the_start(place, capsys):
    Path("idle.yaml").write_text("kind: q_only\nseeds: 1\nupdates: 1\nsize: 6\narms:\n  - {period: [7, 8]}\n")
    assert run("idle.yaml", "--list") == 0
    listed = capsys.readouterr()
    assert listed.out.splitlines() == ["baseline", "", "idle: 1 arm x 1 seed = 1 run of 1 update"]
    assert listed.err == "note: without effect, the same as baseline: period=7, period=8\n"
    assert run("idle.yaml") == 0 and capsys.readouterr().err == listed.err
    assert run("idle.yaml", "--report") == 0 and not capsys.readouterr().err
    many = ", ".join(map(str, range(1, 9)))
    Path("idle.yaml").write_text(f"kind: q_only\narms:\n  - {{name: slow, target: polyak}}\n"
                                 f"  - {{target: polyak, period: [{many}]}}\n")  # fmt: skip
    assert run("idle.yaml", "--list") == 0  # period=100 is the usual one, and 1 to 8 change nothing
    assert capsys.readouterr().err == "note: without effect, the same as slow: " + ", ".join(
        f"target=polyak period={n}" for n in range(1, 6)) + " and 3 more\n"  # fmt: skip


BAD = [
    (["q_stabilty"], "study 'q_stabilty' is unknown; did you mean 'q_stability'?; there are: "),
    (["none.yaml"], "none.yaml: no such file"), ([], "STUDY must be given"),
    (["small.yaml", "--arms", "lr=3"], "--arms: no arm fits 'lr=3'"),
    (["small.yaml", "--seeds", "2000"], "small: 5 arms x 2,000 seeds = 10,000 runs of 4 updates are more "
     "than 5,000; add --yes"),
    (["small.yaml", "--seeds", "-1"], "--seeds must be at least 0, not -1"),
    (["small.yaml", "--workers", "x"], "--workers must be a whole number, not 'x'"),
    (["small.yaml", "--out", "other"], "other: not the folder of a study (it holds no study.json); choose an"),
    (["small.yaml", "--out", "small.yaml"], "small.yaml: not the folder of a study"),
    (["small.yaml", "--out", "damaged"], "damaged/study.json: cannot be read as that of a study"),
    (["small.yaml", "--out", "small.yaml/x"], "--out small.yaml/x: cannot be written"),
    (["small.yaml", "--report"], "studies/small: holds no study to report on"),
    (["small.yaml", "--cache", "small.yaml/x"], "--cache small.yaml/x: cannot be written"),
    (["small.yaml", "--ray-address", "nowhere"], "--ray-address must be local, auto or HOST:PORT"),
    (["small.yaml", "--device", "cuda:99"], "device 'cuda:99' is not there"),
    (["small.yaml", "--workrs", "1"], "unknown flag '--workrs'; did you mean '--workers'?"),
    (["core.yaml"], "none.safetensors: no such file"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(place, monkeypatch, capsys, words, said):
    monkeypatch.setattr(sweep, "_import_ray", lambda: None)
    for folder, name, content in (("other", "note.txt", "mine"), ("damaged", "study.json", "{")):
        Path(folder).mkdir()
        (place / folder / name).write_text(content)
    Path("core.yaml").write_text(SMALL + "core: none.safetensors\n")
    Path("cache").mkdir()
    before = sorted(place.rglob("*"))
    words = words if "--cache" in words else [*words, "--cache", "cache"]
    assert refusal(words, monkeypatch, capsys).startswith(said)
    assert sorted(place.rglob("*")) == before


def test_the_folder_of_another_study_is_refused_by_name(place, monkeypatch, capsys):
    assert run("small.yaml", "--out", "o") == 0
    Path("other.yaml").write_text(SMALL)
    Path("wider.yaml").write_text(SMALL.replace("0.02]", "0.03]"))
    capsys.readouterr()
    said = refusal(["small.yaml", "--out", "o", "--updates", "8"], monkeypatch, capsys)
    assert said == "o: holds study 'small' with other settings (its updates is 4, here it is 8); choose another --out"
    said = refusal(["wider.yaml", "--out", "o"], monkeypatch, capsys)
    assert said.startswith("o: holds another study, 'small' (its arms are not these: 'lr=0.0")
    content = json.loads(Path("o/study.json").read_text())
    for name, value in (("format", "v9"), ("study", 3)):
        Path("o/study.json").write_text(json.dumps(content | {name: value, "identity": "x"}))
        assert refusal(["small.yaml", "--out", "o"], monkeypatch, capsys).startswith("o/study.json: ")


def test_another_core_in_a_folder_is_another_study(place, monkeypatch, capsys):
    """A run's newest checkpoint, or a checkpoint's model: what the arms begin with is hashed, not where it lies."""
    monkeypatch.setattr(ablate, "_sweep", lambda *rest: 3)  # as where it is stopped before the first run is done
    model = Path("begun/checkpoints/step-1/model.safetensors")
    model.parent.mkdir(parents=True)
    model.write_bytes(b"one core")
    Path("live.yaml").write_text("kind: train\nseeds: 1\nupdates: 4\nbaseline: {init_core: begun}\n"
                                 "arms:\n  a: {num_envs: [8]}\n")  # fmt: skip
    assert run("live.yaml", "--out", "o") == run("live.yaml", "--out", "o") == 3
    Path("begun/notes.txt").write_text("the same core")
    assert run("live.yaml", "--out", "o") == 3
    later = Path("begun/checkpoints/step-2/model.safetensors")
    later.parent.mkdir()
    later.write_bytes(b"another core")
    said = refusal(["live.yaml", "--out", "o"], monkeypatch, capsys)
    assert said.startswith("o: holds study 'live' with other settings (its begun is 5769")
    later.write_bytes(b"one core")
    assert run("live.yaml", "--out", "o") == 3
    Path("live.yaml").write_text(Path("live.yaml").read_text().replace("begun", "nowhere"))
    assert refusal(["live.yaml", "--out", "p"], monkeypatch, capsys) == "nowhere: no such file or folder"


@pytest.mark.slow
def test_two_processes_on_one_folder(place, monkeypatch, capsys):
    assert run("small.yaml", "--out", "o") == 0
    held = lock_run(Path("o"))
    capsys.readouterr()
    said = refusal(["small.yaml", "--out", "o", "--cache", "cache"], monkeypatch, capsys)
    assert said == f"o: the study is in use by a live process (pid {os.getpid()})"
    held.close()
    assert len(sweep.results_in(place / "o/runs", pytest.fail)) == 15


def test_damaged_results_are_named_and_done_again(place, capsys):
    run("small.yaml", "--out", "o")
    path = sorted((place / "o/runs").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-5])
    capsys.readouterr()
    assert run("small.yaml", "--out", "o") == 0
    said = capsys.readouterr()
    assert f"note: {path.relative_to(place)}: damaged results" in said.err and "its runs are done again" in said.err
    assert len(sweep.results_in(place / "o/runs", pytest.fail)) == 15


def test_help_in_a_process_of_its_own():
    done = subprocess.run([sys.executable, "-m", "hrm_rl.ablate", "--help"], cwd=ROOT, text=True, capture_output=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0 and "--retry_failed" in done.stdout and "q_stability" in done.stdout
