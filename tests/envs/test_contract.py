"""Whatever the actions: the contract of the decision process holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import CONTINUE, HALT, SudokuHaltEnv, SudokuHaltVectorEnv

ACTION = st.sampled_from((HALT, CONTINUE))
SETTINGS = settings(max_examples=25, deadline=None)


@pytest.fixture
def made(puzzles, core):
    """Environments shared by the examples of a test: only their seeds and actions differ."""

    def make(kind, **kwargs):
        return kind(data=puzzles, core=core, ponder_cost=0.0625, **kwargs)

    return make


def test_single_form(made):
    env = made(SudokuHaltEnv, max_steps=3)

    @SETTINGS
    @given(seed=st.integers(0, 2**31), actions=st.lists(ACTION, min_size=1, max_size=12))
    def holds(seed, actions):
        first, _ = env.reset(seed=seed)
        tokens = env.slots.tokens.clone()
        step = 1
        for action in actions:
            obs, reward, terminated, truncated, info = env.step(action)
            assert obs in env.observation_space and truncated is False
            assert terminated is (action == HALT or step == env.max_steps)
            assert reward in ((0.0, 1.0) if terminated else (-0.0625,))
            assert ("forced_halt" in info) is terminated
            step += not terminated
            assert info["steps"] == step <= env.max_steps
            if terminated:
                assert info["forced_halt"] is (action == CONTINUE)
                assert reward == info["is_correct"]
                obs, info = env.reset()
                assert obs in env.observation_space and info["steps"] == 1
                step = 1
        again, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(first, again)
        assert (tokens == env.slots.tokens).all()

    holds()


def test_vector_form(made):
    env = made(SudokuHaltVectorEnv, num_envs=3, max_steps=3)

    @SETTINGS
    @given(seed=st.integers(0, 2**31), actions=st.lists(st.tuples(ACTION, ACTION, ACTION), max_size=8))
    def holds(seed, actions):
        first, info = env.reset(seed=seed)
        steps, episodes = np.ones(3, dtype=int), np.zeros(3, dtype=int)
        for chosen in map(np.array, actions):
            obs, rewards, terminated, truncated, info = env.step(chosen)
            assert obs in env.observation_space and not truncated.any()
            np.testing.assert_array_equal(terminated, (chosen == HALT) | (steps == env.max_steps))
            assert np.isin(rewards[terminated], (0.0, 1.0)).all() and (rewards[~terminated] == -0.0625).all()
            if terminated.any():
                np.testing.assert_array_equal(info["final_info"]["steps"], np.where(terminated, steps, 0))
                assert all((o is not None) == t for o, t in zip(info["final_obs"], terminated, strict=True))
            steps, episodes = np.where(terminated, 1, steps + 1), episodes + terminated
            np.testing.assert_array_equal(info["steps"], steps)
            np.testing.assert_array_equal(env.slots.episode.numpy(), episodes)
        np.testing.assert_array_equal(first, env.reset(seed=seed)[0])

    holds()


def test_puzzles_are_drawn_uniformly(made, puzzles):
    env = made(SudokuHaltVectorEnv, num_envs=64)
    env.reset(seed=0)
    counts = np.zeros(len(puzzles))
    for _ in range(25):
        *_, info = env.step(np.full(64, HALT))
        counts += np.bincount(info["puzzle"], minlength=len(puzzles))
    expected = counts.sum() / len(puzzles)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001
