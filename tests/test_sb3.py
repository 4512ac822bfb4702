"""stable-baselines3 on the halting problem: the VecEnv, the learning, the run, and a trained policy as an agent."""

from __future__ import annotations

import json
import re
import signal
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hrm_testing import ROOT, counting_core, small_config, small_core, small_puzzles

from agents import find_agent, make_agent
from agents.sb3 import SB3Agent
from envs import CONTINUE, HALT, SudokuHaltVectorEnv
from envs.sb3 import SB3VecEnv
from hrm_rl import evaluate, train
from hrm_rl.config import OptimConfig
from hrm_rl.core import HRMCore
from hrm_rl.core.io import load_core
from hrm_rl.errors import UserError
from hrm_rl.evaluation import solve, trajectories, views
from hrm_rl.metrics import read_metrics
from hrm_rl.sb3_training import SB3Trainer
from hrm_rl.trainer import is_due

ALGORITHMS = ("DQN", "PPO", pytest.param("A2C", marks=pytest.mark.slow))  # A2C learns as PPO does, in other doses
B, M = 4, 5
#: Settings with which a few hundred steps on the counting core are enough.
QUICK = {
    "DQN": {"net_arch": [], "learning_rate": 1e-2, "learning_starts": 50, "batch_size": 64, "buffer_size": 2000,
            "target_update_interval": 40},
    "PPO": {"net_arch": [16], "learning_rate": 1e-2, "n_steps": 16, "batch_size": 64, "n_epochs": 6},
    "A2C": {"net_arch": [16], "learning_rate": 1e-2, "n_steps": 8},
}  # fmt: skip
#: The same, smaller: for tests that count steps rather than learn.
BRIEF = {"DQN": {"learning_starts": 8, "batch_size": 8, "buffer_size": 40}, "PPO": {"n_steps": 4, "batch_size": 8},
         "A2C": {"n_steps": 4}}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was():
    """SB3 seeds NumPy's global generator, and the train command takes signals; both are put back."""
    held = np.random.get_state()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    np.random.set_state(held)
    for number, handler in before.items():
        signal.signal(number, handler)


def envs(right_from=2, right_until=None, num_envs=B, **keywords) -> SudokuHaltVectorEnv:
    puzzles = small_puzzles(8)
    core = counting_core(puzzles, right_from, right_until)
    return SudokuHaltVectorEnv(num_envs, data=puzzles, core=core, max_steps=M, augment=False, observation="q_token",
                               **keywords)  # fmt: skip


def trainer(name: str, arguments: dict | None = None, *, right=(3, 3), core=None, **changes) -> SB3Trainer:
    puzzles = small_puzzles(8)
    core = core or counting_core(puzzles, *right)
    settings = dict(objective="q", num_envs=8, max_steps=M, augment=False) | changes
    config = replace(small_config(**settings), optim=OptimConfig())
    return SB3Trainer(config, find_agent(f"sb3.{name}"), QUICK[name] if arguments is None else arguments, core=core,
                      puzzles=puzzles, test_puzzles=puzzles)  # fmt: skip


# --- the VecEnv ---------------------------------------------------------------------------------------------


def test_vec_env_gives_what_the_environment_gives():
    """The same observations, rewards and ends, step by step; the end's own observation and info beside them."""
    ours, theirs = envs(ponder_cost=0.25), SB3VecEnv(envs(ponder_cost=0.25))
    seen, _ = ours.reset(seed=5)
    theirs.seed(5)
    got = theirs.reset()
    assert np.array_equal(got, seen) and got.dtype == np.float32 and got.shape == (B, 10)
    assert [info["steps"] for info in theirs.reset_infos] == [1] * B
    generator, ended, forced = np.random.default_rng(0), 0, 0
    for _ in range(60):
        actions = (generator.random(B) > 0.2).astype(np.int64)
        last = got
        seen, reward, terminated, truncated, infos = ours.step(actions)
        got, rewards, dones, rows = theirs.step(actions)
        assert np.array_equal(got, seen) and np.array_equal(rewards, reward.astype(np.float32))
        assert rewards.dtype == np.float32 and dones.dtype == bool and np.array_equal(dones, terminated)
        assert not truncated.any() and len(rows) == B and all(type(row) is dict for row in rows)
        for i, row in enumerate(rows):
            assert ("terminal_observation" in row) == ("TimeLimit.truncated" in row) == dones[i]
            if not dones[i]:
                assert row["steps"] == got[i, 0]
                continue
            assert row["TimeLimit.truncated"] is False  # the forced halt is a termination too
            assert np.array_equal(row["terminal_observation"], last[i])  # of the finished episode, not of the next
            assert got[i, 0] == 1 and row["steps"] == last[i, 0]
            assert row["is_correct"] == (row["steps"] >= 2) == rewards[i]
            assert row["forced_halt"] == (actions[i] == CONTINUE)
            ended, forced = ended + 1, forced + row["forced_halt"]
    assert ended > 20 and forced > 2


def test_one_core_call_a_step():
    wrapped = SB3VecEnv(envs())
    wrapped.reset()
    core = wrapped.envs.engine.core
    before = core.calls
    for actions in (np.full(B, HALT), np.full(B, CONTINUE), np.array([0, 1, 0, 1])):
        wrapped.step(actions)
    assert core.calls == before + 3


def test_returns_as_sb3_counts_them():
    """SB3's own VecMonitor on top: returns and lengths of whole episodes, the ponder cost in them."""
    from stable_baselines3.common.vec_env import VecMonitor

    wrapped = VecMonitor(SB3VecEnv(envs(right_from=1, ponder_cost=0.25)))
    wrapped.seed(0)
    wrapped.reset()
    for _ in range(2):
        *_, infos = wrapped.step(np.full(B, CONTINUE))
        assert not any("episode" in info for info in infos)
    *_, infos = wrapped.step(np.full(B, HALT))
    for info in infos:
        assert info["episode"]["r"] == pytest.approx(1 - 2 * 0.25) and info["episode"]["l"] == 3


def test_the_rest_of_the_face():
    wrapped = SB3VecEnv(envs())
    assert wrapped.num_envs == B and wrapped.action_space.n == 2
    assert wrapped.get_attr("max_steps") == [M] * B and wrapped.get_attr("max_steps", [0, 2]) == [M] * 2
    assert wrapped.env_is_wrapped(gym.Wrapper) == [False] * B
    wrapped.set_options({"puzzle": 3})
    wrapped.reset()
    assert [info["puzzle"] for info in wrapped.reset_infos] == [3] * B
    wrapped.reset()
    assert {info["puzzle"] for info in wrapped.reset_infos} != {3}  # options hold for one reset
    assert np.array_equal(wrapped.env_method("state_dict", indices=0)[0]["steps"], np.ones(B))
    wrapped.close()
    with pytest.raises(UserError, match="tensors='numpy'"):
        SB3VecEnv(envs(tensors="torch"))


def test_the_documented_example_runs():
    (block,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "PLUGINS.md").read_text(), re.DOTALL)
    space: dict = {}
    exec(block, space)
    assert space["model"].num_timesteps >= 100


def test_sb3_checks_the_single_form():
    """SB3's checker knows single environments; a seeded slot of the vector form is one (tests/envs)."""
    import warnings

    from stable_baselines3.common.env_checker import check_env

    puzzles = small_puzzles(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("SudokuHalt-v0", data=puzzles, core=HRMCore(small_core()), observation="q_token").unwrapped)


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learns_the_known_optimum(name):
    """Right in segment 3 alone: the best policy halts there, and nowhere else earns anything."""
    learner = trainer(name, total_steps=480)
    before = {n: p.clone() for n, p in learner.agent.state_dict().items()}
    while learner.step < 480:
        learner.update()
    run = learner.evaluate(learner.test_puzzles, M)
    assert (run.halt_steps(M) == 3).all() and run.at(run.halt_steps(M))[0].all()
    assert any(not torch.equal(before[n], p) for n, p in learner.agent.state_dict().items())
    values = learner.line({}, 1.0)
    assert values["halt/episodes"] > 100 and 0 < values["halt/exact_accuracy"] < 1
    assert values["time/samples_per_second"] == 480 * 8


@pytest.mark.slow
def test_dqn_learns_the_known_values():
    """gamma 0.5, right from segment 3 on: Q(HALT) = 1 there and 0 before, Q(m, CONTINUE) = 0.5 to the power of the
    steps that are missing (and of one more step where the answer is right already)."""
    learner = trainer("DQN", QUICK["DQN"] | {"gamma": 0.5, "exploration_final_eps": 0.3}, right=(3, None),
                      total_steps=1200)  # fmt: skip
    while learner.step < 1200:
        learner.update()
    tokens = torch.stack([v.view.z_H[0, 0] for v in views(learner.core, (), learner.test_puzzles, M)])
    with torch.no_grad():
        values = learner.agent.policy.q_net(tokens)
    known = torch.tensor([[0, 0.25], [0, 0.5], [1, 0.5], [1, 0.5], [1, 1.0]])  # the last: a forced halt, undiscounted
    assert (values - known).abs().max() < 0.08, values


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_agent_is_the_policy_called_directly(name):
    """What evaluation runs is SB3's own deterministic `predict` on the q-token."""
    core = HRMCore(small_core(), torch.Generator().manual_seed(0))
    learner = trainer(name, BRIEF[name], core=core, total_steps=16, right=None)
    for _ in range(4):
        learner.update()
    run = trajectories(core, learner.agent, learner.test_puzzles, M, 3)
    for first, count, step, view, *_ in views(core, (), learner.test_puzzles, M, 3):
        actions, _ = learner.learner.predict(view.z_H[:, 0].float().numpy(), deterministic=True)
        wish = run.wish[step - 1, first : first + count].numpy()
        assert np.array_equal(wish, (actions == HALT)[:count])
        scores = learner.agent.score(view)[:count]
        assert torch.allclose(run.scores[step - 1, first : first + count], scores)
        if name != "DQN":
            p = learner.agent.policy.get_distribution(view.z_H[:, 0].float()).distribution.probs[:count]
            assert torch.allclose(scores, (p[:, HALT] / p[:, CONTINUE]).log(), atol=1e-5)


def test_the_core_stays_as_it_is():
    core = HRMCore(small_core(), torch.Generator().manual_seed(0))
    before = {n: t.clone() for n, t in core.state_dict().items()}
    learner = trainer("PPO", BRIEF["PPO"], core=core, total_steps=16, right=None)
    for _ in range(4):
        learner.update()
    assert all(torch.equal(before[n], t) for n, t in core.state_dict().items())
    assert not any(p.requires_grad for p in core.parameters())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_goes_on_number_for_number(name):
    def fresh() -> SB3Trainer:
        core = HRMCore(small_core(), torch.Generator().manual_seed(0))
        return trainer(name, BRIEF[name], core=core, total_steps=40, right=None, augment=True, num_envs=4)

    def go(learner: SB3Trainer, rounds: int) -> dict[str, torch.Tensor]:
        for _ in range(rounds):
            learner.update()
        return {n: t.clone() for n, t in learner.state()[0].items()}

    straight = go(fresh(), 7)
    stopped = fresh()
    go(stopped, 4)
    tensors, plain = stopped.state()
    tensors = {n: t.clone() for n, t in tensors.items()}
    plain = json.loads(json.dumps({**plain, "step": stopped.step}))  # as state.json holds it
    finals = {}
    for kind, held in (("all", plain), ("without generators", plain | {"random": fresh().state()[1]["random"]})):
        resumed = fresh()
        resumed.load_state(tensors, held)
        assert resumed.step == stopped.step
        finals[kind] = go(resumed, 3)
    assert set(finals["all"]) == set(straight)
    assert all(torch.equal(straight[n], finals["all"][n]) for n in straight)
    assert any(not torch.equal(straight[n], finals["without generators"][n]) for n in straight)  # negative control


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    from hrm_rl.core.io import model_bytes

    path = tmp_path / "core.safetensors"
    path.write_bytes(model_bytes(HRMCore(small_core(), torch.Generator().manual_seed(0)), None, {"max_steps": 3}))
    return path


def words(name: str, model, out, *more: str) -> list[str]:
    given = {
        "size": 4, "num_envs": 4, "max_steps": 3, "device": "cpu", "compile": "off", "log_every": 3, "eval_every": 8,
        "checkpoint_every": 8, "total_steps": 24, "test_limit": 8, "eval_puzzles": 4, "objective": "q", "out": out,
        "init_core": model, "agent": f"sb3.{name}",
    }  # fmt: skip
    flags = [f"--agent.{n}={v}" for n, v in BRIEF[name].items()]
    return [f"--{n}={v}" for n, v in given.items()] + flags + list(more)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_is_a_run_like_every_other(name, tmp_path, model, capsys):
    out = tmp_path / "runs"
    assert train.main(words(name, model, out, "--name=r")) == 0
    run = out / "r"
    said = capsys.readouterr().out
    assert "learned, at most 3" in said and "fixed at 3" in said
    kinds = {path.suffix for path in run.rglob("*") if path.is_file() and path.parent.name != "tensorboard"}
    assert kinds == {"", ".yaml", ".jsonl", ".json", ".png", ".safetensors"}  # "": the lock; no .zip, no .pkl
    assert len(list(run.glob("tensorboard/events*"))) == 1
    lines = read_metrics(run)
    assert lines[-1]["step"] == 24 and any("eval/exact_accuracy" in line for line in lines)
    assert any("halt/mean_steps" in line for line in lines)
    assert any(tag.startswith("agent/") and tag.endswith("loss") for line in lines for tag in line)
    report = json.loads((run / "report.json").read_text())
    assert report["updates"] == 24 and len(report["fixed_steps"]) == 3
    # the model file alone rebuilds the agent, and it halts as the report says
    loaded = load_core(run)
    agent = make_agent(find_agent(loaded.meta["agent"]), loaded.core, 3, "none", loaded.meta["agent_args"])
    agent.load_state_dict(loaded.agent_tensors)
    from hrm_rl.tasks import load_puzzles

    solved = solve(loaded.core, agent, load_puzzles("sudoku-4", 4, "test", 8), 3, 4)
    row = report["learned_halt"][-1]
    assert solved.steps.float().mean().item() == pytest.approx(row["mean_steps"])
    assert solved.exact.float().mean().item() == pytest.approx(row["exact_accuracy"])
    argv = [str(run), "--agent", f"sb3.{name}", "--limit=8", "--batch-size=4", f"--out={tmp_path / 'e.json'}"]
    assert evaluate.main(argv) == 0 and f"{name}, at most 3" in capsys.readouterr().out
    again = json.loads((tmp_path / "e.json").read_text())["learned_halt"][-1]
    assert (again["mean_steps"], again["exact_accuracy"]) == (row["mean_steps"], row["exact_accuracy"])
    # and the run goes on
    assert train.main(["--resume", str(run), "--total-steps=32"]) == 0
    assert read_metrics(run)[-1]["step"] == 32


def test_lines_fall_where_a_rollout_passes_them():
    """PPO collects some steps before it learns: what is due within them is done at their end, never left out."""
    learner = trainer("PPO", BRIEF["PPO"], total_steps=40)
    assert learner.stride == 4 and trainer("DQN", BRIEF["DQN"], total_steps=40).stride == 1
    due = [step for step in range(0, 24, 4) if any(is_due(s, 6) for s in range(step + 1, step + 5))]
    assert [step + 4 for step in due] == [8, 12, 20, 24]  # multiples of 6: 6, 12, 18, 24


@pytest.mark.parametrize(
    "more, said",
    [
        (["--objective=joint"], "agent sb3.DQN learns on a frozen core: it needs objective q, not joint"),
        (["--objective=supervised"], "needs objective q, not supervised"),
        (["--agent.learning_rat=1"], "unknown 'learning_rat'; did you mean 'learning_rate'?"),
        (["--agent.learning_rate=much"], "learning_rate must be float, not 'much'"),
        (["--agent.gamma=1.5"], "agent.gamma must be between 0 and 1, not 1.5"),
        (["--agent.batch_size=0"], "agent.batch_size must be at least 1, not 0"),
        (["--agent.net_arch=[0]"], r"net_arch must hold at most 8 sizes between 1 and 4096, not \[0\]"),
        (["--agent=sb3.DQM"], "agent 'sb3.DQM' is unknown; did you mean 'sb3.DQN'?"),
        (["--cuda_graph=on"], "cuda_graph=on: agent sb3.DQN learns in stable-baselines3's own loop"),
        (["--optim.lr=0.1"], "optim: agent sb3.DQN has an optimiser of its own"),
    ],
)
def test_refusals(more, said, tmp_path, model):
    with pytest.raises(UserError, match=said) as error:
        train.main(words("DQN", model, tmp_path / "runs", *more))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_what_sb3_itself_refuses():
    with pytest.raises(UserError, match="agent_args of PPOAgent: SB3 refuses the settings .*greater than 1"):
        trainer("PPO", {"n_steps": 1}, num_envs=1)


def test_an_untrained_one_is_not_evaluated():
    with pytest.raises(UserError, match="holds no weights 'policy.* of DQNAgent; train with this agent first"):
        evaluate.main(["--agent", "sb3.DQN", "--limit", "4"])


def test_without_sb3_it_says_so(monkeypatch, tmp_path, model):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(UserError, match="needs stable-baselines3 .*; pip install stable-baselines3"):
        train.main(words("DQN", model, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_our_trainer_refuses_it():
    from hrm_testing import small_trainer

    with pytest.raises(UserError, match="--objective q --agent sb3.DQN"):
        small_trainer(find_agent("sb3.DQN")).update()


def test_sb3_is_imported_only_where_it_is_used():
    import subprocess

    code = "import sys, agents, hrm_rl.train, hrm_rl.evaluate; agents.find_agent('sb3.PPO'); " \
           "sys.exit(any(name.startswith('stable_baselines3') for name in sys.modules))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert issubclass(find_agent("sb3.PPO"), SB3Agent)
