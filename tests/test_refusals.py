"""What a new user got wrong without being told; each is one line now."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hrm_testing import small_config, small_core, small_puzzles, small_trainer

from agents import HaltingAgent, QHaltingAgent, make_agent
from hrm_rl import cli
from hrm_rl.config import TrainConfig
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.core.io import model_bytes
from hrm_rl.errors import UserError
from hrm_rl.trainer import Trainer, make_core, user_puzzles


class WrongShape(HaltingAgent):
    def act(self, view, q_logits=None, explore=False):
        return torch.zeros(3, dtype=torch.int64)


class Unseen(HaltingAgent):
    def score(self, view):
        return (view.previous_answer == 1).float().mean(-1)


class Broken(HaltingAgent):
    def score(self, view):
        return view.nothing


class NoSuper(HaltingAgent):
    def __init__(self, max_steps: int):
        self.max_steps = max_steps


class WrongLoss(Unseen):
    learns, sees = True, ("previous_answer",)

    def loss(self, transition):
        return 3


class NoLoss(WrongLoss):
    loss = HaltingAgent.loss


class Typed(HaltingAgent):
    def __init__(self, max_steps: int, tau: float = 0.5):
        super().__init__()
        self.tau = tau * 1.0 + max_steps


def test_a_setting_the_loaded_core_does_not_have():
    make_core(TrainConfig.from_values({"objective": "q", "core": {"dtype": "float32"}}), torch.device("cpu"))
    config = TrainConfig.from_values({"objective": "q", "core": {"hidden_size": 60, "dtype": "float32"}})
    with pytest.raises(UserError, match="core.hidden_size is 60, but the core that is loaded has 96"):
        make_core(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, {"gradient": "last_k", "gradient_k": 3}), ({"gradient": "full"}, {"gradient": "full", "gradient_k": 3}),
     ({"gradient_k": 5}, {"gradient": "last_k", "gradient_k": 5}),
     ({"gradient": "implicit", "solver": "iterate", "solver_tol": 0.5, "solver_steps": 7, "solver_window": 3},) * 2],
)  # fmt: skip
def test_how_far_the_gradient_reaches_is_the_runs_own(given, found, tmp_path):
    """Where it is named, else the loaded core's; the weights are the same, and what runs is written down."""
    core, path = HRMCore(small_core(gradient="last_k", gradient_k=3)), tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(core, None))
    values = {"size": 4, "init_core": str(path), "core": {"dtype": "float32", **given}, "device": "cpu",
              "compile": "off"}  # fmt: skip
    trainer = Trainer(TrainConfig.from_values(values), QHaltingAgent, puzzles=small_puzzles(4),
                      test_puzzles=small_puzzles(4))  # fmt: skip
    assert trainer.core.config == trainer.config.core == replace(core.config, **found)
    assert all(torch.equal(a, b) for a, b in zip(trainer.core.parameters(), core.parameters(), strict=True))
    again = TrainConfig.from_values(trainer.config.to_values())  # as --resume and --config read it
    assert make_core(again, torch.device("cpu")).config == trainer.core.config


def test_a_number_of_calls_that_nothing_looks_at(tmp_path):
    plain = {"size": 4, "device": "cpu", "core": {"dtype": "float32"}}

    def make(objective="joint", source=None, **core):
        values = plain | {"objective": objective, "init_core": source, "core": plain["core"] | core}
        return make_core(TrainConfig.from_values(values), torch.device("cpu"))

    core, path = HRMCore(small_core(gradient="last_k", gradient_k=3)), tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(core, None))
    for gradient in ("auto", "one_step", "full", "implicit"):
        said = f"core.gradient_k has no effect with core.gradient={gradient}; it counts with last_k"
        with pytest.raises(UserError, match=said):
            make(gradient=gradient, gradient_k=3)
        assert make(gradient=gradient).config.gradient == gradient  # the usual number says nothing
    for source in (None, str(path)):
        with pytest.raises(UserError, match="core.gradient_k must be at most 6, the calls of a segment of this core"):
            make(source=source, gradient="last_k", gradient_k=7)
        assert make(source=source, gradient="last_k", gradient_k=6).without_gradient == 0
    with pytest.raises(UserError, match="no effect with core.gradient=full"):
        make(source=str(path), gradient="full", gradient_k=4)
    with pytest.raises(UserError, match="no effect with core.gradient=auto"):  # as the core that ships has it
        make(objective="q", gradient_k=4)
    assert make(source=str(path), gradient="full", gradient_k=3).config.gradient_k == 3  # as the file has it


def test_the_configuration_written_down_is_the_core_that_runs():
    core = HRMCore(small_config().core, torch.Generator().manual_seed(0))
    trainer = small_trainer(core=core, objective="q", optim={"lr": 0.1})
    assert trainer.config.core is core.config


@pytest.mark.parametrize("box", [(2, 3), (9, 9), (-3, -3)])
def test_a_box_that_does_not_fit(box):
    CoreConfig(box=(3, 3))
    with pytest.raises(ValueError, match="core.box must be"):
        CoreConfig(box=box)


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".."])
def test_a_name_that_leads_elsewhere(name):
    with pytest.raises(UserError, match="name must be a folder's plain name"):
        small_config(name=name)


def test_an_agent_that_returns_another_shape():
    trainer = small_trainer(WrongShape, objective="supervised")
    with pytest.raises(UserError, match=r"agent WrongShape, update 1: act\(\) must return a tensor \(4,\), not \(3,\)"):
        trainer.update()


def test_an_agent_without_act_and_an_argument_of_the_wrong_type():
    with pytest.raises(UserError, match="agent HaltingAgent defines no act"):
        small_trainer(HaltingAgent, objective="supervised").update()
    with pytest.raises(UserError, match="agent_args of Typed"):
        make_agent(Typed, torch.nn.Identity(), 4, "none", {"tau": "a"})


def test_an_environment_that_is_no_halting_problem():
    with pytest.raises(UserError, match="env 'CartPole-v1' cannot be made"):
        Trainer(small_config(env="CartPole-v1"), HaltingAgent, puzzles=user_puzzles(None, 4, "train", 8))


def test_a_puzzle_with_two_solutions_is_refused_in_a_users_file(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text(f"source,question,answer,rating\nx,{'.' * 16},1234341221434321,0\n")
    with pytest.raises(UserError, match="two.csv:2"):
        user_puzzles(str(path), 4, "train")


def test_control_c_is_one_word(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        cli.run(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err.strip() == "stopped"


def test_a_file_system_that_refuses_is_one_line(monkeypatch, capsys, tmp_path):
    def refused(argv):
        (tmp_path / "no" / "such").write_text("x")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        cli.run(refused)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no' / 'such'}: No such file or directory\n"
    monkeypatch.setattr(sys, "argv", ["x", "--debug"])
    with pytest.raises(FileNotFoundError):
        cli.run(refused)


@pytest.mark.parametrize(("agent_class", "objective", "said"), [
    (Unseen, "supervised", r"agent Unseen, update 1: AttributeError at .*test_refusals.py:\d+ .*'previous_answer' in"),
    (Broken, "supervised", r"agent Broken, update 1: AttributeError at .*test_refusals.py:\d+ \('View' object has no"),
    (WrongLoss, "joint", r"agent WrongLoss, update 1: loss\(\) must return AgentLoss or QLosses, not int"),
    (NoLoss, "joint", r"agent NoLoss sets learns = True but defines no loss\(\)"),
])  # fmt: skip
def test_mistakes_in_an_agent_are_told_with_their_place(agent_class, objective, said):
    with pytest.raises(UserError, match=said):
        small_trainer(agent_class, objective=objective).update()


def test_an_agent_that_forgets_its_base():
    with pytest.raises(UserError, match=r"agent NoSuper: its __init__ does not call super\(\).__init__\(\)"):
        make_agent(NoSuper, torch.nn.Identity(), 4, "none")


def test_resume_needs_a_name_and_copies_an_ensemble():
    from hrm_rl import evaluate, train

    with pytest.raises(UserError, match="--resume: no run is named"):
        train.main(["--resume", ""])
    with pytest.raises(UserError, match="--copies: of an ensemble"):
        evaluate.main(["--copies", "3"])


def test_a_run_that_learned_nothing_leaves_nothing(tmp_path):
    from hrm_rl import checkpoint, train

    flags = ["--size", "4", "--device", "cpu", "--compile", "off", "--out", str(tmp_path), "--name", "x",
             "--total-steps", "2", "--test-limit", "4"]  # fmt: skip
    with pytest.raises(UserError, match="update 1"):
        train.main([*flags, "--objective", "supervised", "--agent", f"{__name__}.WrongShape"])
    assert not (tmp_path / "x").exists()
    (tmp_path / "r" / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "r" / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"step-3: no such checkpoint \(there are: none\)"):
        checkpoint.run_of(tmp_path / "r" / "checkpoints" / "step-3")
