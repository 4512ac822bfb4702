"""The configuration: ranges, unknown keys, YAML there and back."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hrm_testing import ROOT, small_config

from hrm_rl import cli
from hrm_rl.config import OptimConfig, TrainConfig
from hrm_rl.core import CoreConfig
from hrm_rl.errors import UserError
from hrm_rl.train import build_parser, read_options


def options(*argv: str):
    return cli.parse(build_parser(), list(argv))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1, not 0"), ({"max_steps": 0}, "max_steps"),
        ({"ponder_cost": -1}, "ponder_cost"), ({"total_steps": -1}, "total_steps"), ({"log_every": 0}, "log_every"),
        ({"halt_weight": -0.5}, "halt_weight"), ({"optim": {"lr": -1e-3}}, "optim.lr must be at least 0"),
        ({"optim": {"beta2": 1.5}}, "optim.beta2 must be between 0 and 1"), ({"optim": {"ema": 2}}, "optim.ema"),
        ({"optim": {"final_lr": 1.1}}, "optim.final_lr"), ({"core": {"H_cycles": 0}}, "core.H_cycles"),
        ({"core": {"num_heads": 5}}, "core.num_heads"), ({"core": {"hidden_sise": 3}}, "did you mean 'hidden_size'"),
        ({"core": {"seq_len": 80}}, "seq_len=80"), ({"core": {"puzzle_emb_ndim": -1}}, "core.puzzle_emb_ndim"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda .*'gpu'"),
    ],
)  # fmt: skip
def test_values_out_of_range(values, said):
    with pytest.raises(UserError, match=said) as error:
        TrainConfig.from_values(values)
    assert "\n" not in str(error.value)


def test_nan_is_out_of_range():
    with pytest.raises(UserError, match="optim.lr"):
        OptimConfig(lr=float("nan"))


def test_dtype_is_decided_or_kept():
    assert TrainConfig.from_values({"core": {"dtype": "auto"}}).core.dtype in ("float32", "bfloat16")
    assert TrainConfig.from_values({"core": {"dtype": "float16"}}).core.dtype == "float16"
    with pytest.raises(UserError, match="dtype"):
        options("--core.dtype", "float8")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num-env", "3"], "num_envs"), (["--optim.learning_rate", "3"], "learning_rate"),
        (["--objective", "both"], "objective"), (["--max-steps", "many"], "max_steps"), (["--size", "five"], "size"),
        (["--core.hidden_size", "x"], "hidden_size"), (["--q-to-core", "maybe"], "q_to_core"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit(argv, said):
    with pytest.raises(UserError, match=said) as error:
        options(*argv)
    assert "\n" not in str(error.value)


def test_unknown_keys_of_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    for content, said in (("max_step: 4", "max_step"), ("optim:\n  lrr: 0.1", "lrr"), ("core:\n  width: 4", "width")):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            options("--config", str(file))
    with pytest.raises(UserError):
        options("--config", str(tmp_path / "nothing.yaml"))


def test_flags_win_over_the_file_and_dashes_are_underscores(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 3\nq_to_core: true\noptim:\n  lr: 0.5\nsize: 4\n")
    config, _, _ = read_options(options("--config", str(file), "--max-steps", "5", "--q-to-core", "false"))
    assert (config.max_steps, config.q_to_core, config.optim.lr, config.size) == (5, False, 0.5, 4)
    assert (config.core.seq_len, config.core.vocab_size) == (16, 6)  # follow the size


def test_there_and_back(tmp_path):
    config = small_config(name="x", data="a.csv", optim={"lr": 3e-4})
    assert TrainConfig.from_values(config.to_values()) == config
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_values()))
    again, agent, arguments = read_options(options("--config", str(file)))
    assert again == config and arguments == {}


def test_frozen_and_explained():
    """Every field of every configuration has its sentence in --help."""
    text = build_parser().format_help()
    for kind, prefix in ((TrainConfig, ""), (OptimConfig, "optim."), (CoreConfig, "core.")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, None)
        for field in dataclasses.fields(kind):
            assert f"  {field.name}: " in kind.__doc__.replace("        ", "  "), field.name
            if not dataclasses.is_dataclass(field.default_factory):
                assert f"--{prefix}{field.name}" in text


RECIPES = sorted(p.name for p in (ROOT / "configs").glob("*.yaml") if "\narms:" not in p.read_text())  # not studies


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_recipes_are_valid(name):
    config, agent, _ = read_options(options("--config", str(ROOT / "configs" / name), "--device", "cpu"))
    assert isinstance(config, TrainConfig) and isinstance(agent, type)


def test_agents_by_name():
    from agents import FixedAgent, QHaltingAgent, find_agent

    assert read_options(options("--size", "4"))[1] is QHaltingAgent
    assert read_options(options("--size", "4", "--objective", "supervised"))[1] is FixedAgent
    assert read_options(options("--agent", "fixed", "--agent_args", "{k: 2}"))[1:] == (FixedAgent, {"k": 2})
    assert find_agent("agents.fixed.FixedAgent") is FixedAgent and find_agent("q") is QHaltingAgent
    wrong = {"qq": "unknown", "agents.nothing.X": "cannot be imported", "hrm_rl.config.TrainConfig": "subclass"}
    for name, said in wrong.items():
        with pytest.raises(UserError, match=said):
            find_agent(name)
