"""Live runs of a study: measured on the way, gone on with after a stop, diverged as a result."""

from __future__ import annotations

import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from hrm_rl.checkpoint import list_checkpoints
from hrm_rl.errors import NonFiniteError, UserError
from hrm_rl.metrics import read_metrics
from hrm_rl.study import joint, spec
from hrm_rl.study.results import save_results
from hrm_rl.trainer import Trainer

YAML = """kind: {kind}
seeds: 2
updates: 9
checkpoints: 3
puzzles: {{probe: {{count: 12}}}}
baseline:
  size: 4
  max_steps: 3
  num_envs: 4
  compile: "off"
  eval_puzzles: 8
  test_limit: 16
  core: {{hidden_size: 16, num_heads: 2, inner_multiple: 16, puzzle_emb_ndim: 16, H_layers: 1, L_layers: 1,
         dtype: float32}}
arms:
  a: {{objective: supervised, agent: fixed, agent_args: {{k: 2}}}}
  wild: {{name: wild, optim: {{lr: 1.0}}}}
"""


@pytest.fixture
def seen(monkeypatch) -> list:
    """What stands in for the measures of live runs was handed as `previous`, call by call."""
    calls = []

    def measure_live(trainer, puzzles, previous):
        calls.append((trainer.step, None if previous is None else float(previous.flatten()[0])))
        metrics, by_step, right, steps = joint.measure_halting(trainer, puzzles)
        weight = sum(p.detach().abs().sum().item() for p in trainer.core.parameters())
        marked = torch.full((3, len(puzzles), 2), float(trainer.step))
        return metrics | {"weight": weight}, by_step, marked, right, steps

    module = types.ModuleType("hrm_rl.study.live_measures")
    module.measure_live = measure_live
    monkeypatch.setitem(sys.modules, "hrm_rl.study.live_measures", module)
    return calls


def study(folder: Path, kind: str = "joint") -> spec.Study:
    (folder / "s.yaml").write_text(YAML.format(kind=kind))
    return spec.load_study(folder / "s.yaml")


def do(held: spec.Study, out: Path, arm: str, seed: int = 0, again=()):
    (task,) = joint.tasks(held, [(arm, seed)], out, "cpu", again)
    (result,) = joint.run(**task.arguments)
    assert (result.arm, result.seed) == (arm, seed) and task.file == f"{joint.run_name(arm, seed)}/result.safetensors"
    return result


def test_a_run_is_measured_and_lies_in_its_own_folder(tmp_path, seen, capsys):
    held, handler = study(tmp_path), signal.getsignal(signal.SIGTERM)
    result = do(held, tmp_path / "o", "baseline")
    assert signal.getsignal(signal.SIGTERM) is handler  # the sweep's
    assert result.status == "finished" and result.updates.tolist() == [0, 3, 6, 9]
    assert {"accuracy", "mean_steps", "regret", "weight"} == set(result.metrics)
    assert all(len(series) == 4 for series in result.metrics.values())
    assert result.by_step["accuracy"].shape == (4, 3) and result.right.shape == result.steps.shape == (12,)
    assert float(result.right.double().mean()) == result.final("accuracy")
    assert len(set(result.metrics["weight"].tolist())) == 4  # it learned
    assert seen[:4] == [(0, None), (3, 0.0), (6, 3.0), (9, 6.0)]
    folder = tmp_path / "o/runs/baseline-s0"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "measures"} <= {path.name for path in folder.iterdir()}
    assert "report.json" not in {path.name for path in folder.iterdir()} and capsys.readouterr().out == ""
    assert [line["step"] for line in read_metrics(folder)] == [3, 6, 9]
    other = do(held, tmp_path / "o", "objective=supervised agent=fixed k=2", 1)
    assert other.changes == {"objective": "supervised", "agent": "fixed", "agent_args.k": 2}
    assert other.steps.tolist() == [2] * 12 and other.puzzles != result.puzzles
    save_results(tmp_path / "r.safetensors", [result, other])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [4, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 8))])
def test_one_that_was_stopped_ends_as_if_it_was_not(tmp_path, seen, monkeypatch, at):
    held = study(tmp_path)
    whole = do(held, tmp_path / "whole", "baseline")
    own = Trainer.update

    def update(self, *arguments, **keywords):
        if self.step == at:
            raise Killed
        return own(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(Killed):
        do(held, tmp_path / "cut", "baseline")
    monkeypatch.setattr(Trainer, "update", own)
    seen.clear()
    again = do(held, tmp_path / "cut", "baseline")
    assert seen[0][0] == {1: 0, 4: 6, 8: 9}[at]  # from the start, or after the newest checkpoint
    for name, series in whole.metrics.items():
        assert torch.equal(series, again.metrics[name]), name
    assert torch.equal(whole.right, again.right) and torch.equal(whole.steps, again.steps)
    assert whole.puzzles == again.puzzles and torch.equal(whole.updates, again.updates)


def test_a_damaged_checkpoint_and_a_retry_begin_anew(tmp_path, seen):
    held = study(tmp_path)
    whole = do(held, tmp_path, "baseline")
    for path in list_checkpoints(tmp_path / "runs/baseline-s0"):
        (path / "state.json").write_text("{")
    for again in ((), {("baseline", 0)}):
        seen.clear()
        redone = do(held, tmp_path, "baseline", again=again)
        assert seen[0] == (0, None) and torch.equal(whole.metrics["weight"], redone.metrics["weight"])
    seen.clear()
    done = do(held, tmp_path, "baseline")  # killed between its end and its result: only the end is measured again
    assert seen[0] == (9, 6.0) and torch.equal(whole.metrics["weight"], done.metrics["weight"])


def test_a_loss_that_is_not_finite_is_a_result(tmp_path, seen, monkeypatch):
    own = Trainer.update

    def update(self, *arguments, **keywords):
        if self.step == 4:
            raise NonFiniteError("update 5: loss/total is nan")
        return own(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "update", update)
    result = do(study(tmp_path), tmp_path, "wild")
    assert (result.status, result.reason) == ("diverged", "update 5: loss/total is nan")
    assert result.updates.tolist() == [0, 3] and len(result.metrics["weight"]) == 2
    assert result.right is None and result.changes == {"optim.lr": 1.0}


def test_an_agent_that_meets_the_nan_first_is_a_result_too(tmp_path, seen, monkeypatch):
    """By the type of the error: the same words of another one are the failure they are."""
    own = Trainer.update

    def update(self, *arguments, **keywords):
        if self.step == 4:
            torch.nn.init.constant_(self.agent.q_head.weight, float("nan"))
        return own(self, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "update", update)
    result = do(study(tmp_path), tmp_path, "wild")
    assert result.status == "diverged" and result.updates.tolist() == [0, 3] and result.right is None
    assert result.reason == "agent QHaltingAgent, update 5: score() must return numbers, but there is a NaN in it"

    def other(self, *arguments, **keywords):
        raise UserError("agent QHaltingAgent, update 1: there is a NaN in it")

    monkeypatch.setattr(Trainer, "update", other)
    with pytest.raises(UserError, match="update 1"):
        do(study(tmp_path), tmp_path, "baseline")


@pytest.mark.slow
def test_the_whole_recipe_is_reported(tmp_path):
    result = do(study(tmp_path, "train"), tmp_path, "baseline")
    assert result.status == "finished" and result.updates.tolist() == [0, 3, 6, 9]
    folder = tmp_path / "runs/baseline-s0"
    assert (folder / "report.json").is_file() and (folder / "training.png").is_file()


def test_no_two_arms_share_a_folder():
    names = ["a b", "a_b", "a/b", "a=1 b=2", "x" * 300, "x" * 301, "..", "ä"]
    folders = [joint.run_name(name, 0) for name in names]
    assert len(set(folders)) == len(names)
    assert all(len(name) < 200 and name.isprintable() and "/" not in name and name[0] != "." for name in folders)
