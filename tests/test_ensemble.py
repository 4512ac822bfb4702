"""Ensembles: K relabelled copies of a puzzle, one answer, every segment counted. K copies, N puzzles, M segments."""

from __future__ import annotations

import json

import pytest
import torch
from hrm_testing import counting_core, small_core, small_puzzles

from agents import AGENTS, HaltingAgent, make_agent
from hrm_rl import ensemble, evaluate
from hrm_rl.core import HRMCore
from hrm_rl.ensemble import relabelled, solve_ensemble
from hrm_rl.errors import UserError
from hrm_rl.evaluation import trajectories
from hrm_rl.tasks import get_task

M, N = 5, 12


class ByCopy(HaltingAgent):
    """Halts copy k of puzzle i at step `plan[k]`, with `worth[k]` as its score before and after."""

    threshold = 10.0

    def __init__(self, max_steps, plan=(), worth=(), shown=None):
        super().__init__(max_steps)
        self.plan, self.worth = torch.tensor(plan), torch.tensor(worth, dtype=torch.float32)
        rows = [tuple(row) for row in shown.questions.tolist()]
        self.copy_of = {row: i // N for i, row in reversed(list(enumerate(rows)))}

    def score(self, view):
        copy = torch.tensor([self.copy_of[tuple(row)] for row in view.tokens.tolist()])
        return self.worth[copy] + 10.0 * (view.steps >= self.plan[copy])


def shown_copies(copies):
    puzzles = small_puzzles(N, blanks=9)
    shown, _ = relabelled(puzzles, copies)
    assert len({tuple(r) for r in shown.questions.tolist()}) == copies * N  # so that ByCopy can tell them apart
    return puzzles, shown


@pytest.mark.parametrize("side", [4, 6, 9])
def test_restore_undoes_augment(side):
    task, generator = get_task("sudoku", side), torch.Generator().manual_seed(side)
    tokens = torch.randint(0, side + 2, (50, side * side), generator=generator)
    keys = torch.arange(50) * 7919
    moved, same = task.augment(keys, tokens, tokens)
    assert torch.equal(moved, same) and not torch.equal(moved, tokens)
    assert torch.equal(task.restore(keys, moved), tokens)
    assert not torch.equal(task.restore(keys + 1, moved), tokens)  # negative control: another symmetry


@pytest.mark.parametrize("rule", ["first", "best"])
@pytest.mark.parametrize("name", ["q", "confidence", "stability", "random", "oracle"])
def test_one_copy_is_the_plain_agent(name, rule):
    puzzles = small_puzzles(11)
    core = HRMCore(small_core(), torch.Generator().manual_seed(0)).eval()
    arguments = {"confidence": {"tau": 0.55}, "stability": {"patience": 1}}.get(name)
    agent = make_agent(AGENTS[name], core, M, "shared_prefix", arguments)
    if name == "q":
        agent.q_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        agent.q_head.bias.data.zero_()
    run = trajectories(core, agent, puzzles, M, 4)
    steps = run.halt_steps(M)
    got = solve_ensemble(core, agent, puzzles, M, rule, 1, 4)
    assert torch.equal(got.steps, steps) and torch.equal(got.segments, steps) and not got.copy.any()
    exact, token = run.at(steps)
    assert torch.equal(got.exact, exact) and torch.allclose(got.token, token)


def test_first_takes_the_copy_that_halts_first_and_counts_all():
    """Right in segments 2 and 3 only. Copies halt at 4, 2, 2, 5: copy 2 wins by its score, at 4 * 2 segments."""
    puzzles, shown = shown_copies(4)
    core = counting_core(shown, 2, 3)
    agent = ByCopy(M, (4, 2, 2, 5), (0, 1, 2, 3), shown)
    got = solve_ensemble(core, agent, puzzles, M, "first", 4, 7)
    assert (got.copy == 2).all() and (got.steps == 2).all() and (got.segments == 8).all()
    assert got.exact.all() and (got.token == 1).all()
    assert torch.equal(got.answers, puzzles.answers)  # mapped back, cell by cell
    tied = solve_ensemble(core, ByCopy(M, (4, 2, 2, 5), (0, 1, 1, 3), shown), puzzles, M, "first", 4, 7)
    assert (tied.copy == 1).all()
    alone = solve_ensemble(core, ByCopy(M, (4, 2, 2, 5), (0, 1, 1, 3), shown), puzzles, M, "first", 1, 7)
    assert (alone.steps == 4).all() and not alone.exact.any()  # copy 0 by itself is too late


def test_best_takes_the_highest_at_its_own_halt_and_counts_all():
    """Copies halt at 4, 2, 3, 1 with worth 0, 1, 2, 1.5: copy 2, after 4 segments, for 10 in all."""
    puzzles, shown = shown_copies(4)
    agent = ByCopy(M, (4, 2, 3, 1), (0, 1, 2, 1.5), shown)
    got = solve_ensemble(counting_core(shown, 3, 3), agent, puzzles, M, "best", 4, 5)
    assert (got.copy == 2).all() and (got.steps == 4).all() and (got.segments == 10).all() and got.exact.all()
    assert torch.equal(got.answers, puzzles.answers)
    wrong = solve_ensemble(counting_core(shown, 4), agent, puzzles, M, "best", 4, 5)
    assert not wrong.exact.any() and (wrong.token == 0).all()


def test_mapping_back_matters(monkeypatch):
    """Negative control: without it the answer of a relabelled copy is wrong."""
    puzzles, shown = shown_copies(2)
    agent = ByCopy(M, (5, 2), (0, 1), shown)
    task = get_task("sudoku", 4)

    class Forgets:
        augment = staticmethod(task.augment)
        restore = staticmethod(lambda keys, answer: answer)

    assert solve_ensemble(counting_core(shown, 2), agent, puzzles, M, "first", 2).exact.all()
    monkeypatch.setattr(ensemble, "get_task", lambda *_: Forgets)
    assert not solve_ensemble(counting_core(shown, 2), agent, puzzles, M, "first", 2).exact.all()


def test_padding_is_never_right_and_stays_padding():
    puzzles = small_puzzles(3, padding=2)
    core = HRMCore(small_core(), torch.Generator().manual_seed(0)).eval()
    shown, _ = relabelled(puzzles, 3)
    assert not shown.questions.view(3, 5, 16)[:, 3:].any()
    got = solve_ensemble(core, make_agent(AGENTS["fixed"], core, 2, "none"), puzzles, 2, "first", 3)
    assert not got.exact[3:].any() and not got.token[3:].any()


def test_refusals():
    puzzles = small_puzzles(3)
    core = counting_core(puzzles, 1)
    agent = make_agent(AGENTS["oracle"], core, M, "none")
    with pytest.raises(UserError, match="one of first, best"):
        solve_ensemble(core, agent, puzzles, M, "last", 2)
    with pytest.raises(UserError, match="between 1 and 1024, not 0"):
        solve_ensemble(core, agent, puzzles, M, "first", 0)
    with pytest.raises(UserError, match="--copies must be between 1 and 1024, not 0"):
        evaluate.main(["--copies", "0"])

    class OnlyActs(HaltingAgent):
        def act(self, view, q_logits=None, explore=False):
            return torch.zeros_like(view.steps)

    with pytest.raises(UserError, match="needs an agent with Q-values or a score; OnlyActs has neither"):
        solve_ensemble(core, OnlyActs(M), puzzles, M, "best", 2)
    assert (solve_ensemble(core, OnlyActs(M), puzzles, M, "first", 2).segments == 2).all()


def test_the_command_prints_and_writes_it(tmp_path, capsys):
    out = tmp_path / "report.json"
    words = ["--limit", "8", "--max-steps", "3", "--ensemble", "first", "--copies", "2", "--out", str(out)]
    assert evaluate.main(words) == 0
    assert "ensemble first of 2" in capsys.readouterr().out
    row = json.loads(out.read_text())["ensemble"]
    assert row["copies"] == 2 and row["mean_segments"] == pytest.approx(2 * row["mean_steps"])
