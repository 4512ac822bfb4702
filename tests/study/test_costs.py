"""What arms of whole trainings reach and cost: the numbers behind the table, the table, the report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hrm_rl.core import CoreConfig, build_core
from hrm_rl.flops import segment_flops
from hrm_rl.study import costs, spec
from hrm_rl.study.info import StudyInfo
from hrm_rl.study.report import COMPUTE, write_report
from hrm_rl.study.results import RunResult

YAML = """kind: train
seeds: 2
updates: 10
baseline:
  size: 4
  max_steps: 4
  core: {hidden_size: 16, num_heads: 2, inner_multiple: 16, puzzle_emb_ndim: 16}
arms:
  - {name: one pass, core: {kind: direct_transformer}}
  - {name: wild}
"""


@pytest.fixture
def study(tmp_path) -> spec.Study:
    (tmp_path / "s.yaml").write_text(YAML.replace("  - {name: wild}\n", "  - {name: wild, optim: {lr: 9.0}}\n"))
    return spec.load_study(tmp_path / "s.yaml")


def info(study: spec.Study) -> StudyInfo:
    arms = {arm.name: arm.values for arm in study.arms}
    return StudyInfo("T", "command", "today", "machine", "2", spec.BASELINE, "train", 8, 10, 6, arms)


def run(arm: str, seed: int, right: int, steps: float, seconds: float, status: str = "finished") -> RunResult:
    """Of 8 puzzles; the accuracy of a fixed number of segments grows by 0.1 a segment."""
    if status != "finished":
        return RunResult(arm, seed, status, "lost", seconds, live=True)
    marks = torch.tensor([0, 10])
    metrics = {"accuracy": torch.tensor([0.0, right / 8]).double(), "mean_steps": torch.tensor([4.0, steps]).double()}
    by_step = {"accuracy": torch.tensor([[0.0] * 4, [0.1, 0.2, 0.3, 0.4]]).double()}
    return RunResult(arm, seed, "finished", "", seconds, marks, metrics, by_step, torch.arange(8) < right,
                     torch.full((8,), round(steps)), "the same", live=True)  # fmt: skip


def results() -> list[RunResult]:
    return [run("baseline", 1, 5, 3.0, 130), run("baseline", 0, 6, 2.0, 60), run("one pass", 0, 2, 1.0, 60),
            run("one pass", 1, 2, 1.0, 60), run("wild", 0, 0, 0, 5, "diverged"),
            run("wild", 1, 0, 0, 5, "diverged")]  # fmt: skip


def test_the_numbers_are_those_of_the_very_core(study):
    held = costs.cost_of(study.arms[0].values)
    core = build_core(CoreConfig(**{n.removeprefix("core."): v for n, v in _core(study).items()}))
    assert held.parameters == sum(p.numel() for p in core.parameters())
    assert held.segment == segment_flops(core.config).forward
    other = costs.cost_of(study.arms[1].values)
    assert other.segment < held.segment / 2  # one pass of one network against two cycles of two


def _core(study: spec.Study) -> dict:
    config, _, _ = spec.train_settings(study.arms[0].values)
    return vars(config.core)


def test_a_puzzle_costs_its_segments_until_its_halt(study):
    baseline, one_pass, wild = costs.cost_rows(info(study), results())
    assert [r.arm for r in (baseline, one_pass, wild)] == ["baseline", "one pass", "wild"]
    assert baseline.finals == (0.75, 0.625) and baseline.accuracy.value == pytest.approx(0.6875)
    assert baseline.flops == pytest.approx(2.5 * baseline.flops_per_segment)
    assert baseline.seconds == (60, 130) and costs.minutes(baseline) == "1.0 to 2.2"
    assert math.isnan(wild.accuracy.value) and math.isnan(wild.flops)  # both of its runs are lost


def test_the_table_says_it(study):
    words = costs.text(costs.cost_rows(info(study), results())).splitlines()
    assert words[0].split()[:3] == ["arm", "accuracy", "each"]
    assert "75.0  62.5" in words[1] and " 2.50 " in words[1] and words[1].endswith("1.0 to 2.2")
    assert "25.0  25.0" in words[2] and words[2].endswith(" 1.0")
    assert len({len(line) for line in words[:4]}) == 1


def test_a_run_that_is_lost_counts_as_nothing_solved_and_is_named(study):
    part = [*results()[:2], run("one pass", 0, 2, 1.0, 60), run("one pass", 1, 0, 0, 5, "failed")]
    row = costs.cost_rows(info(study), part)[1]
    assert row.accuracy.value == pytest.approx(0.125) and row.mean_steps.value == 1
    words = costs.text([row]).splitlines()
    assert "25.0  lost" in words[1] and words[-1].startswith("lost: the run diverged or failed")


def test_an_arm_that_cannot_be_built_costs_no_report(study, tmp_path):
    broken = replace(info(study), arms=info(study).arms | {"wild": study.arms[2].values | {"core.kind": "nosuch"}})
    rows = costs.cost_rows(broken, results())
    assert rows[2].parameters == 0 and rows[0].parameters > 0
    assert costs.text(rows).splitlines()[3].split()[:4] == ["wild", "-", "lost", "lost"]
    assert "baseline solved most" in write_report(tmp_path, broken, results()).read_text()


def test_a_solver_has_no_count(tmp_path):
    (tmp_path / "s.yaml").write_text(YAML.replace("{kind: direct_transformer}", "{gradient: implicit}").replace(
        "  - {name: wild}\n", ""))  # fmt: skip
    study = spec.load_study(tmp_path / "s.yaml")
    rows = costs.cost_rows(info(study), results()[:4])
    assert math.isnan(rows[1].flops) and rows[1].parameters == rows[0].parameters
    assert costs.text(rows).splitlines()[2].split()[-2] == "-"
    write_report(tmp_path / "out", info(study), results()[:4])


def test_curves_of_fixed_segments(study):
    flops, accuracy = costs.step_curves(results()[:2], 2_000_000)
    assert flops == [2, 4, 6, 8] and accuracy == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert costs.step_curves(results()[4:], 1) == ([], [])


def test_the_report_is_about_accuracy_and_cost(study, tmp_path):
    text = write_report(tmp_path / "out", info(study), results()).read_text()
    assert "baseline solved most of 3 arms: 68.8 %" in text
    assert "Accuracy and cost" in text and "What the paper claims" not in text and "Stability</h2>" not in text
    figure = (tmp_path / "out" / COMPUTE).read_text()
    assert figure.startswith("<svg") and "MFLOP a puzzle" in figure and "one pass" in figure


@pytest.mark.slow
def test_a_study_of_q_learners_is_told_as_before(study, tmp_path):
    from synthetic_study import make_study, standard_arms

    text = write_report(tmp_path, *make_study(standard_arms(), checkpoints=3, puzzles=20)).read_text()
    assert "What the paper claims" in text and "Accuracy and cost" not in text
    assert not Path(tmp_path / COMPUTE).exists()
