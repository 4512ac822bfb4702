"""The training command from its flags to its report, stopped and resumed, on puzzles of 4x4."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hrm_rl import checkpoint, cli, train
from hrm_rl.checkpoint import list_checkpoints, lock_run
from hrm_rl.errors import UserError
from hrm_rl.metrics import read_metrics
from hrm_rl.tasks import load_puzzles
from hrm_rl.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
SMALL = """
size: 4
num_envs: 4
max_steps: 3
augment: false
curriculum: [0, 0]
device: cpu
compile: "off"
log_every: 3
eval_every: 6
eval_puzzles: 5
checkpoint_every: 6
optim: {lr: 0.01, warmup_steps: 2, schedule: constant, ema: 0.9}
core: {hidden_size: 16, num_heads: 2, inner_multiple: 16, H_layers: 1, L_layers: 1, puzzle_emb_ndim: 16, dtype: float32}
"""


@pytest.fixture(autouse=True)
def _signals():
    """The command takes over two signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe(tmp_path):
    """A configuration file and the flags that name the data: train 16 puzzles, test 10."""
    names = {}
    for name, count in (("train", 16), ("test", 10)):
        puzzles = load_puzzles("sudoku-4", split=name, limit=count)
        lines = ["source,question,answer,rating"]
        for question, answer in zip(puzzles.questions.tolist(), puzzles.answers.tolist(), strict=True):
            digits = ["".join("." if t == 1 else str(t - 1) for t in row) for row in (question, answer)]
            lines.append(f"test,{digits[0]},{digits[1]},0")
        names[name] = tmp_path / f"{name}.csv"
        names[name].write_text("\n".join(lines) + "\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    return ["--config", str(tmp_path / "small.yaml"), "--data", str(names["train"]), "--test_data", str(names["test"]),
            "--out", str(tmp_path / "runs")]  # fmt: skip


def lines_of(run) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in read_metrics(run)]


def newest(run):
    path = list_checkpoints(run)[-1]
    return path.name, load_file(path / "model.safetensors"), load_file(path / "train.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("objective", "bootstrap"),
    [("joint", "shared_prefix"), pytest.param("joint", "next_observation", marks=pytest.mark.slow),
     ("supervised", "none")],
)  # fmt: skip
def test_run_resume_and_report(tmp_path, recipe, capsys, objective, bootstrap):
    flags = [*recipe, "--objective", objective, "--bootstrap", bootstrap]
    assert train.main([*flags, "--total-steps", "12", "--name", "straight"]) == 0
    assert train.main([*flags, "--total-steps", "6", "--name", "halves"]) == 0
    straight, halves = tmp_path / "runs" / "straight", tmp_path / "runs" / "halves"
    assert newest(halves)[0] == "step-00000006"
    assert train.main(["--resume", str(halves), "--total-steps", "12"]) == 0

    assert [line["step"] for line in lines_of(straight)] == [3, 6, 9, 12]
    assert lines_of(straight) == lines_of(halves)
    (name, model, state), (name_again, model_again, state_again) = newest(straight), newest(halves)
    assert name == name_again == "step-00000012" and same(model, model_again) and same(state, state_again)

    report = json.loads((straight / "report.json").read_text())
    assert report["puzzles"] == 10 and report["updates"] == 12 and len(report["fixed_steps"]) == 3
    assert (straight / "training.png").stat().st_size > 1000
    config = yaml.safe_load((straight / "config.yaml").read_text())
    assert config["objective"] == objective and config["core"]["hidden_size"] == 16 and config["total_steps"] == 12
    said, label = capsys.readouterr().out, "FixedAgent" if objective == "supervised" else "learned"
    assert "10 test puzzles" in said and f"{label}, at most 3" in said and "resuming" in said
    evaluated = [line for line in lines_of(straight) if "eval/exact_accuracy" in line]
    assert [line["step"] for line in evaluated] == [6, 12]


def test_a_signal_stops_and_the_run_goes_on(tmp_path, recipe, capsys, monkeypatch):
    flags = [*recipe, "--total-steps", "12"]
    assert train.main([*flags, "--name", "straight"]) == 0
    own = Trainer.update

    def interrupted(self, **keywords):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, **keywords)

    monkeypatch.setattr(Trainer, "update", interrupted)
    assert train.main([*flags, "--name", "stopped"]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    stopped, straight = tmp_path / "runs" / "stopped", tmp_path / "runs" / "straight"
    assert newest(stopped)[0] == "step-00000005" and not (stopped / "report.json").exists()
    assert f"--resume {stopped}" in capsys.readouterr().out
    assert train.main(["--resume", str(stopped)]) == 0
    assert lines_of(stopped) == lines_of(straight)
    assert same(newest(stopped)[1], newest(straight)[1]) and (stopped / "report.json").exists()


def test_report_over_more_or_fewer_segments(tmp_path, recipe):
    for steps, rows in ((5, 5), (2, 3)):
        name = f"report-{steps}"
        flags = ["--total-steps", "2", "--name", name, "--report-steps", str(steps), "--eval-every", "0"]
        assert train.main([*recipe, *flags]) == 0
        report = json.loads((tmp_path / "runs" / name / "report.json").read_text())
        assert [row["steps"] for row in report["fixed_steps"]] == list(range(1, rows + 1))
        assert report["learned_halt"][-1]["max_steps"] == 3


def test_time_budget_ends_a_run(tmp_path, recipe):
    flags = ["--total-steps", "100000", "--time-budget", "0.2", "--name", "short", "--checkpoint-every", "0"]
    assert train.main([*recipe, *flags]) == 0
    report = json.loads((tmp_path / "runs" / "short" / "report.json").read_text())
    assert 0 < report["updates"] < 2000


def test_bad_input_leaves_no_folder(tmp_path, recipe):
    wrong = ["--agent", "q", "--agent_args", '{"epsilon": 7}']
    with pytest.raises(UserError, match="epsilon"):
        train.main([*recipe, *wrong])
    with pytest.raises(UserError, match="no such|does not exist|not found|cannot be read"):
        train.main([*recipe, "--data", str(tmp_path / "nothing.csv")])
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_resumed_is_said(tmp_path, recipe):
    with pytest.raises(UserError, match="config.yaml"):
        train.main(["--resume", str(tmp_path)])
    assert train.main([*recipe, "--total-steps", "3", "--name", "done", "--eval-every", "0"]) == 0
    run = tmp_path / "runs" / "done"
    with pytest.raises(UserError, match="--total-steps"):
        train.main(["--resume", str(run)])
    with pytest.raises(UserError, match="--num_envs: a resumed run keeps"):
        train.main(["--resume", str(run), "--num-envs", "8"])
    with pytest.raises(UserError, match="exists"):
        train.main([*recipe, "--total-steps", "3", "--name", "done"])
    model = list_checkpoints(run)[-1] / "train.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(UserError, match="train.safetensors"):
        train.main(["--resume", str(run), "--total-steps", "6"])


def test_a_run_in_use_is_refused(tmp_path, recipe):
    assert train.main([*recipe, "--total-steps", "6", "--name", "one"]) == 0
    run = tmp_path / "runs" / "one"
    holder = lock_run(run)
    with pytest.raises(UserError, match=f"in use by a live process .pid {os.getpid()}"):
        train.main(["--resume", str(run), "--total-steps", "9"])
    holder.close()  # as the system does when the process dies
    assert train.main(["--resume", str(run), "--total-steps", "9"]) == 0


def test_a_full_disk_is_one_line_and_the_last_checkpoint_loads(tmp_path, recipe, monkeypatch):
    real, calls = checkpoint.save_checkpoint, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device.; the last good .*step-00000006"):
        train.main([*recipe, "--total-steps", "18", "--name", "full"])
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "runs" / "full")]) == 0


def child(words, **keywords) -> subprocess.Popen:
    """The command in a process of its own, with as many threads as every other child here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "hrm_rl.train", *words], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)  # fmt: skip


def only_line(process: subprocess.Popen) -> str:
    """The one line on stderr of a child that ends with exit code 2."""
    output, said = process.communicate(timeout=120)
    assert process.returncode == 2, output + said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path, recipe):
    """A real limit of the system on the size of files: the third checkpoint is larger than allowed."""
    flags = [*recipe, "--total-steps", "18", "--name", "limited"]
    assert train.main([*flags[:-4], "--total-steps", "6", "--name", "limited"]) == 0
    run = tmp_path / "runs" / "limited"
    most = max(file.stat().st_size for file in list_checkpoints(run)[-1].iterdir()) - 1

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    said = only_line(child(["--resume", str(run), "--total-steps", "18"], preexec_fn=limit))
    assert "cannot be written (File too large); the last good checkpoint is" in said and "step-00000006" in said
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000006"]
    assert train.main(["--resume", str(run), "--total-steps", "18"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("checkpoint_every", [pytest.param(6, id="checkpoint"), pytest.param(0, id="metrics")])
def test_a_disk_that_is_full(tmp_path, recipe, checkpoint_every):
    """A small tmpfs: one line, whoever meets its end (a checkpoint, metrics.jsonl, TensorBoard's thread)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        flags = ["--out", str(disk), "--name", "full", "--log-every", "1", "--eval-every", "0"]
        (disk / "filler").write_bytes(bytes(700 * 1024))
        process = child([*recipe, *flags, "--total-steps", "100000", "--checkpoint-every", str(checkpoint_every)])
        said = only_line(process)
        assert f"{disk / 'full'}: cannot be written (No space left on device); the last good checkpoint is" in said
        saved = list_checkpoints(disk / "full")
        assert (str(saved[-1]) if saved else "none yet") in said and bool(saved) == bool(checkpoint_every)
        (disk / "filler").unlink()
        if saved:
            tensors, state = checkpoint.load_checkpoint(saved[-1])
            more = ["--resume", str(disk / "full"), "--total-steps", str(state["step"] + 1)]
            assert train.main(more) == 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_damaged_checkpoint_names_the_one_before(tmp_path, recipe):
    flags = [*recipe, "--name", "hurt", "--checkpoint-every", "6", "--eval-every", "0"]
    assert train.main([*flags, "--total-steps", "12"]) == 0
    assert train.main([*flags, "--total-steps", "18", "--name", "straight"]) == 0
    run = tmp_path / "runs" / "hurt"
    before, last = list_checkpoints(run)
    file = last / "train.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    more = ["--total-steps", "18"]
    with pytest.raises(UserError, match=f"{file}: damaged .*; go on from the one before: --resume {before}$"):
        train.main(["--resume", str(run), *more])
    assert train.main(["--resume", str(before), *more]) == 0
    assert (run / "checkpoints" / "aside-step-00000012").is_dir()  # set aside, not deleted
    assert [path.name for path in list_checkpoints(run)] == ["step-00000012", "step-00000018"]
    straight = tmp_path / "runs" / "straight"
    assert lines_of(run) == lines_of(straight) and same(newest(run)[1], newest(straight)[1])
    for path in list_checkpoints(run):
        (path / "train.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no other checkpoint of the run is whole"):
        train.main(["--resume", str(run), "--total-steps", "24"])


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_data_file_that_changed_is_noticed(tmp_path, recipe, name):
    assert train.main([*recipe, "--total-steps", "6", "--name", "run"]) == 0
    file = tmp_path / f"{name}.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")  # the same puzzles in another order
    with pytest.raises(UserError, match=f"{name}.csv: the puzzles are not those the run was started with"):
        train.main(["--resume", str(tmp_path / "runs" / "run"), "--total-steps", "9"])
    file.write_text("\n".join(lines) + "\n")
    assert train.main(["--resume", str(tmp_path / "runs" / "run"), "--total-steps", "9"]) == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_named_at_its_update(tmp_path, recipe, monkeypatch, where):
    """At an update that is not logged; the weights that are saved are those of before."""
    own = Trainer._losses

    def spoilt(self, slots, transition):
        losses, q = own(self, slots, transition)
        if self.step == 7 and where == "loss":
            losses["loss/supervised"] = losses["loss/supervised"] * float("nan")
        if self.step == 7 and where == "gradient":
            losses["loss/total"].register_hook(lambda gradient: gradient * float("inf"))
        return losses, q

    monkeypatch.setattr(Trainer, "_losses", spoilt)
    term = {"loss": "loss/supervised", "gradient": "grad/core_other"}[where]
    last = tmp_path / "runs" / "nan" / "checkpoints" / "step-00000006"
    with pytest.raises(UserError, match=f"update 8: {term} is not finite; the last good checkpoint is {last}"):
        train.main([*recipe, "--total-steps", "12", "--name", "nan"])
    monkeypatch.undo()
    assert train.main(["--resume", str(last)]) == 0


def test_an_unknown_environment_names_the_nearest(recipe):
    with pytest.raises(UserError, match="did you mean 'SudokuHalt-v0'"):
        train.main([*recipe, "--env", "SudokuHallt-v0"])


@pytest.mark.slow
def test_kill_nine_at_twenty_random_moments(tmp_path, recipe):
    """A run that is killed again and again and resumed gives the metrics of one that never stopped.

    A kill comes within the computing time of 12 updates after a new checkpoint, or of 24 after training began, so
    that 20 do not see the end of the run.
    """
    flags = [*recipe, "--total-steps", "600", "--checkpoint-every", "5", "--eval-every", "0"]
    run, chance, kills, seen = tmp_path / "runs" / "killed", random.Random(4), 0, set()
    straight = child([*flags, "--name", "straight"])
    assert straight.wait(timeout=300) == 0, straight.stderr.read()
    spent = json.loads((tmp_path / "runs" / "straight" / "report.json").read_text())["training_seconds"]
    while True:
        started = run / "config.yaml"
        words = ["--resume", str(run)] if list_checkpoints(run) else [*flags, "--name", "killed"]
        if words[0] != "--resume" and run.exists():
            shutil.rmtree(run)  # killed before its first checkpoint
        process = child(words)
        if kills < 20:
            for line in process.stdout:  # wait until it trains, then a moment more
                if line.startswith(("run folder", "resuming")):
                    break
            before, until = list_checkpoints(run), time.monotonic() + 60
            anywhere = kills % 3 == 2
            while not anywhere and list_checkpoints(run) == before and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(chance.random() * spent / 600 * (24 if anywhere else 12))
            process.kill()
            process.wait()
            kills += 1
            seen |= set(list_checkpoints(run)[-1:])
            assert started.exists()
            continue
        output = process.communicate(timeout=300)
        assert process.returncode == 0, output
        break
    assert len(seen) >= 12  # most of them came after progress
    assert lines_of(run) == lines_of(tmp_path / "runs" / "straight")
    ours, straight = newest(run), newest(tmp_path / "runs" / "straight")
    assert ours[0] == straight[0] and same(ours[1], straight[1])


def gone(monkeypatch, name: str) -> None:
    """sys.stdout or sys.stderr as a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))


@pytest.mark.parametrize("names", [("stdout",), ("stdout", "stderr")])
def test_a_reader_that_has_left_does_not_end_the_run(recipe, tmp_path, monkeypatch, capsys, names):
    monkeypatch.setattr(sys, "argv", ["train", *recipe, "--total-steps", "6", "--name", "whole"])
    for name in names:
        gone(monkeypatch, name)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    assert stop.value.code == 0 and not capsys.readouterr().err
    assert {"report.json", "training.png"} <= {path.name for path in (tmp_path / "runs" / "whole").iterdir()}
    for name in names:
        getattr(sys, name).close()  # nothing is left that could not be written


def test_a_mistake_keeps_its_exit_code_without_a_reader(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--nothing", "1"])
    gone(monkeypatch, "stderr")
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    assert stop.value.code == 2


@pytest.mark.slow
def test_head_ends_a_command_without_a_word(recipe, tmp_path):
    words = f"{' '.join(recipe)} --total-steps 6 --name piped"
    shell = f"{sys.executable} -m hrm_rl.train {words} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.stdout.splitlines()[1:] == ["0"] and not done.stderr, done.stderr
    assert (tmp_path / "runs" / "piped" / "report.json").is_file()
