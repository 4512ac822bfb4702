"""Every id this project registers is made, checked by Gymnasium's and SB3's checkers, and documented."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import load_env_creator
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3
from task_testing import problem_of

import hrm_rl

IDS = [spec.id for spec in gym.registry.values() if str(spec.entry_point).startswith(("envs.", "hrm_rl."))]
OBSERVATIONS = ("z_H", "q_token", "mean")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_something_is_registered():
    ours = {"SudokuHalt-v0", "MazeHalt-v0", "NQueensHalt-v0", "FutoshikiHalt-v0", "MiniSudokuHalt-v0"}
    assert ours == set(IDS)
    assert hrm_rl.__version__ == "0.1.0"


def test_importing_the_package_is_light():
    """Neither torch nor the environments are imported before one is made."""
    code = "import sys, hrm_rl; print(sorted({'torch', 'envs', 'agents', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("env_id", IDS)
def test_the_forced_halt_stays_a_termination(env_id):
    spec = gym.spec(env_id)
    assert spec.max_episode_steps is None and spec.nondeterministic is False
    assert isinstance(spec.entry_point, str) and isinstance(spec.vector_entry_point, str)


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("env_id", IDS)
def test_checkers_find_nothing(env_id, observation):
    env = gym.make(env_id, **problem_of(env_id), observation=observation, max_steps=4)
    check_env(env.unwrapped)
    check_env_of_sb3(env)
    check_env_of_sb3(env.unwrapped)


@pytest.mark.parametrize("env_id", ["SudokuHalt-v0", *(
    pytest.param(env_id, marks=pytest.mark.slow) for env_id in IDS if env_id != "SudokuHalt-v0")])  # fmt: skip
def test_as_it_comes(env_id):
    """With no argument: the packaged puzzles and the packaged core."""
    env = gym.make(f"hrm_rl:{env_id}")
    check_env(env.unwrapped)
    envs = gym.make_vec(f"hrm_rl:{env_id}", num_envs=2)
    obs, _ = envs.reset(seed=0)
    assert obs in envs.observation_space


@pytest.mark.parametrize("env_id", IDS)
def test_make_vec_takes_the_vector_form(env_id):
    problem = problem_of(env_id)
    core = problem["core"]
    envs = gym.make_vec(f"hrm_rl:{env_id}", num_envs=4, **problem)
    assert isinstance(envs, load_env_creator(gym.spec(env_id).vector_entry_point))
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (4, core.num_positions * core.hidden_size) and obs.dtype == np.float32
    assert obs in envs.observation_space
    assert envs.step(envs.action_space.sample())[0] in envs.observation_space
    envs.close()
    envs.close()


@pytest.mark.parametrize("env_id", IDS)
def test_every_argument_is_documented(env_id):
    spec = gym.spec(env_id)
    single, vector = load_env_creator(spec.entry_point), load_env_creator(spec.vector_entry_point)
    headings = ["Description", "Action Space", "Observation Space", "Rewards", "Starting State",
                "Episode End", "Arguments", "Version History"]  # fmt: skip
    for kind in (single, vector):
        found = [line.strip()[3:] for line in kind.__doc__.splitlines() if line.strip().startswith("## ")]
        assert found == headings
    for name, argument in list(inspect.signature(single).parameters.items()):
        default = f'"{argument.default}"' if isinstance(argument.default, str) else str(argument.default)
        assert f"| `{name}` | {default} |" in single.__doc__
    own = set(inspect.signature(vector).parameters) - set(inspect.signature(single).parameters)
    assert own == {"num_envs", "tensors"} and all(f"| `{name}` |" in vector.__doc__ for name in own)
