"""Rewards, ends and forced halts against a core that is right from segment k on, written down by hand."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from envs import CONTINUE, HALT, SudokuHaltEnv, SudokuHaltVectorEnv
from hrm_rl.errors import UserError


def rollout(env, actions, seed=0):
    """Take actions until the episode ends: (rewards, infos, actions left over)."""
    _, info = env.reset(seed=seed)
    rewards, infos, actions = [], [info], list(actions)
    while actions:
        _, reward, terminated, truncated, info = env.step(actions.pop(0))
        assert truncated is False
        rewards.append(reward)
        infos.append(info)
        if terminated:
            break
    return rewards, infos, actions


@pytest.mark.parametrize("halt_at", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("right_from", [1, 3, 5])
def test_halt_is_scored_by_the_segment_it_is_taken_in(puzzles, counting, halt_at, right_from):
    env = SudokuHaltEnv(data=puzzles, core=counting(right_from), max_steps=8)
    rewards, infos, left = rollout(env, [CONTINUE] * (halt_at - 1) + [HALT, HALT])
    assert rewards == [0.0] * (halt_at - 1) + [float(halt_at >= right_from)]
    assert [info["steps"] for info in infos] == [*range(1, halt_at + 1), halt_at]
    assert infos[-1]["is_correct"] is (halt_at >= right_from)
    assert infos[-1]["token_accuracy"] == float(halt_at >= right_from)
    assert infos[-1]["forced_halt"] is False
    assert all("forced_halt" not in info for info in infos[:-1])
    assert left == [HALT]


def test_an_answer_that_gets_worse_again_is_scored_at_the_halt(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(2, right_until=3), max_steps=8)
    earned = [sum(rollout(env, [CONTINUE] * (m - 1) + [HALT])[0]) for m in range(1, 6)]
    assert earned == [0.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("right_from", "reward"), [(3, 1.0), (4, 0.0)])
def test_the_budget_forces_a_halt_that_is_scored(puzzles, counting, right_from, reward):
    env = SudokuHaltEnv(data=puzzles, core=counting(right_from), max_steps=3)
    rewards, infos, _ = rollout(env, [CONTINUE] * 9)
    assert rewards == [0.0, 0.0, reward]
    assert infos[-1]["forced_halt"] is True and infos[-1]["steps"] == 3


def test_halting_at_the_budget_is_not_forced(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(1), max_steps=2)
    rewards, infos, _ = rollout(env, [CONTINUE, HALT])
    assert rewards == [0.0, 1.0] and infos[-1]["forced_halt"] is False


def test_max_steps_of_one_leaves_no_choice(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(1), max_steps=1, ponder_cost=0.5)
    rewards, infos, _ = rollout(env, [CONTINUE])
    assert rewards == [1.0] and infos[-1]["forced_halt"] is True


@pytest.mark.parametrize("cost", [0.0, 0.125])
def test_ponder_cost_is_paid_for_each_further_segment_only(puzzles, counting, cost):
    env = SudokuHaltEnv(data=puzzles, core=counting(3), max_steps=3, ponder_cost=cost)
    assert rollout(env, [CONTINUE] * 3)[0] == [-cost, -cost, 1.0]  # the forced halt costs nothing
    assert rollout(env, [CONTINUE, HALT])[0] == [-cost, 0.0]
    assert str(rollout(env, [CONTINUE, HALT])[0][0]) == str(0.0 - cost)  # never -0.0


def test_padding_is_never_right(padded_puzzles, counting):
    env = SudokuHaltEnv(data=padded_puzzles, core=counting(1), max_steps=4)
    for puzzle, reward in ((0, 1.0), (1, 0.0)):
        env.reset(seed=0, options={"puzzle": puzzle})
        assert env.slots.valid.tolist() == [puzzle == 0]
        assert (env.slots.labels == -100).all().item() is (puzzle == 1)
        _, earned, _, _, info = env.step(HALT)
        assert earned == reward and info["is_correct"] is (reward == 1.0)


def test_vector_form_earns_the_same(puzzles, counting):
    core = counting(3)
    env = SudokuHaltVectorEnv(4, data=puzzles, core=core, max_steps=4, ponder_cost=0.25)
    env.reset(seed=0)
    halt_at = np.array([1, 2, 3, 9])  # the last one is forced at 4
    episode_step, rewards, forced = np.ones(4, dtype=int), [], []
    for _ in range(4):
        actions = np.where(episode_step >= halt_at, HALT, CONTINUE)
        _, reward, terminated, truncated, info = env.step(actions)
        rewards.append(reward.tolist())
        forced.append(info["final_info"]["forced_halt"].tolist())
        episode_step = np.where(terminated, 1, episode_step + 1)
        assert info["steps"].tolist() == episode_step.tolist() and not truncated.any()
    assert rewards == [
        [0.0, -0.25, -0.25, -0.25],
        [0.0, 0.0, -0.25, -0.25],
        [0.0, -0.25, 1.0, -0.25],
        [0.0, 0.0, -0.25, 1.0],
    ]
    assert forced == [[False] * 4] * 3 + [[False, False, False, True]]
    assert core.calls == 5  # one for the reset and one a step


def test_reset_options(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(1))
    for puzzle in range(len(puzzles)):
        _, info = env.reset(options={"puzzle": puzzle, "augment": False})
        assert info["puzzle"] == puzzle and info["rating"] == puzzles.ratings[puzzle].item()
        assert env.slots.tokens[0].tolist() == puzzles.questions[puzzle].tolist()
    shown = [env.reset(options={"puzzle": 0})[0] is None or env.slots.tokens[0].tolist() for _ in range(5)]
    assert any(tokens != puzzles.questions[0].tolist() for tokens in shown)  # augmented again
    vector = SudokuHaltVectorEnv(3, data=puzzles, core=counting(1))
    assert vector.reset(options={"puzzle": [2, 0, 1]})[1]["puzzle"].tolist() == [2, 0, 1]
    assert vector.reset(options={"puzzle": 4})[1]["puzzle"].tolist() == [4, 4, 4]
    for bad in ({"puzzel": 1}, {"puzzle": len(puzzles)}, {"puzzle": -1}, {"puzzle": 0.5}, {"augment": 1}):
        with pytest.raises(UserError, match="options"):
            env.reset(options=bad)


def test_augment_false_shows_the_puzzles_as_written(puzzles, counting):
    written = {tuple(q) for q in puzzles.questions.tolist()}
    for augment in (True, False):
        env = SudokuHaltVectorEnv(16, data=puzzles, core=counting(1), augment=augment)
        env.reset(seed=0)
        env.step(np.full(16, HALT))  # the puzzles of the auto-reset count too
        assert ({tuple(q) for q in env.slots.tokens.tolist()} <= written) is not augment


def test_step_needs_a_running_episode_and_a_known_action(puzzles, counting):
    env = SudokuHaltEnv(data=puzzles, core=counting(1))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(HALT)
    env.reset(seed=0)
    with pytest.raises(UserError, match="action must be 0"):
        env.step(2)
    env.step(HALT)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(HALT)
    vector = SudokuHaltVectorEnv(2, data=puzzles, core=counting(1))
    with pytest.raises(RuntimeError, match="reset"):
        vector.step(np.array([HALT, HALT]))
    vector.reset(seed=0)
    for bad in (np.array([0, 2]), np.array([0]), np.array([0.0, 1.0])):
        with pytest.raises(UserError, match="actions must"):
            vector.step(bad)
