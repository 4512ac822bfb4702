"""The sweep: failures are results, nothing that is finished is lost, workers end with their owner."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import study_stand_ins
import torch
from hrm_testing import ROOT

from hrm_rl.errors import UserError
from hrm_rl.study import sweep
from hrm_rl.study.results import load_results, save_results
from hrm_rl.study.sweep import Here, Pool, Task, Told

SUPPORT = str(ROOT / "tests" / "support")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Workers import the tasks of these tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((SUPPORT, str(ROOT))))


def task(*runs, function: str = "work", **arguments) -> Task:
    runs = tuple((arm, seed) for arm, seed in runs)
    name = "-".join(f"{arm}{seed}" for arm, seed in runs)
    return Task(f"study_stand_ins:{function}", {"runs": list(runs), **arguments}, runs, f"{name}.safetensors",
                len(runs), {arm: {"lr": 1.0} for arm, _ in runs})  # fmt: skip


def do(tasks, workers, folder: Path):
    told = Told(tasks, sum(len(t.runs) for t in tasks), [], lambda run: run.arm == "wild")
    try:
        sweep.sweep(tasks, workers, folder / "runs", told)
    finally:
        workers.close()
        told.close()
    return sweep.results_in(folder / "runs", pytest.fail), told


def test_what_fails_is_a_result_with_its_reason(tmp_path, capsys):
    tasks = [task(("a", 0)), task(("b", 0), told="raise"), task(("c", 0), told="memory"),
             task(("d", 0), ("d", 1), told="wrong"), task(("wild", 0))]  # fmt: skip
    found, told = do(tasks, Here(), tmp_path)
    assert found["a", 0].status == "finished" and torch.equal(found["a", 0].right, study_stand_ins.result("a", 0).right)
    assert (found["b", 0].status, found["b", 0].reason) == ("failed", "RuntimeError: told to fail")
    assert found["b", 0].changes == {"lr": 1.0} and found["c", 0].reason == "out of memory"
    assert found["d", 1].status == "failed" and "other runs than it was asked for" in found["d", 1].reason
    assert (told.finished, told.failed, told.unstable) == (6, 4, 1)
    log = (tmp_path / "failures.log").read_text()
    assert "Traceback" in log and "told to" in log
    out = capsys.readouterr().out
    assert re.search(r"runs 6/6  failed 4  unstable 1  learner-updates/s [\d,]+  0:00 left", out)


def test_a_batch_that_fails_is_tried_in_halves(tmp_path):
    def part(runs) -> Task:
        told = {"told": "raise"} if ("b", 2) in runs else {}
        file = f"{len(runs)}{runs[0][1]}.safetensors"
        return Task("study_stand_ins:work", {"runs": list(runs), **told}, tuple(runs), file, len(runs), {},
                    lambda task: sweep.halves(task, part))  # fmt: skip

    found, told = do([part([("b", seed) for seed in range(7)])], Here(), tmp_path)
    assert {run: result.status for run, result in found.items() if result.status != "finished"} == {("b", 2): "failed"}
    assert len(found) == 7 and told.finished == 7 and told.done_updates == pytest.approx(7)


def test_results_of_two_tries_and_damaged_files(tmp_path):
    runs = tmp_path / "runs"
    save_results(runs / "a.safetensors", [study_stand_ins.result("a", 0)])
    save_results(runs / "b.safetensors", sweep.failed(task(("a", 0), ("c", 0)), "first try"))
    (runs / "cut.safetensors").write_bytes((runs / "a.safetensors").read_bytes()[:-9])
    (runs / "x-s0").mkdir()
    (runs / "x-s0" / "model.safetensors").write_bytes(b"not ours")
    save_results(runs / "x-s0" / "result.safetensors", [study_stand_ins.result("x", 0)])
    (runs / ".a.safetensors.123").write_bytes(b"half")
    said = []
    found = sweep.results_in(runs, said.append)
    assert set(found) == {("a", 0), ("c", 0), ("x", 0)} and found["a", 0].status == "finished"
    assert len(said) == 1 and "cut.safetensors: damaged" in said[0]
    sweep.clear_staging(runs)
    assert not (runs / ".a.safetensors.123").exists() and (runs / "a.safetensors").exists()


def test_runs_that_share_a_tensor_are_saved(tmp_path):
    import dataclasses

    one = study_stand_ins.result("a", 0)
    save_results(tmp_path / "a.safetensors", [one, dataclasses.replace(one, seed=1)])
    assert [run.seed for run in load_results(tmp_path / "a.safetensors")] == [0, 1]


def test_a_full_disk_is_told_and_stops(tmp_path, monkeypatch):
    def full(path, results):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep, "save_results", full)
    with pytest.raises(OSError, match="No space left"):
        do([task(("a", 0))], Here(), tmp_path)


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_only_its_own_task_along(tmp_path):
    tasks = [task(("k", 0), told="kill"), *(task(("a", seed), seconds=0.3) for seed in range(3)),
             task(("e", 0), told="exit"), task(("a", 3)), task(("p", 0), function="pid")]  # fmt: skip
    workers = Pool(2, 1)
    assert workers.words == "2 processes of 1 thread"
    found, told = do(tasks, workers, tmp_path)
    died = "its process was killed (by the system, where memory ran out)"
    assert [found[run].reason for run in (("k", 0), ("e", 0))] == [died, died]
    assert [found["a", seed].status for seed in range(4)] == ["finished"] * 4 and told.failed == 2
    where, threads = map(int, found["p", 0].reason.split())
    assert where != os.getpid() and threads == 1


SCRIPT = """
import sys, random
from pathlib import Path
import study_stand_ins
from hrm_rl.study import sweep

if __name__ == "__main__":
    out = Path(sys.argv[1])
    there = sweep.results_in(out, print)
    sweep.clear_staging(out)
    runs = [(arm, seed) for arm in "ab" for seed in range(6)]
    tasks = [sweep.Task("study_stand_ins:work", {"runs": [run], "seconds": 0.15}, (run,),
                        f"{run[0]}{run[1]}.safetensors", 1.0) for run in runs if run not in there]
    workers = sweep.Pool(2, 1) if sys.argv[2] == "pool" else sweep.Here()
    print("left", len(tasks), flush=True)
    try:
        with sweep.stopping():
            sweep.sweep(tasks, workers, out, sweep.Told(tasks, 12, there.values(), lambda run: False))
    except sweep.Stopped as stopped:
        workers.close()
        sys.exit(128 + stopped.number)
    workers.close()
"""


def start(tmp_path: Path, kind: str) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "runs"), kind]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def whole(folder: Path) -> set[str]:
    """The names of result files, each of which must be whole."""
    return {path.name for path in folder.glob("*.safetensors") if load_results(path)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["here", "pool"])
def test_killed_at_any_moment_and_resumed_it_equals_one_that_was_not(tmp_path, kind):
    draw, seen, kills = random.Random(kind), set(), 0
    for attempt in range(30):
        process = start(tmp_path, kind)
        process.stdout.readline()  # "left N": it is about to begin
        until = time.monotonic() + 60
        while attempt % 3 and process.poll() is None and whole(tmp_path / "runs") == seen and time.monotonic() < until:
            time.sleep(0.01)  # until something new is there; every third one is killed while it begins
        try:
            process.communicate(timeout=draw.uniform(0.0, 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        now = whole(tmp_path / "runs")
        assert seen <= now, "a finished run was lost"
        seen = now
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills > 1 and len(seen) == 12
    found = sweep.results_in(tmp_path / "runs", pytest.fail)
    for (arm, seed), result in found.items():
        want = study_stand_ins.result(arm, seed)
        assert torch.equal(result.right, want.right)
        assert torch.equal(result.metrics["accuracy"], want.metrics["accuracy"])


@pytest.mark.slow
def test_nothing_is_said_at_the_end(tmp_path):
    """Of a lock of a worker's progress bar, say, that the worker leaves behind."""
    output, errors = start(tmp_path, "pool").communicate(timeout=100)
    assert "runs 12/12" in output and errors == ""


def children(pid: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_stop_it_at_once_and_no_worker_is_left(tmp_path, number):
    process = start(tmp_path, "pool")
    process.stdout.readline()
    until = time.monotonic() + 60
    while not whole(tmp_path / "runs") and time.monotonic() < until:
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in errors and (number == signal.SIGKILL or "leaked" not in errors)
    until = time.monotonic() + 60
    while any(is_running(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that ended and that nobody has waited for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_ray_of_two_workers(tmp_path, capfd):
    pytest.importorskip("ray")
    tasks = [task(("p", 0), function="pid"), *(task(("a", seed)) for seed in range(3)), task(("b", 0), told="raise"),
             task(("k", 0), told="kill")]  # fmt: skip
    workers = sweep.RayWorkers("local", 2, 1)
    temporary = Path(workers.temporary.name)
    assert workers.words == "Ray (local): 2 workers of 1 thread"
    found, told = do(tasks, workers, tmp_path)
    assert [found["a", seed].status for seed in range(3)] == ["finished"] * 3
    assert torch.equal(found["a", 1].right, study_stand_ins.result("a", 1).right)
    assert found["b", 0].reason == "RuntimeError: told to fail" and "Ray worker died" in found["k", 0].reason
    where, threads = map(int, found["p", 0].reason.split())
    assert where != os.getpid() and threads == 1 and told.finished == 6
    assert not temporary.exists()
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert not [line for line in said if "(raylet)" not in line]  # Ray tells of the worker that died


@pytest.mark.parametrize(
    ("address", "said"),
    [("nowhere", "must be local, auto or HOST:PORT, not 'nowhere'"), ("a:99999", "must be local, auto or HOST:PORT"),
     ("127.0.0.1:1", "--ray-address 127.0.0.1:1: nothing answers there (Connection refused)")],
)  # fmt: skip
def test_a_ray_that_is_not_there_is_one_line(address, said, monkeypatch):
    monkeypatch.setattr(sweep, "_import_ray", lambda: None)
    with pytest.raises(UserError) as error:
        sweep.RayWorkers(address, 2, 1)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_ray_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'Ray is not installed; pip install "hrm_rl\[ray\]"'):
        sweep.RayWorkers("local", 2, 1)


def test_ray_that_never_answers_is_given_up(monkeypatch, capsys):
    class Deaf:
        @staticmethod
        def init(**keywords):
            time.sleep(60)

    monkeypatch.setattr(sweep, "_import_ray", lambda: Deaf)
    monkeypatch.setattr(sweep, "CONNECT_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(UserError, match="--ray-address auto: Ray does not answer within 0.1 seconds"):
        sweep.RayWorkers("auto", 2, 1)
    assert time.monotonic() - began < 3
    print("it can be told", file=sys.stderr)
    assert capsys.readouterr().err == "it can be told\n"
