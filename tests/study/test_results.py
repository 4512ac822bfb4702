"""Results of a study on disk: what is written is read back, and a damaged file is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agents.arm import Arm
from hrm_rl.errors import UserError
from hrm_rl.study.results import RunResult, load_results, save_results


def _runs() -> list[RunResult]:
    full = RunResult(
        "standard", 3, "finished", seconds=1.5, updates=torch.tensor([0, 10]),
        metrics={"accuracy": torch.tensor([0.1, 0.9]).double(), "auroc": torch.tensor([float("nan"), 0.5]).double()},
        by_step={"bias_halt": torch.zeros(2, 4).double()}, right=torch.tensor([True, False]),
        steps=torch.tensor([1, 4]), puzzles="ab", changes={"lr": 0.1},
    )  # fmt: skip
    return [full, RunResult("wild", 0, "failed", "no memory")]


def test_only_true_is_live(tmp_path):
    """Else a run on a recording is judged by what is asked of live runs, and part of its instability is not seen."""
    path = tmp_path / "a.safetensors"
    for said, wanted in ((True, True), (False, False), ({"lr": 0.1}, False)):
        save_results(path, [replace(_runs()[0], live=said)])
        assert load_results(path)[0].live is wanted
    with pytest.raises(TypeError):
        RunResult("a", 0, "finished", "", 0.0, torch.zeros(0), {}, {}, None, None, "", {}, {"lr": 0.1})


def test_round_trip(tmp_path):
    path = tmp_path / "a" / "b.safetensors"
    save_results(path, _runs())
    full, failed = load_results(path)
    want = _runs()[0]
    assert (full.arm, full.seed, full.status, full.seconds) == ("standard", 3, "finished", 1.5)
    assert full.changes == {"lr": 0.1}
    assert torch.equal(full.updates, want.updates) and torch.equal(full.right, want.right)
    assert torch.equal(full.steps, want.steps) and full.steps.dtype == torch.int64
    for name, value in want.metrics.items():
        assert torch.equal(full.metrics[name].nan_to_num(-1), value.nan_to_num(-1))
    assert torch.equal(full.by_step["bias_halt"], want.by_step["bias_halt"])
    assert full.final("accuracy") == pytest.approx(0.9) and failed.final("accuracy") != failed.final("accuracy")
    assert (failed.status, failed.reason, failed.right) == ("failed", "no memory", None)


def test_runs_may_share_tensors(tmp_path):
    shared = torch.arange(3)
    runs = [RunResult("a", seed, "finished", updates=shared) for seed in range(2)]
    save_results(tmp_path / "r.safetensors", runs)
    assert all(torch.equal(run.updates, shared) for run in load_results(tmp_path / "r.safetensors"))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "r.safetensors"
    save_results(path, _runs())
    content = path.read_bytes()
    for wrong in (b"", content[:50], content[:-8], b"x" * 200):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="r.safetensors: "):
            load_results(path)


def test_arm_round_trip_and_refusals():
    arm = Arm.from_values({"target": "polyak", "lr": 1})
    assert Arm.from_values(arm.to_values()) == arm and arm.changes() == {"target": "polyak", "lr": 1.0}
    with pytest.raises(UserError, match="unknown arm setting 'tagret'; did you mean 'target'"):
        Arm.from_values({"tagret": "none"})
    with pytest.raises(UserError, match="target must be none, polyak, hard or last_layer, not 'soft'"):
        Arm.from_values({"target": "soft"})
    with pytest.raises(UserError, match="lr must be between"):
        Arm(lr=float("nan"))
