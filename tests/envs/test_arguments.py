"""Bad arguments: one line that names argument, value and choices. Good ones: each changes something."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from envs import SudokuHaltEnv, SudokuHaltVectorEnv
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 5}, "size must be one of 4, 6, 9, not 5"),
        ({"size": 9}, "size is 9 and data .* holds puzzles of side 4"),
        ({"split": "tset"}, "split must be one of 'train', 'test', not 'tset'; did you mean 'test'"),
        ({"max_steps": 0}, "max_steps must be .* not 0"),
        ({"max_steps": 2.5}, "max_steps must be .* not 2.5"),
        ({"max_steps": True}, "max_steps must be .* not True"),
        ({"observation": "z_L"}, "observation must be one of 'z_H', 'q_token', 'mean', not 'z_L'"),
        ({"flatten": 1}, "flatten must be one of True, False, not 1"),
        ({"augment": "no"}, "augment must be one of True, False, not 'no'"),
        ({"ponder_cost": -0.1}, "ponder_cost must be .* not -0.1"),
        ({"ponder_cost": float("nan")}, "ponder_cost must be .* not nan"),
        ({"ponder_cost": "0"}, "ponder_cost must be .* not '0'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "meta"}, "core is on cpu and device is 'meta'"),
        ({"render_mode": "human"}, "render_mode must be one of None, 'ansi', 'rgb_array', not 'human'"),
        ({"data": 7}, "data must be .* not int"),
        ({"core": 7}, "core must be .* not int"),
        ({"core": torch.nn.Linear(2, 2)}, "core: Linear has no initial_state"),
        (
            {"core": HRMCore(CoreConfig(hidden_size=8, inner_multiple=8))},
            "core: made for seq_len 81, .* need 16",
        ),
        ({"core": "no/such/run"}, "no/such/run"),
    ],
)
def test_bad_arguments(puzzles, core, arguments, message):
    arguments = {"data": puzzles, "core": core} | arguments
    for kind in (SudokuHaltEnv, SudokuHaltVectorEnv):
        with pytest.raises(UserError, match=message) as error:
            kind(**arguments)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{"num_envs": 0}, {"num_envs": 1.5}, {"tensors": "jax"}])
def test_bad_arguments_of_the_vector_form(puzzles, core, arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        SudokuHaltVectorEnv(data=puzzles, core=core, **arguments)


def test_empty_data(puzzles, core):
    empty = dataclasses.replace(
        puzzles, questions=puzzles.questions[:0], answers=puzzles.answers[:0], ratings=puzzles.ratings[:0],
        sources=(),
    )  # fmt: skip
    with pytest.raises(UserError, match="holds no puzzle"):
        SudokuHaltEnv(data=empty, core=core)


def test_observation_modes(puzzles, core):
    def observe(**kwargs):
        env = SudokuHaltEnv(data=puzzles, core=core, **kwargs)
        obs, _ = env.reset(seed=0)
        assert obs in env.observation_space and obs.dtype == np.float32
        assert np.isfinite(env.observation_space.high).all()
        return obs, env.slots.z_H[0]

    T, D = core.num_positions, core.hidden_size
    obs, z_H = observe()
    np.testing.assert_array_equal(obs, z_H.flatten())
    obs, z_H = observe(flatten=False)
    assert obs.shape == (T, D)
    np.testing.assert_array_equal(obs, z_H)
    np.testing.assert_array_equal(observe(observation="q_token")[0], z_H[0])
    np.testing.assert_allclose(observe(observation="mean")[0], z_H.mean(0), atol=1e-6)


def test_a_bfloat16_core_is_observed_in_float32(puzzles, core):
    half = HRMCore(dataclasses.replace(core.config, dtype="bfloat16"), torch.Generator().manual_seed(0))
    env = SudokuHaltVectorEnv(8, data=puzzles, core=half)
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        assert obs.dtype == np.float32 and obs in env.observation_space
        obs, *_ = env.step(env.action_space.sample())
    assert env.slots.z_H.dtype == torch.bfloat16


def test_a_core_without_a_bound_has_an_unbounded_space(puzzles, counting):
    assert not np.isfinite(SudokuHaltEnv(data=puzzles, core=counting(1)).observation_space.high).any()


def test_size_follows_data_and_core(puzzles, core):
    assert SudokuHaltEnv(data=puzzles, core=core).engine.puzzles.side == 4
    assert SudokuHaltEnv(data=puzzles, core=core).max_steps == 16
    assert SudokuHaltEnv(core=core).engine.puzzles.side == 4  # the packaged puzzles of the core's size


def test_split_and_data_by_name(core):
    train, test = (SudokuHaltEnv(core=core, split=split).engine.puzzles for split in ("train", "test"))
    assert train.sha256 != test.sha256
    named = SudokuHaltEnv(core=core, data="sudoku-4", split="test").engine.puzzles
    assert named.sha256 == test.sha256


def test_core_and_q_head_from_a_model_file(puzzles, core, tmp_path):
    from hrm_rl.core.io import model_bytes
    from hrm_rl.core.q_head import QHead

    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(core, QHead(core.hidden_size, bias=0.0), {"max_steps": 5}))
    env = SudokuHaltEnv(data=puzzles, core=path, render_mode="ansi")
    assert env.max_steps == 5 and SudokuHaltEnv(data=puzzles, core=str(path), max_steps=7).max_steps == 7
    here = SudokuHaltEnv(data=puzzles, core=core)
    np.testing.assert_array_equal(env.reset(seed=0)[0], here.reset(seed=0)[0])
    assert "q_halt 0.50" in env.render()
