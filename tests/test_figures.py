"""Figures as commands: forward residuals against a closed form, and what the commands write and say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hrm_testing import ROOT, close, small_puzzles, tiny_config

from hrm_rl import figures
from hrm_rl.core import HRMCore, State
from hrm_rl.core.recurrent import RecurrentCore
from hrm_rl.errors import UserError
from hrm_rl.residuals import forward_residuals, gradient_table, table


class Halving(RecurrentCore):
    """z_L halves its distance to 1 at every call, z_H takes over z_L: every residual can be written down."""

    def build(self, generator):
        self.calls = ("L", "L", "H") * 2

    def call(self, which, z_H, z_L, inputs):
        return (z_H, 0.5 * z_L + 0.5) if which == "L" else (z_L, z_L)

    def initial_state(self, batch_size):
        return State(*(torch.full((batch_size, self.num_positions, self.hidden_size), value) for value in (0.0, 2.0)))


def test_residuals_in_closed_form():
    found = forward_residuals(Halving(tiny_config(H_cycles=2)), small_puzzles(5), 2, batch_size=2)
    low = [1 + 0.5**n for n in range(9)]  # z_L after n of its calls
    at_L = [(low[n] - low[n + 1]) / low[n + 1] for n in range(8)]
    at_H = [1.0, *[(low[2 * n] - low[2 * n + 2]) / low[2 * n + 2] for n in range(1, 4)]]
    assert found.network == ("L", "L", "H") * 2 and found.z_L.shape == (12, 5)
    calls = torch.tensor([which == "L" for which in found.network * 2])
    assert found.z_H[calls].isnan().all() and found.z_L[~calls].isnan().all()
    close(found.z_L[calls], torch.tensor(at_L).double()[:, None].expand(-1, 5), 1e-6)
    close(found.z_H[~calls], torch.tensor(at_H).double()[:, None].expand(-1, 5), 1e-6)
    rows = table(found)
    assert [(r["segment"], r["call"], r["state"]) for r in rows[:4]] == [(1, 1, "z_L"), (1, 2, "z_L"), (1, 3, "z_H"),
                                                                        (1, 4, "z_L")]  # fmt: skip
    assert rows[0]["solved"] is None and rows[0]["unsolved"] == pytest.approx([at_L[0]] * 3)


def test_segments_are_the_cores_own():
    """The same states as running the core itself; solved means right after the last segment."""
    core, puzzles = HRMCore(tiny_config(), torch.Generator().manual_seed(0)), small_puzzles(6)
    tokens, state = puzzles.questions.long(), core.initial_state(6)
    for _ in range(3):
        before, (state, logits) = state, core(tokens, state)
    found = forward_residuals(core, puzzles, 3, batch_size=4)
    last = core.run(core.calls[:-1], before, core.inputs(tokens))
    wanted = (state.z_H - last.z_H).flatten(1).norm(dim=1) / state.z_H.flatten(1).norm(dim=1)
    close(found.z_H[-1], wanted.detach(), 1e-5)
    assert torch.equal(found.exact, (logits.argmax(-1) == puzzles.answers.long()).all(-1))


def test_residuals_command(tmp_path, capsys):
    out = tmp_path / "r.png"
    assert figures.main(["residuals", "--puzzles", "8", "--max-steps", "3", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "segment" in said and str(out) in said and out.read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["solved"] + numbers["unsolved"] == numbers["puzzles"] == 8 and numbers["dtype"] == "float32"
    assert {row["state"] for row in numbers["rows"]} == {"z_H", "z_L"} and len(numbers["rows"]) == 18
    for row in numbers["rows"]:
        for group in ("solved", "unsolved"):
            assert row[group] is None if not numbers[group] else sorted(row[group]) == row[group]


def test_gradient_command(tmp_path, capsys):
    out = tmp_path / "g.json"
    words = ["gradient", "--puzzles", "2", "--max-steps", "2", "--solver-steps", "4", "--out", str(out)]
    assert figures.main(words) == 0
    numbers = json.loads(out.read_text())
    assert [row["segment"] for row in numbers["rows"]] == [1, 2] and numbers["solver_steps"] == 4
    assert all(-1 <= row[name] <= 1 for row in numbers["rows"] for name in ("cosine", "cosine_full", "cosine_solved"))
    assert gradient_table(numbers["rows"]) in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["residual"], "did you mean 'residuals'"), (["residuals", "--out", "x.jpg"], "must end in .png"),
    (["residuals", "--puzzles", "0"], "--puzzles must be between"), (["residuals", "nowhere"], "no such file"),
    (["gradient", "--solver-steps", "0"], "solver_steps must be at least 1"),
    (["gradient", "--max-steps", "0"], "--max_steps must be between"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        figures.main(words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_module_runs():
    found = subprocess.run([sys.executable, "-m", "hrm_rl.figures", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0 and all(name in found.stdout for name in figures.COMMANDS)
