"""Study files: what their arms come to, and what is refused by file and line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import study_stand_ins
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.arm import Arm
from hrm_rl.errors import UserError
from hrm_rl.study import spec


@pytest.fixture(autouse=True)
def _learners(monkeypatch):
    monkeypatch.setitem(sys.modules, "hrm_rl.study.learners", study_stand_ins.learners())


@pytest.fixture
def read(tmp_path):
    def call(text: str, **more) -> spec.Study:
        (tmp_path / "s.yaml").write_text(text)
        return spec.load_study(tmp_path / "s.yaml", **more)

    return call


def names(study: spec.Study) -> list[str]:
    return [arm.name for arm in study.arms]


Q = "kind: q_only\narms:\n"


def test_a_block_is_crossed_and_named_by_what_differs(read):
    study = read(Q + "  a: {target: [none, polyak], tau: [0.005, 0.01], lr: [1e-3, 1.0e-2]}\n")
    # without a running average tau is no difference; tau=0.01 and lr=0.001 are the baseline's
    assert names(study) == ["baseline", "lr=0.01", "target=polyak tau=0.005", "target=polyak tau=0.005 lr=0.01",
                            "target=polyak", "target=polyak lr=0.01"]  # fmt: skip
    assert study.baseline.values == Arm().to_values() and study.baseline.changes == {}
    arm = study.arms[3]
    assert arm.changes == {"target": "polyak", "tau": 0.005, "lr": 0.01}
    assert arm.arm == Arm(target="polyak", tau=0.005, lr=0.01) and arm.place.endswith("s.yaml:3")


def test_blocks_in_lists_and_a_baseline_of_ones_own(read):
    text = "kind: q_only\nseeds: 3\nbaseline: {weight_decay: 0, loss: mse_values}\narms:\n"
    study = read(text + "  - {weight_decay: [0, 1]}\n  - [{gamma: 0.9}, {gamma: [0.9, 0.5]}]\n  - {loss: mse_values}\n")
    assert names(study) == ["baseline", "weight_decay=1", "gamma=0.9", "gamma=0.5"]
    assert all(arm.values["loss"] == "mse_values" for arm in study.arms)
    assert study.runs[:4] == [(study.arms[0], 0), (study.arms[0], 1), (study.arms[0], 2), (study.arms[1], 0)]


@pytest.mark.parametrize(
    ("fields", "inert"),
    [("tau: 0.5", True), ("period: 7", True), ("replay_size: 7", True), ("lam: 0.1", True), ("head_width: 8", True),
     ("epsilon: 0, exploration: per_episode", False), ("target: hard, period: 7", False),
     ("target: polyak, tau: 0.5", False), ("replay: fifo, replay_size: 7", False), ("backup: lambda, lam: 0.1", False),
     ("head: mlp, head_width: 8", False), ("head_norm: rmsnorm", False)],
)  # fmt: skip
def test_what_has_no_effect_is_no_arm(read, fields, inert):
    study = read(f"{Q}  a: {{{fields}}}\n")
    assert len(study.arms) == (1 if inert else 2)
    if "epsilon" in fields:
        assert names(study)[1] == "epsilon=0"
    elif not inert:
        assert names(study)[1].count("=") == fields.count(":")


def test_a_name_of_its_own(read):
    study = read(Q + "  a: {lr: [0.1, 10]}\n  b: {name: wild, lr: 10}\n  c: {name: odd, lr: 3}\n")
    assert names(study) == ["baseline", "lr=0.1", "wild", "odd"] and study.arms[2].changes == {"lr": 10.0}


def test_seeds_and_updates_may_be_given_anew(read):
    text = Q + "  a: {lr: 0.1}\n"
    study = read(text, seeds=2, updates=5)
    assert (study.seeds, study.updates, study.checkpoints, len(study.runs)) == (2, 5, 5, 4)
    assert spec.identity(study, {}) == spec.identity(read(text, seeds=7, updates=5), {})
    assert spec.identity(study, {}) != spec.identity(read(text, updates=6), {})
    assert spec.identity(study, {}) != spec.identity(study, {"core": "other"})
    assert spec.identity(study, {}) != spec.identity(read(Q + "  a: {lr: 0.2}\n", updates=5), {})
    words = "title: x\nquestion: y\n"
    assert spec.identity(study, {}) == spec.identity(read(words + text, updates=5), {})


def test_some_arms(read):
    study = read(Q + "  a: {target: [polyak, hard], lr: [0.1, 0.2]}\n")
    assert names(study.selected(["target=polyak*"])) == ["baseline", "target=polyak lr=0.1", "target=polyak lr=0.2"]
    assert names(study.selected(["target=hard lr=0.2", "*lr=0.1"]))[1:] == [
        "target=polyak lr=0.1", "target=hard lr=0.1", "target=hard lr=0.2"]  # fmt: skip
    with pytest.raises(UserError) as error:
        study.selected(["target=hrad lr=0.1"])
    said = str(error.value)
    assert "no arm fits 'target=hrad lr=0.1'; did you mean 'target=hard lr=0.1'?; there are: baseline, " in said
    assert all(name in said for name in names(study))


MANY = ", ".join(map(str, range(1, 400)))
BAD = [
    ("a: 1\n", "s.yaml:1: unknown 'a' in a study (it takes: kind, title, question, seeds"),
    ("kin: q_only\n", "s.yaml:1: unknown 'kin' in a study; did you mean 'kind'?"),
    ("seeds: 1\n", "s.yaml: kind must be given: q_only, joint or train"),
    ("kind: qonly\n", "s.yaml:1: kind must be q_only, joint or train, not 'qonly'"),
    ("", "s.yaml: must hold a study"), ("- 1\n", "s.yaml: must hold a study"),
    ("kind: q_only\nseeds: 0\n", "s.yaml:2: seeds must be between 1 and 100000, not 0"),
    ("kind: q_only\nseeds: many\n", "s.yaml:2: seeds must be a whole number, not 'many'"),
    ("kind: q_only\nsize: 5\n", "s.yaml:2: size must be 4, 6 or 9, not 5"),
    ("kind: joint\nsize: 4\n", "s.yaml:2: size of a joint study is a setting of its baseline"),
    ("kind: q_only\nkind: joint\n", "s.yaml:2: 'kind' is given twice in a study"),
    ("kind: q_only\npuzzles: {test: 1}\n", "s.yaml:2: unknown 'test' in puzzles (it takes: train, probe)"),
    ("kind: q_only\npuzzles: {probe: {count: -1}}\n", "s.yaml:2: puzzles.probe.count must be at least 0, not -1"),
    ("kind: q_only\nbaseline: {lr: [1, 2]}\n", "s.yaml:2: lr of the baseline must be one value, not a list of 2"),
    ("kind: q_only\nbaseline: {lr: -1}\n", "s.yaml:2: lr must be between 0 and 1e+06, not -1.0"),
    (Q + "  a: {targt: polyak}\n",
     "s.yaml:3: unknown field 'targt' of an arm; did you mean 'target'? (there are: target, tau, "),
    (Q + "  a:\n    lr: 1\n    target: [polyak, hrd]\n",
     "s.yaml:5: target must be none, polyak, hard or last_layer, not 'hrd'"),
    (Q + "  a:\n    lr: 1\n    gamma: [0.5, 1.5]\n", "s.yaml:5: gamma must be between 0 and 1, not 1.5"),
    (Q + "  a: {lr: .nan}\n", "s.yaml:3: lr must be a finite number, not nan"),
    (Q + "  a: {lr: fast}\n", "s.yaml:3: lr must be a number, not 'fast'"),
    (Q + "  a: {lr: []}\n", "s.yaml:3: lr holds no value"),
    (Q + "  gamma: [0.5, 0.9]\n", "s.yaml:3: 'gamma' stands where the name of a block belongs: write arms: {any_name: "
     "{gamma: [0.5, 0.9]}}, or a list, - {gamma: [0.5, 0.9]}"),
    (Q + "  replay: uniform\n", "s.yaml:3: 'replay' stands where the name of a block belongs: write arms: {any_name: "
     "{replay: uniform}}"),
    (Q + "  gamma: []\n", "s.yaml:3: 'gamma' holds an empty list"),
    (Q + "  a: {lr:}\n", "s.yaml:3: lr must be a number, not None"),
    (Q + "  a: 3\n", "s.yaml:3: block 'a' must hold settings"),
    (Q + "  a: {lr: {x: 1}}\n", "s.yaml:3: lr must be a number, not {'x': 1}"),
    (Q + "  a: {backup: mc, replay: uniform}\n", "s.yaml:3: backup=mc needs whole episodes"),
    (Q + "  a: {name: x, lr: [1, 2]}\n", "s.yaml:3: name must be a word for one arm"),
    (Q + "  a: {name: baseline, lr: 2}\n", "s.yaml:3: name must be a word for one arm"),
    (Q + "  a: {name: x, lr: 1.0e-3}\n", "s.yaml:3: arm 'x' is the baseline itself"),
    (Q + "  a: {name: x, lr: 1}\n  b: {name: x, lr: 2}\n", "s.yaml:4: two different arms are named 'x'"),
    (Q + f"  a: {{lr: [{MANY}], period: [{MANY}]}}\n",
     "s.yaml:3: 159,201 arms are more than any study runs (at most 50,000)"),
    (Q + "  a: {<<: {lr: 1}}\n", "s.yaml:3: a name in block 'a' must be a word"),
    (Q + "  a: !!python/object:os.system {}\n", "s.yaml:3: tag '!!python/object:os.system' is refused"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_bad_files_are_one_line_with_their_place(read, text, said):
    with pytest.raises(UserError) as error:
        read(text)
    assert re.search(re.escape(said), str(error.value)) and "\n" not in str(error.value)


# --- live runs ------------------------------------------------------------------------------------------------

JOINT = """kind: joint
updates: 20
baseline: {size: 4, max_steps: 4, compile: off, agent_args: {epsilon: 0.2}, optim: {optimizer: adamw}}
arms:
"""


def test_live_arms_are_settings_of_train(read):
    study = read(JOINT + """
  a: {objective: [joint, supervised], q_to_core: [true, false]}
  b: {objective: supervised, agent: fixed, agent_args: {k: [2, 3]}}
  c: {optim: {lr: [1e-2, 2.0e-2]}, agent_args: {epsilon: 0.2}}
  d: {clues: [[8, 9], [10, 11]]}
  e: {agent_args: {exploration: [per_step, per_episode]}}
""")  # fmt: skip
    assert names(study) == [
        "baseline", "q_to_core=false", "objective=supervised agent=fixed", "objective=supervised q_to_core=false "
        "agent=fixed", "objective=supervised agent=fixed k=2", "objective=supervised agent=fixed k=3", "optim.lr=0.01",
        "optim.lr=0.02", "clues=8,9", "clues=10,11", "exploration=per_episode",
    ]  # fmt: skip
    config, agent, arguments = spec.train_settings(study.arms[6].values, seed=5, total_steps=7)
    assert (config.optim.lr, config.size, config.compile, config.seed, config.total_steps) == (0.01, 4, "off", 5, 7)
    assert (agent, arguments["epsilon"], config.core.seq_len) == ("q", 0.2, 16)
    _, agent, arguments = spec.train_settings(study.arms[5].values)
    assert agent == "fixed" and arguments == {"k": 3}
    assert spec.train_settings(study.arms[2].values)[1:] == ("fixed", {"k": 0})
    assert study.baseline.values["core.dtype"] == "auto" and "seed" not in study.baseline.values


BAD_LIVE = [
    ("a: {seed: 1}", "s.yaml:5: seed is no field of an arm: seeds of the study decides it"),
    ("a: {total_steps: 1}", "s.yaml:5: total_steps is no field of an arm: updates of the study decides it"),
    ("a: {optim: {lrr: 1}}", "s.yaml:5: unknown field 'optim.lrr' of an arm; did you mean 'optim.lr'?"),
    ("a: {optim: 1}", "s.yaml:5: optim must hold settings"),
    ("a: {objective: both}", "s.yaml:5: objective must be joint, supervised or q, not 'both'"),
    ("a: {num_envs: [4, 0]}", "s.yaml:5: num_envs must be at least 1, not 0"),
    ("a: {optim: {beta1: 3}}", "s.yaml:5: optim.beta1 must be between 0 and 1, not 3"),
    ("a: {agent: qq}", "s.yaml:5: agent 'qq' is unknown"),
    ("a: {agent_args: {epsilom: 1}}", "s.yaml:5: agent_args of QHaltingAgent: unknown 'epsilom'; did you mean"),
    ("a: {core: {kind: nosuch}}", "s.yaml:5: core.kind must be one of hrm, recurrent_transformer, direct_transformer"),
    ("a: {core: {kind: [trm, no.such.Core]}}", "s.yaml:5: core.kind: 'no.such.Core' cannot be imported"),
    ("bootstrap: [none, extra_forward]", "s.yaml:5: 'bootstrap' stands where the name of a block belongs: write arms: "
     "{any_name: {bootstrap: [none, extra_forward]}}, or a list, - {bootstrap: [none, extra_forward]}"),
    ("core: {kind: trm}", "s.yaml:5: 'core' stands where the name of a block belongs: write arms: {any_name: {core: "
     "{kind: trm}}}, or a list, - {core: {kind: trm}}"),
    ("optim: [{lr: 1}, {lr: 2}]", "s.yaml:5: 'optim' stands where the name of a block belongs"),
    ("agent_args: {epsilon: 1}", "s.yaml:5: 'agent_args' stands where the name of a block belongs"),
    ("a: {core: {num_heads: 5}}", "s.yaml:5: core.hidden_size (96) must be a multiple of core.num_heads (5)"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LIVE, ids=range(len(BAD_LIVE)))
def test_bad_live_arms(read, line, said):
    with pytest.raises(UserError) as error:
        read(f"{JOINT}  {line}\n")
    assert re.search(re.escape(said), str(error.value)) and "\n" not in str(error.value)


def test_a_block_may_bear_the_name_of_a_field(read):
    study = read(JOINT + "  core: {core: {kind: trm}}\n  bootstrap: [{bootstrap: none}, {num_envs: 2}]\n")
    assert names(study) == ["baseline", "core.kind=trm", "bootstrap=none", "num_envs=2"]
    assert names(read(Q + "  gamma: {gamma: [0.5, 0.9]}\n")) == ["baseline", "gamma=0.5", "gamma=0.9"]


@pytest.mark.parametrize(("blocks", "said"), [
    ("- {period: 7}", [("period=7", "baseline")]),
    ("- {period: [7, 8]}", [("period=7", "baseline"), ("period=8", "baseline")]),
    ("- {period: [100, 7]}", [("period=7", "baseline")]),  # 100 is the baseline's own
    ("- {target: [none, polyak], weight_decay: 0.1, period: [7, 8]}",
     [("target=none weight_decay=0.1 period=7", "baseline"), ("target=none weight_decay=0.1 period=8", "baseline"),
      ("target=polyak weight_decay=0.1 period=8", "target=polyak")]),
    ("- {target: [none, polyak], weight_decay: 0.1}", []),
    ("- {target: polyak, period: [7, 8]}", [("target=polyak period=8", "target=polyak")]),
    ("- {weight_decay: 0.1}", [("weight_decay=0.1", "baseline")]),
    ("- {target: polyak, period: 7}\n  - {name: slow, target: polyak}", []),  # it is slow, and slow it is called
    ("- {name: slow, target: polyak}\n  - {target: polyak, period: 7}", [("target=polyak period=7", "slow")]),
    ("- {target: [none, polyak], tau: [0.1, 0.2]}", []),  # crossed: tau counts beside one of them
    ("- {gamma: [0.9, 1]}", []), ("- {gamma: [0.9, 0.8]}\n  - {gamma: [0.9, 0.7], target: [none, hard]}", []),
])  # fmt: skip
def test_what_has_no_effect_is_said(read, blocks, said):
    assert list(read(f"{Q}  {blocks}\n").without_effect) == said


def test_calls_of_a_gradient_that_does_not_count_them_are_no_difference(read):
    study = read(JOINT + "  a: {core: {gradient: [one_step, last_k], gradient_k: [2, 3]}}\n"
                         "  b: {core: {gradient_k: 4}}\n")  # fmt: skip
    assert names(study) == ["baseline", "core.gradient=one_step", "core.gradient=last_k",
                            "core.gradient=last_k core.gradient_k=3"]  # fmt: skip
    assert study.without_effect == (("core.gradient_k=4", "baseline"),)


@pytest.mark.parametrize("name", spec.shipped_studies())
def test_shipped_studies_ask_for_nothing_without_effect(name):
    assert spec.load_study(spec.find_study(name)).without_effect == ()


# --- the studies that ship ------------------------------------------------------------------------------------


def test_shipped_studies_are_found_by_name():
    assert {"q_stability", "joint_stability"} <= set(spec.shipped_studies())
    assert "sudoku-4" not in spec.shipped_studies()
    assert spec.find_study("q_stability").is_file() and spec.find_study("x/y.yaml") == Path("x/y.yaml")
    with pytest.raises(UserError, match="study 'q_stabillity' is unknown; did you mean 'q_stability'.*are: .*joint"):
        spec.find_study("q_stabillity")


def test_the_standard_grid_has_every_switch_of_the_issue():
    study = spec.load_study(spec.find_study("q_stability"))
    held = {name: {arm.values[name] for arm in study.arms} for name in Arm().to_values()}
    for name, wanted in {
        "target": {"none", "polyak", "hard", "last_layer"}, "replay": {"none", "fifo", "uniform"},
        "backup": {"max", "double", "sarsa", "mc", "lambda"}, "loss": {"bce", "mse_values", "mse_logits"},
        "weight_decay": {0.0, 0.1, 1.0}, "head": {"linear", "mlp"}, "head_norm": {"none", "rmsnorm", "layernorm"},
        "optimizer": {"adamw", "adam", "sgd", "adam_atan2"}, "num_envs": {1, 32, 1024},
        "exploration": {"per_step", "per_episode"}, "q_bias": {0.0, -5.0}, "gamma": {0.9, 1.0},
        "ponder_cost": {0.0, 0.01}, "epsilon": {0.0, 0.1}, "lr": {1e-3, 0.1}, "tau": {0.005},
    }.items():  # fmt: skip
        assert wanted <= held[name], name
    assert study.seeds == 10 and len(study.runs) < 1500 and study.baseline.values == Arm().to_values()
    unstable = next(arm for arm in study.arms if arm.name == "unstable").values
    assert (unstable["num_envs"], unstable["weight_decay"], unstable["loss"]) == (1, 0.0, "mse_logits")
    assert unstable["lr"] >= 100 * Arm().lr


@given(st.dictionaries(st.sampled_from(["target", "replay", "backup", "head", "tau", "period", "lam", "head_width"]),
                       st.integers(0, 2), min_size=1))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_arms_are_distinct_and_what_has_no_effect_is_as_in_the_baseline(tmp_path_factory, chosen):
    values = {"target": ["none", "polyak", "hard"], "replay": ["none", "fifo"], "backup": ["max", "lambda"],
              "head": ["linear", "mlp"], "tau": [0.01, 0.1, 0.2], "period": [100, 5], "lam": [0.65, 0.1],
              "head_width": [128, 64]}  # fmt: skip
    path = tmp_path_factory.mktemp("spec") / "s.yaml"
    lines = "".join(f"    {name}: [{', '.join(map(str, values[name][: 1 + most]))}]\n" for name, most in chosen.items())
    path.write_text(f"{Q}  a:\n{lines}")
    arms = spec.load_study(path).arms
    assert len({arm.name for arm in arms}) == len({str(arm.values) for arm in arms}) == len(arms)
    for arm in arms:
        v = arm.values
        assert v["target"] == "polyak" or v["tau"] == 0.01
        assert v["backup"] == "lambda" or v["lam"] == 0.65
        assert arm.changes == {n: x for n, x in v.items() if x != getattr(Arm(), n)}
