"""`python -m hrm_rl.compare`, and the table behind it. N puzzles, M segments."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hrm_testing import ROOT, small_core

from agents import AGENTS, FixedAgent, QHaltingAgent
from agents.oracle import OracleAgent
from hrm_rl import compare, comparison, recorded
from hrm_rl.comparison import Entry, Target
from hrm_rl.core import HRMCore, build_core
from hrm_rl.core.io import load_core, model_bytes, packaged_core
from hrm_rl.errors import UserError
from hrm_rl.recorded import Recording, Wishes
from hrm_rl.tasks import load_puzzles

SIX = str(packaged_core(6))
PLUGIN = """
import torch
from agents import HaltingAgent
from envs import CONTINUE, HALT

class Mine(HaltingAgent):
    def __init__(self, max_steps: int, alpha: float = 0.5):
        super().__init__(max_steps)
        self.alpha = alpha

    def score(self, view):
        return self.alpha * view.logits.float().softmax(-1).amax(-1).amin(-1)

class OnlyActs(HaltingAgent):
    def act(self, view, q_logits=None, explore=False):
        return torch.where(view.steps >= 2, HALT, CONTINUE)

class Slow(Mine):
    def halts(self, view, score):
        return super().halts(view, score) & (view.steps > 3)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(cache, tmp_path, monkeypatch, capsys):
    """Run the command on few puzzles of 6x6; returns (what it wrote to compare.json, what it printed)."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "compare_plugin.py").write_text(PLUGIN)
    sys.modules.pop("compare_plugin", None)

    def call(*words: str, model: str = SIX, limit: int = 60):
        out = tmp_path / "out"
        few = ["--limit", str(limit), "--validation-limit", "90", "--resamples", "40", "--dtype", "float32",
               "--batch-size", "30"]  # fmt: skip
        compare.main([model, *few, "--cache", str(cache), "--out", str(out), "--device", "cpu", *words])
        return json.loads((out / "compare.json").read_text()), capsys.readouterr().out

    return call


@pytest.mark.slow
def test_the_default_table(run, tmp_path):
    result, text = run()
    rows = {row["agent"]: row for row in result["agents"]}
    assert {"q@own", "q", "residual", "oracle", "fixed", "random", "confidence_min"} <= set(rows)
    oracle = rows["oracle"]
    for name, row in rows.items():
        assert row["exact_accuracy"] <= oracle["exact_accuracy"] and row["regret"] >= -1e-12, name
        assert row["lost_to_oracle"] == pytest.approx(oracle["exact_accuracy"] - row["exact_accuracy"])
        assert 1 <= row["mean_steps"] <= row["p95_steps"] + 16 and row["segments"] == round(60 * row["mean_steps"])
        assert row["gflop_per_puzzle"] == pytest.approx(result["flop_per_segment"] * row["mean_steps"] / 1e9)
        assert row["puzzles_per_second"] > 0 and row["live_differs"] == 0, name
        assert (row["brier"] is None) == (row["ece"] is None) == (name not in ("q@own", "q", "trm", "advantage")), name
    assert oracle["lost_to_oracle"] == 0 and oracle["auroc"] == 1 and rows["random"]["auroc"] is None
    assert len({d["group"] for d in result["differences"]}) > 2
    assert all(d["low"] <= d["mean"] + 1e-12 and d["mean"] - 1e-12 <= d["high"] for d in result["differences"])
    said = [line for line in text.splitlines() if " beats residual" in line or " does not beat residual" in line]
    assert [line.split()[0] for line in said] == [row["agent"] for row in result["agents"] if row["learned"]]
    with open(tmp_path / "out" / "compare.csv") as file:
        assert [line["agent"] for line in csv.DictReader(file)] == list(rows)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_segments_of_a_solver_have_no_arithmetic(run, tmp_path):
    loaded, path = load_core(SIX), tmp_path / "implicit.safetensors"
    core = build_core(replace(loaded.core.config, gradient="implicit", solver="iterate", solver_steps=4))
    core.load_state_dict(loaded.core.state_dict())
    path.write_bytes(model_bytes(core, loaded.q_head, loaded.meta))
    result, text = run("--agents", "q", "--timing", "false", "--max-steps", "6", model=str(path))
    assert result["flop_per_segment"] is None and {row["gflop_per_puzzle"] for row in result["agents"]} == {None}
    assert re.search(r"^q@own .* -  +-$", text, re.MULTILINE)  # of GFLOP, and of puzzles/s


@pytest.mark.slow
def test_thresholds_do_not_see_the_test_set(run):
    """Other test puzzles, the same thresholds; other validation puzzles, others: and the second run reads the cache."""
    agents = ("--agents", "confidence", "q", "--timing", "false")
    run(*agents)  # fills the cache
    first, other = run(*agents)[0], run(*agents, limit=30)[0]
    assert first["recording_seconds"]["validation"] == other["recording_seconds"]["validation"] == 0
    assert other["recording_seconds"]["test"] > 0
    thresholds = [[row["threshold"] for row in result["agents"]] for result in (first, other)]
    assert thresholds[0] == thresholds[1]
    again = run(*agents, "--validation-limit", "60")[0]
    assert again["agents"][0]["threshold"] != thresholds[0][0]
    assert first["test"]["sha256"] != first["validation"]["sha256"]
    validation = load_puzzles("sudoku-6", split="train")
    assert first["validation"]["name"] == validation.name


@pytest.mark.slow
def test_plug_ins_run_live_once_and_then_from_the_cache(run, monkeypatch):
    words = ("--agents", "compare_plugin.Mine:alpha=0.9", "compare_plugin.OnlyActs@own", "residual:tau=0.2",
             "--timing", "false")  # fmt: skip
    first, text = run(*words)
    rows = {row["agent"]: row for row in first["agents"]}
    assert rows["compare_plugin.OnlyActs@own"]["mean_steps"] == 2
    assert rows["residual:tau=0.2"]["setting"] == "tau=0.2" and first["residual"] == "residual:tau=0.2"
    assert rows["compare_plugin.Mine:alpha=0.9"]["validation_mean_steps"] is not None
    assert "oracle" in rows and "q@own" in rows and first["baseline"] == "q@own"
    monkeypatch.setattr(recorded, "_run", lambda *args: pytest.fail("the core was run again"))
    assert run(*words)[0]["agents"] == first["agents"]


@pytest.mark.slow
def test_a_target_of_mean_steps_and_a_risk_bound(run):
    quick = ("--timing", "false", "--agents", "confidence", "fixed", "random")
    by_steps, text = run(*quick, "--calibrate", "steps", "--mean-steps", "4")
    rows = {row["agent"]: row for row in by_steps["agents"]}
    assert rows["fixed"]["setting"] == "k=4" and abs(rows["confidence"]["validation_mean_steps"] - 4) < 0.3
    by_risk, text = run(*quick, "--calibrate", "risk", "--delta", "0.2", "--alpha", "0.1")
    rows = {row["agent"]: row for row in by_risk["agents"]}
    assert "Learn-then-Test" in text and "binomial" in by_risk["calibration"]
    assert rows["confidence"]["mean_steps"] < by_risk["max_steps"]
    hopeless, text = run(*quick, "--calibrate", "risk", "--delta", "0.0001")
    assert "confidence: no threshold can be shown to lose at most 0.0%" in text and "never early" in text
    own, _ = run(*quick, "--calibrate", "none")
    assert {row["agent"]: row["setting"] for row in own["agents"]}["confidence"] == "tau=0.98"


@pytest.fixture
def untrained(tmp_path):
    path = tmp_path / "untrained.safetensors"
    path.write_bytes(model_bytes(HRMCore(small_core()), None, {"max_steps": 4}))
    return str(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--agents", "residul"], "agent 'residul' is unknown; did you mean 'residual'"),
     (["--agents", "compare_plugin.OnlyActs"], "has no score, so it cannot be calibrated; write compare_plugin.OnlyAc"),
     (["--agents", "compare_plugin.Slow"], "does not halt where its score reaches its threshold"),
     (["--agents", "residual:tau"], "arguments are written NAME:ARGUMENT=VALUE"),
     (["--agents", "residual:tauu=1"], "unknown 'tauu'; did you mean 'tau'"),
     (["--agents", "residual@mine"], "after @ only own may stand"),
     (["--agents", "kl", "kl"], "kl is there twice"),
     (["--baseline", "nonsense"], "agent 'nonsense' is unknown"),
     (["--calibrate", "steps"], "--mean-steps must be between 1 and max_steps=16, not 0"),
     (["--calibrate", "luck"], "--calibrate must be drop, steps, risk or none"),
     (["--alpha", "2"], "--alpha must be between 0 and 1"), (["--limit", "-1"], "--limit must be between"),
     (["--validation", "sudoku-test.csv"], "sudoku-test.csv"), (["--data", "DATA9"], "DATA9"),
     (["--data", "EMPTY"], "no puzzle"), (["--validation", "EMPTY"], "no puzzle"),
     (["--validation", "TEST6"], "thresholds must not be chosen on test puzzles: "),
     (["--out", "FILE/x"], "--out FILE/x: cannot be written"), (["--cache", "FILE/x"], "--cache FILE/x: cannot")],
)  # fmt: skip
def test_bad_input_is_one_line(words, said, run, tmp_path):
    data = ROOT / "hrm_rl" / "tasks" / "data"
    (tmp_path / "empty.csv").write_text("source,question,answer,rating\n")
    (tmp_path / "file").write_text("")
    names = {"EMPTY": tmp_path / "empty.csv", "DATA9": data / "sudoku-9-test.csv.gz",
             "TEST6": data / "sudoku-6-test.csv.gz", "FILE": tmp_path / "file"}  # fmt: skip
    for short, path in names.items():
        words, said = [word.replace(short, str(path)) for word in words], said.replace(short, str(path))
    with pytest.raises(UserError) as error:
        run(*words, "--timing", "false")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_validation_set_with_no_solved_puzzle(run, untrained):
    with pytest.raises(UserError, match="solves none of these 90 validation puzzles within 4 segments, so no thresh"):
        run(model=untrained)


def test_a_core_without_a_q_head(run, untrained):
    with pytest.raises(UserError, match="holds no Q-head, so there is no learned halt"):
        run("--agents", "q", model=untrained)


@pytest.mark.slow
def test_the_command_exits_with_2_and_one_line(tmp_path):
    words = [sys.executable, "-m", "hrm_rl.compare", "--agents", "residul", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: agent 'residul'")


def test_what_the_specs_mean():
    spec = compare.read_spec("my.Agent:alpha=0.1,beta-x=2@own")
    assert (spec.name, spec.arguments, spec.own) == ("my.Agent", {"alpha": "0.1", "beta_x": "2"}, True)
    assert not compare.read_spec("my.Agent:alpha=0.1").own and compare.read_spec("fixed:k=3").own


# --- the table by hand ----------------------------------------------------------------------------------------

EXACT = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]).bool()


def by_hand() -> Recording:
    return Recording("key", EXACT, EXACT.float(), torch.zeros(3, 4, 1, dtype=torch.uint8), torch.zeros(3, 4, 2), {}, 0)


def entry(label: str, agent, steps: list[int]) -> Entry:
    wish = torch.arange(1, 4)[:, None] >= torch.tensor(steps)
    return Entry(label, agent, Wishes(None, wish), torch.tensor(steps), None, "")


def table_by_hand(learned_steps: list[int]):
    class Core(torch.nn.Module):
        hidden_size = 2

    learned = QHaltingAgent(Core(), 3)
    entries = [entry("q", learned, learned_steps),
               entry("residual", AGENTS["residual"](3), [3, 3, 3, 3]),
               entry("fixed", FixedAgent(3, 2), [2, 2, 2, 2]),
               entry("oracle", OracleAgent(3), [2, 1, 3, 3])]  # fmt: skip
    return comparison.compare(entries, by_hand(), {}, "fixed", 0.1, flops=10, resamples=200)


def test_rows_by_hand():
    found = table_by_hand([2, 2, 1, 3])
    q, residual, fixed, oracle = found.rows
    assert (q["exact_accuracy"], q["mean_steps"], q["p95_steps"], q["segments"]) == (0.75, 2.0, 3, 8)
    assert q["gflop_per_puzzle"] == pytest.approx(2e-8) and q["lost_to_oracle"] == 0
    assert q["regret"] == pytest.approx((0 + 0.1 + 0 + 0) / 4)
    assert residual["regret"] == pytest.approx((0.1 + 1.2 + 0.2 + 0) / 4)
    assert [row["steps"] for row in found.fixed_steps] == [1, 2, 3]
    assert [row["exact_accuracy"] for row in found.fixed_steps] == [0.25, 0.5, 0.5]
    of = {(d["agent"], d["of"], d["against"]): d["mean"] for d in found.differences}
    assert of["q", "exact_accuracy", "fixed at the same mean steps"] == 0.25
    assert of["q", "exact_accuracy", "fixed"] == 0.25 and of["residual", "mean_steps", "fixed"] == 1
    assert of["q", "return", "residual"] == pytest.approx(0.65 - 0.3)


def test_a_learned_agent_that_does_not_beat_the_residual_rule_says_so():
    (worse,) = table_by_hand([3, 3, 3, 3]).verdicts
    assert worse.startswith("q does not beat residual: return +0.0000 [+0.0000, +0.0000]")
    row = {"mean": 0.2, "low": 0.01, "high": 0.4}
    assert comparison.verdict("q", "residual", row, 0.1).startswith("q beats residual: return +0.2000")
    assert " does not beat " in comparison.verdict("q", "residual", row | {"low": -0.01}, 0.1)
    assert worse in comparison.table(table_by_hand([3, 3, 3, 3]), 0.1)


def test_settings_are_those_of_the_flags():
    def of(agent, threshold):
        agent.threshold = threshold
        return comparison.setting_of(agent)

    assert of(FixedAgent(16), 5.5) == "k=6" and of(AGENTS["stability"](16), 1.5) == "patience=2"
    assert of(AGENTS["residual"](16), -0.25) == "tau=0.25" and of(AGENTS["cosine"](16), 0.25) == "tau=0.25"
    assert of(AGENTS["confidence"](16), float("inf")) == "never early"


def test_targets_in_words():
    assert "no guarantee" in Target().words and "0.5% of the accuracy" in Target().words
    risk = Target("risk", delta=0.03, alpha=0.1, bound="hoeffding").words
    assert "P(accuracy lost against the full budget > 3.0%) <= 0.1" in risk and "hoeffding" in risk
