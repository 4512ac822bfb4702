"""One run on several ranks: the numbers of one process, checkpoints for any number, a rank that dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from split_runs import BAD_UPDATE, CASES, run, unsound

from hrm_rl import train
from hrm_rl.checkpoint import list_checkpoints
from hrm_rl.errors import UserError
from hrm_rl.metrics import Sums, read_metrics
from hrm_rl.parallel import ALONE, RankLostError, Ranks, _saying_who_is_lost, joined

ROOT = Path(__file__).resolve().parents[1]
SPLIT_RUNS = Path(__file__).parent / "support" / "split_runs.py"
SMALL = """
size: 4
train_limit: 16
test_limit: 10
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
optim: {optimizer: adamw, eps: 0.001, lr: 0.01, warmup_steps: 2, schedule: constant, ema: 0.9}
core: {hidden_size: 16, num_heads: 2, inner_multiple: 16, H_layers: 1, L_layers: 1, puzzle_emb_ndim: 16, dtype: float32}
"""


def start(*words: str) -> subprocess.Popen:
    """Two ranks by torchrun on a free port, a thread for each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    paths = os.pathsep.join([str(ROOT), str(SPLIT_RUNS.parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        end(process)
    return process.returncode, said


def end(process: subprocess.Popen) -> None:
    """With its ranks, which torchrun ends when it is told to end."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)  # more than the ranks are given
    process.kill()


def close(got, wanted, rtol: float = 1e-4, atol: float = 1e-6) -> bool:
    got, wanted = torch.tensor(got, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    return got.shape == wanted.shape and torch.allclose(got, wanted, rtol, atol)


# --- without a second process -------------------------------------------------------------------------------


def test_one_process_is_alone(monkeypatch):
    rows = torch.arange(6).view(3, 2)
    assert ALONE.first and ALONE.share(7) == 7 and ALONE.speaks() and ALONE.told("run", "here") == "here"
    assert ALONE.total([1.0, 2.0]) == ALONE.largest([1.0, 2.0]) == [1.0, 2.0]
    assert ALONE.gather(rows) is rows and ALONE.rows(rows) is rows
    assert ALONE.averaging([torch.nn.Parameter(rows.float())], True) is None
    assert ALONE.device("cpu") == torch.device("cpu")
    with joined() as ranks:
        assert ranks is ALONE
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    with joined() as ranks:
        assert ranks is ALONE


def test_slots_are_split_evenly_or_not_at_all():
    assert [Ranks(r, 4).share(12) for r in range(4)] == [3] * 4
    with pytest.raises(UserError, match="num_envs=6 cannot be split evenly over 4 ranks"):
        Ranks(0, 4).share(6)
    rows = torch.arange(24).view(12, 2)
    assert torch.equal(torch.cat([Ranks(r, 4).rows(rows) for r in range(4)]), rows)


def test_loaded_sums_count_once():
    first, second = (Sums(torch.device("cpu"), Ranks(r, 2)) for r in range(2))
    for sums in (first, second):
        sums.load({"a": torch.tensor(3.0)})
        sums.add("a", torch.tensor(1.0))
        sums.add_mean("m", torch.tensor(1.0))
    assert [float(sums.values["a"]) for sums in (first, second)] == [4, 1]
    assert float(first.values["m"] + second.values["m"]) == 1


def test_only_what_another_rank_caused_is_called_lost():
    with pytest.raises(RankLostError), _saying_who_is_lost():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="shapes"), _saying_who_is_lost():
        raise RuntimeError("shapes do not fit")


# --- two ranks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("split") / "seen.json"
    code, said = finish(start(str(SPLIT_RUNS), str(out)))
    assert code == 0, said
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "unsplit"])
def test_two_ranks_give_the_numbers_of_one(by_two, case):
    got, wanted = by_two[case], run(case, ALONE)
    assert got["shapes"] == wanted["shapes"]
    rtol = 1e-3 if case == "muon" else 1e-4  # Muon orthogonalises in bfloat16, where rounding weighs more
    for one, other in zip(got["lines"], wanted["lines"], strict=True):
        assert list(one) == list(other)
        assert close(list(one.values()), list(other.values()), rtol), (one, other)
    for name, values in wanted["state"].items():
        assert close(got["state"][name], values, rtol, atol=rtol), name
    for name in ("slots.key", "slots.puzzle", "slots.episode", "slots.steps"):  # who has which slot, exactly
        assert got["state"][name] == wanted["state"][name]
    assert len(set(got["state"]["slots.key"])) == 4


@pytest.mark.slow
def test_ranks_with_the_same_slots_give_other_numbers(by_two):
    got, wanted = by_two["unsplit"], run("unsplit", ALONE)
    assert len(set(got["state"]["slots.key"])) == 2
    values, others = ([line["loss/total"] for line in lines] for lines in (got["lines"], wanted["lines"]))
    assert not close(values, others, rtol=1e-2)


@pytest.mark.slow
def test_ranks_agree_on_what_is_wrong(by_two):
    assert by_two["unsound"] == unsound(ALONE) == f"update {BAD_UPDATE}: loss/b is not finite"
    assert by_two["unsound_ranks"] == 2
    assert by_two["speakers"] == 1 and by_two["word"] == "of rank 0"


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """Flags of a small run; the command takes over two signals, which are given back."""
    (tmp_path / "small.yaml").write_text(SMALL)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield ["--config", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "runs")]
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(recipe, *flags: str) -> subprocess.Popen:
    return start("-m", "hrm_rl.train", *recipe, *flags)


def lines_of(folder: Path) -> list[dict]:
    """The metrics that are the same for any number of ranks."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in read_metrics(folder)]


def newest(folder: Path) -> tuple[str, dict, dict]:
    path = list_checkpoints(folder)[-1]
    return path.name, load_file(path / "model.safetensors"), load_file(path / "train.safetensors")


@pytest.mark.slow
def test_two_then_one_then_two(tmp_path, recipe):
    assert train.main([*recipe, "--total-steps", "12", "--name", "straight"]) == 0
    code, said = finish(begin(recipe, "--total-steps", "5", "--name", "parts"))
    assert code == 0 and said.count("10 test puzzles (") == 2 and "2 ranks of 2" in said, said
    straight, parts = tmp_path / "runs" / "straight", tmp_path / "runs" / "parts"
    assert train.main(["--resume", str(parts), "--total-steps", "8"]) == 0
    code, said = finish(start("-m", "hrm_rl.train", "--resume", str(parts), "--total-steps", "12"))
    assert code == 0 and said.count("resuming") == 1, said

    assert [line["step"] for line in lines_of(parts)] == [3, 5, 6, 8, 9, 12]
    wanted = {line["step"]: line for line in lines_of(straight)}
    for line in lines_of(parts):
        if line["step"] in (3, 12):  # the others follow a line that a run in one piece does not write
            other = wanted[line["step"]]
            assert line.keys() == other.keys()
            assert close(list(line.values()), list(other.values())), (line, other)
    (name, model, state), (name_again, model_again, state_again) = newest(straight), newest(parts)
    assert name == name_again and state.keys() == state_again.keys()
    for tensors, others in ((model, model_again), (state, state_again)):
        for key, value in tensors.items():
            assert value.dtype == others[key].dtype
            assert torch.allclose(value.double(), others[key].double(), 1e-4, 1e-5), key
    reports = [json.loads((run / "report.json").read_text()) for run in (straight, parts)]
    one, other = ([row["exact_accuracy"] for row in report["fixed_steps"]] for report in reports)
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path, recipe, rank):
    process = begin(recipe, "--total-steps", "100000", "--name", "killed", "--eval-every", "0")
    killed = tmp_path / "runs" / "killed"
    _wait_for_update(process, killed, 6)
    os.kill(_pid_of(process, rank), signal.SIGKILL)
    code, said = finish(process, 60)
    assert code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "another rank of the run has died" in line
    assert f"checkpoint is {killed}/checkpoints/step-" in line
    assert line.endswith(f"torchrun --nproc-per-node 2 -m hrm_rl.train --resume {killed}")
    step = int(list_checkpoints(killed)[-1].name.removeprefix("step-"))
    assert train.main(["--resume", str(killed), "--total-steps", str(step + 3)]) == 0


def test_a_signal_that_comes_while_the_ranks_agree_counts_the_next_time():
    """The rank that it comes to has said already that it goes on, so it must go on with the others."""
    class Agreeing(Ranks):
        def largest(self, numbers):
            session.stop_signal = signal.SIGTERM  # as the handler does, once the collective returns to Python
            return list(numbers)

    session, trainer = SimpleNamespace(ranks=Agreeing(1, 2, 1, None), stop_signal=None), SimpleNamespace(elapsed=2.0)
    assert train._Session._agree(session, trainer) == 0
    assert train._Session._agree(session, trainer) == signal.SIGTERM
    session.ranks = ALONE
    assert train._Session._agree(session, trainer) == signal.SIGTERM
    session.stop_signal = None
    assert train._Session._agree(session, trainer) == 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_update(tmp_path, recipe):
    process = begin(recipe, "--total-steps", "100000", "--name", "stopped", "--eval-every", "0")
    stopped = tmp_path / "runs" / "stopped"
    _wait_for_update(process, stopped, 0)
    os.kill(_pid_of(process, 1), signal.SIGTERM)
    code, said = finish(process, 60)
    assert code != 0 and said.count("SIGTERM: saved at update") == 1 and "error:" not in said
    step = int(list_checkpoints(stopped)[-1].name.removeprefix("step-"))
    assert f"saved at update {step}." in said
    assert train.main(["--resume", str(stopped), "--total-steps", str(step + 3)]) == 0


@pytest.mark.slow
def test_what_all_ranks_find_wrong_is_said_once(tmp_path, recipe):
    code, said = finish(begin(recipe, "--num-envs", "5"))
    assert code != 0 and not (tmp_path / "runs").exists()
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        "error: num_envs=5 cannot be split evenly over 2 ranks; choose a multiple of it"
    ]


def _wait_for_update(process: subprocess.Popen, run_folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        found = list_checkpoints(run_folder)
        if found and int(found[-1].name.removeprefix("step-")) >= step:
            return
        time.sleep(0.05)
    end(process)
    raise AssertionError(f"no checkpoint of update {step} within a minute")


def _pid_of(process: subprocess.Popen, rank: int) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, children):
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"no process of rank {rank} among {children}")
