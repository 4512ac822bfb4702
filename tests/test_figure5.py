"""Figure 5: the table, the paper's statements and the picture, on runs whose outcome is known."""

from __future__ import annotations

import csv
import io
import json
import signal

import pytest
import torch

from hrm_rl import ablate, figure5, train
from hrm_rl.errors import UserError
from hrm_rl.figure5 import Point

N = 400


def _point(kind: str, trained: int, budget: int, seed: int, accuracy: float, steps: float) -> Point:
    generator = torch.Generator().manual_seed(1000 * trained + 10 * budget + seed)
    right = torch.arange(N) < round(accuracy * N)
    used = (steps + 0.5 * torch.randn(N, generator=generator)).round().clamp(1, budget).long()
    return Point(kind, trained, budget, seed, right, used)


def _study(act=lambda m: 0.8, fixed=lambda m: 0.8, steps=lambda m: 2.0, beyond=0.1, seeds: int = 3) -> list[Point]:
    points = []
    for seed in range(seeds):
        apart = 0.005 * (seed - 1)
        for m in (2, 4, 8):
            points.append(_point("act", m, m, seed, act(m) + apart, steps(m)))
            points.append(_point("fixed", m, m, seed, fixed(m) + apart, m))
            points += [_point("act", m, b, seed, act(m) + beyond + apart, steps(m) + 1) for b in (16, 32)]
    return points


def _verdicts(points: list[Point]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for claim in figure5.claims(points, resamples=300):
        found.setdefault(claim.paper[:3], []).append(claim.verdict)
    return found


def test_claims_hold_where_the_shape_is_the_papers():
    assert _verdicts(_study()) == {"(a)": ["held"], "(b)": ["held"] * 3, "(c)": ["held"] * 3}


@pytest.mark.parametrize("part, changes", [
    ("(a)", {"steps": lambda m: 0.9 * m}),  # compute grows with the budget
    ("(b)", {"fixed": lambda m: 0.95}),  # a fixed depth is better
    ("(c)", {"beyond": -0.1}),  # more segments lose
])  # fmt: skip
def test_each_claim_can_fail(part, changes):
    assert set(_verdicts(_study(**changes))[part]) == {"did not hold"}


@pytest.mark.parametrize("detached, verdict", [(0.9, "held"), (0.8, "did not hold")])
def test_runs_whose_core_the_q_loss_did_not_reach_are_held_against_the_fixed_ones(detached, verdict):
    points = _study(fixed=lambda m: 0.9) + [_point("detached", 8, 8, seed, detached, 5) for seed in range(3)]
    found = _verdicts(points)
    assert found["(b'"] == [verdict] and set(found["(b)"]) == {"did not hold"}  # those of ACT stay their own
    kinds = [(row.kind, row.trained) for row in figure5.rows(points, resamples=50) if row.kind == "detached"]
    assert kinds == [("detached", 8)]


def test_one_seed_decides_nothing_about_accuracy():
    found = _verdicts(_study(seeds=1))
    assert set(found["(b)"]) == set(found["(c)"]) == {"undecided"}


def test_rows_are_the_means_of_their_runs():
    points = _study()
    table = {(r.kind, r.trained, r.budget): r for r in figure5.rows(points, resamples=200)}
    assert len(table) == 3 + 3 * 3
    for (kind, trained, budget), row in table.items():
        own = [p for p in points if (p.kind, p.trained, p.budget) == (kind, trained, budget)]
        assert row.seeds == 3
        assert row.accuracy.value == pytest.approx(sum(p.right.float().mean().item() for p in own) / 3)
        assert row.mean_steps.value == pytest.approx(sum(p.steps.float().mean().item() for p in own) / 3)
        assert row.accuracy.low <= row.accuracy.value <= row.accuracy.high


def test_files(tmp_path):
    table, claims = figure5.write(tmp_path, _study(), "a study")
    read = list(csv.DictReader(io.StringIO((tmp_path / "fig5.csv").read_text())))
    assert len(read) == len(table) and read[0]["kind"] == "act" and float(read[0]["exact_accuracy"]) == 0.8
    plain = json.loads((tmp_path / "fig5.json").read_text())
    assert [c["verdict"] for c in plain["claims"]] == [c.verdict for c in claims] and plain["puzzles"] == N
    assert (tmp_path / "fig5.png").read_bytes()[:4] == b"\x89PNG"
    assert "act" in figure5.text(table) and "32" in figure5.text(table)


def test_a_single_seed_is_json_without_nan(tmp_path):
    figure5.write(tmp_path, _study(seeds=1), "one seed")
    plain = json.loads((tmp_path / "fig5.json").read_text(), parse_constant=pytest.fail)
    assert plain["rows"][0]["accuracy"] == {"value": 0.795, "low": None, "high": None}


def test_points_of_other_puzzles_or_budgets_are_refused():
    points = _study()
    figure5.check_same_puzzles(points)
    with pytest.raises(UserError, match="different numbers of puzzles"):
        figure5.check_same_puzzles([*points, Point("act", 2, 2, 0, torch.ones(3).bool(), torch.ones(3).long())])
    with pytest.raises(UserError, match="more segments than its budget"):
        figure5.check_same_puzzles([Point("act", 2, 2, 0, torch.ones(N).bool(), torch.full((N,), 3))])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a finished run"):
        figure5.measure(tmp_path, [2])


def test_a_study_of_another_kind_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(ablate, "main", lambda words: ran.append(words) or 3)
    (tmp_path / "live.yaml").write_text("kind: joint\n")
    for study, kind in (("q_stability", "q_only"), ("live.yaml", "joint")):
        with pytest.raises(UserError, match=f"needs a study of kind train, this one is of kind {kind}"):
            figure5.command([study])
    assert not ran and sorted(p.name for p in tmp_path.iterdir()) == ["live.yaml"]
    assert figure5.command(["figure5"]) == 3 and ran[0][0] == "figure5"  # the control: one that can be drawn is run


OWN = """
from agents import HaltingAgent
from envs import HaltEnv, HaltVectorEnv
from hrm_rl.core import HRMCore
from hrm_rl.tasks.maze import Maze
import gymnasium as gym

class Corridors(Maze):
    sides = range(5, 7)
    default_side = 5

class Single(HaltEnv):
    task = "own_parts.Corridors"

class Many(HaltVectorEnv):
    task = "own_parts.Corridors"

if "Corridors-v0" not in gym.registry:
    gym.register(id="Corridors-v0", entry_point=Single, vector_entry_point=Many)

class Certain(HaltingAgent):
    threshold = 0.6

    def score(self, view):
        return view.logits.float().softmax(-1).amax(-1).amin(-1)

class Core(HRMCore):
    pass
"""


def test_a_run_of_the_users_own_task_agent_and_core_is_measured(tmp_path, monkeypatch, capsys):
    """All three are named in the run's own configuration, so nothing has to be asked for."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = ["--num-envs", "4", "--max-steps", "2", "--total-steps", "2", "--compile", "off", "--device", "cpu",
             "--test-limit", "6", "--eval-every", "0", "--train-limit", "20", "--core.hidden_size", "16",
             "--core.num_heads", "2", "--core.inner_multiple", "16", "--core.puzzle_emb_ndim", "16"]  # fmt: skip
    words = ["--env", "own_parts:Corridors-v0", "--agent", "own_parts.Certain", "--core.kind", "own_parts.Core"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert train.main([*words, *small, "--name", "mine"]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    points = figure5.measure(tmp_path / "runs" / "mine", [3], device="cpu")
    assert [(p.trained, p.budget, len(p.right)) for p in points] == [(2, 2, 6), (2, 3, 6)]
