"""The vector form: the same process as the single one, SAME_STEP fields, seeds and checkpoints."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from envs import CONTINUE, HALT, SudokuHaltEnv, SudokuHaltVectorEnv
from hrm_rl.errors import UserError

SLOTS, SEED = 5, 11


def random_actions(steps: int, slots: int = SLOTS) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(2, size=(steps, slots)))


@pytest.mark.parametrize("observation", ["z_H", "q_token", "mean"])
def test_looks_like_single_environments_in_a_sync_vector(puzzles, counting, observation):
    """Every array, mask, dtype and info field equals what Gymnasium makes of the single form."""
    kwargs = {"data": puzzles, "max_steps": 3, "ponder_cost": 0.1, "observation": observation}
    ours = SudokuHaltVectorEnv(SLOTS, core=counting(2), **kwargs)
    singles = [lambda: SudokuHaltEnv(core=counting(2), **kwargs)] * SLOTS
    theirs = SyncVectorEnv(singles, autoreset_mode=AutoresetMode.SAME_STEP)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert data_equivalence(ours.reset(seed=SEED), theirs.reset(seed=SEED), exact=True)
    for actions in [*random_actions(12), np.full(SLOTS, CONTINUE)]:
        assert data_equivalence(ours.step(actions), theirs.step(actions), exact=True)
    assert data_equivalence(ours.reset(), theirs.reset(), exact=True)


def test_agrees_with_single_environments_transition_by_transition(puzzles, core):
    """The same with a core that computes (batches of another size may differ in the last bit)."""
    vector = SudokuHaltVectorEnv(3, data=puzzles, core=core, max_steps=3)
    singles = [SudokuHaltEnv(data=puzzles, core=core, max_steps=3) for _ in range(3)]
    batch, _ = vector.reset(seed=SEED)
    last = [env.reset(seed=SEED + i)[0] for i, env in enumerate(singles)]
    np.testing.assert_allclose(batch, np.stack(last), atol=1e-5)
    for actions in random_actions(10, 3):
        batch, rewards, terminated, _, infos = vector.step(actions)
        for i, env in enumerate(singles):
            obs, reward, ended, _, info = env.step(actions[i])
            assert (reward, ended) == (rewards[i], terminated[i])
            if ended:
                np.testing.assert_allclose(infos["final_obs"][i], obs, atol=1e-5)
                assert infos["final_info"]["steps"][i] == info["steps"]
                obs, info = env.reset()
            np.testing.assert_allclose(batch[i], obs, atol=1e-5)
            assert {n: infos[n][i] for n in ("steps", "puzzle", "rating")} == {
                n: info[n] for n in ("steps", "puzzle", "rating")
            }
    other, _ = vector.reset(seed=SEED + 1)  # the control: with another seed the slots do not match
    assert not np.allclose(other, np.stack([env.reset(seed=SEED + i)[0] for i, env in enumerate(singles)]))


def test_same_step_fields(puzzles, core):
    env = SudokuHaltVectorEnv(3, data=puzzles, core=core, max_steps=4)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    before, _ = env.reset(seed=SEED)
    after, _, terminated, truncated, info = env.step(np.array([CONTINUE, HALT, CONTINUE]))
    assert terminated.tolist() == [False, True, False] == info["_final_obs"].tolist()
    assert info["_final_info"].tolist() == terminated.tolist() and not truncated.any()
    assert info["final_obs"].dtype == object and info["final_obs"][0] is None is info["final_obs"][2]
    np.testing.assert_array_equal(info["final_obs"][1], before[1])  # HALT runs no further segment
    assert not np.allclose(after[1], before[1])
    assert info["steps"].tolist() == [2, 1, 2] and info["final_info"]["steps"].tolist() == [0, 1, 0]
    _, _, _, _, info = env.step(np.full(3, CONTINUE))
    assert "final_obs" not in info and "final_info" not in info


def test_torch_form_returns_the_same_numbers(puzzles, core):
    kwargs = {"data": puzzles, "core": core, "max_steps": 3, "ponder_cost": 0.25}
    arrays, tensors = (SudokuHaltVectorEnv(SLOTS, tensors=t, **kwargs) for t in ("numpy", "torch"))
    expected, _ = arrays.reset(seed=SEED)
    got, _ = tensors.reset(seed=SEED)
    assert got.dtype == torch.float32 and torch.equal(got.detach(), torch.from_numpy(expected))
    for actions in random_actions(8):
        obs, rewards, terminated, truncated, infos = arrays.step(actions)
        t_obs, t_rewards, t_terminated, t_truncated, t_infos = tensors.step(torch.from_numpy(actions))
        assert torch.equal(t_obs.detach(), torch.from_numpy(obs))
        assert t_rewards.dtype == torch.float32 and t_rewards.tolist() == rewards.tolist()
        assert t_terminated.tolist() == terminated.tolist() == t_infos["_final_obs"].tolist()
        assert t_truncated.tolist() == truncated.tolist()
        for i in np.flatnonzero(terminated):
            np.testing.assert_array_equal(t_infos["final_obs"][i].numpy(), infos["final_obs"][i])
            for name in ("steps", "is_correct", "token_accuracy", "puzzle", "rating", "forced_halt"):
                assert t_infos["final_info"][name][i].item() == infos["final_info"][name][i]


def test_observations_are_the_users_to_change(puzzles, core):
    for make in (lambda **k: SudokuHaltEnv(**k), lambda **k: SudokuHaltVectorEnv(1, **k)):
        env = make(data=puzzles, core=core)
        env.reset(seed=0)[0].fill(0)
        action = CONTINUE if isinstance(env, SudokuHaltEnv) else np.array([CONTINUE])
        changed = env.step(action)[0]
        env.reset(seed=0)
        np.testing.assert_array_equal(changed, env.step(action)[0])


def test_seeds(puzzles, core):
    env = SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core)

    def begun():
        return env.slots.tokens.tolist()

    env.reset(seed=SEED)
    first = begun()
    env.reset()
    second = begun()
    assert second != first  # without a seed the next episode begins
    env.reset(seed=SEED)
    assert begun() == first
    env.step(np.full(SLOTS, HALT))
    assert begun() == second  # an auto-reset goes on in the same sequence
    env.reset(seed=list(range(SEED, SEED + SLOTS)))
    assert begun() == first
    env.reset(seed=SEED + 1)
    assert begun()[:-1] == first[1:]
    with pytest.raises(UserError, match="seed"):
        env.reset(seed=[1, 2])


@pytest.mark.parametrize("form", ["single", "vector"])
def test_randomness_that_is_handed_in_counts(puzzles, core, form):
    def begun(generator_seed):
        env = SudokuHaltEnv(data=puzzles, core=core) if form == "single" else None
        env = env or SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core)
        env.np_random = np.random.default_rng(generator_seed)
        env.reset()
        return env.slots.tokens.tolist()

    assert begun(1) == begun(1) != begun(2)
    if form == "vector":
        assert len({tuple(tokens) for tokens in begun(1)}) > 1  # every slot has its own key


def test_unseeded_environments_differ(puzzles, core):
    envs = [SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core) for _ in range(2)]
    for env in envs:
        env.reset()
    assert envs[0].slots.tokens.tolist() != envs[1].slots.tokens.tolist()


def test_a_slot_does_not_depend_on_how_many_there_are(puzzles, core):
    small, large = (SudokuHaltVectorEnv(n, data=puzzles, core=core) for n in (2, 7))
    small.reset(seed=SEED)
    large.reset(seed=SEED)
    assert small.slots.key.tolist() == large.slots.key.tolist()[:2]
    assert torch.equal(small.slots.tokens, large.slots.tokens[:2])


@pytest.mark.parametrize("tensors", ["numpy", "torch"])
def test_state_dict_restores_exactly(puzzles, core, tensors, tmp_path):
    def make():
        made = SudokuHaltVectorEnv(SLOTS, data=puzzles, core=core, max_steps=3, tensors=tensors)
        made.engine.carry(("previous_z_H", "previous_answer", "previous_logits"))
        return made

    actions = random_actions(10)
    env = make()
    env.reset(seed=SEED)
    for a in actions[:4]:
        env.step(a)
    torch.save(env.state_dict(), tmp_path / "env.pt")
    copy = make()
    copy.load_state_dict(torch.load(tmp_path / "env.pt", weights_only=True))
    for mine, theirs in zip(env.slots, copy.slots, strict=True):
        assert torch.equal(mine, theirs)
    assert copy.slots.logits.requires_grad is (tensors == "torch")
    for a in actions[4:]:
        mine, theirs = env.step(a), copy.step(a)
        assert torch.equal(torch.as_tensor(mine[0]), torch.as_tensor(theirs[0]))
        assert mine[1].tolist() == theirs[1].tolist()
    env.reset()
    copy.reset()
    assert torch.equal(env.slots.tokens, copy.slots.tokens)


def test_state_of_the_single_form(puzzles, core):
    env, copy = (SudokuHaltEnv(data=puzzles, core=core) for _ in range(2))
    env.reset(seed=SEED)
    env.step(CONTINUE)
    copy.load_state_dict(env.state_dict())
    np.testing.assert_array_equal(env.step(CONTINUE)[0], copy.step(CONTINUE)[0])
    env.step(HALT)
    copy.load_state_dict(env.state_dict())
    with pytest.raises(gym.error.ResetNeeded):
        copy.step(HALT)


def test_state_dict_refuses_what_does_not_belong(puzzles, padded_puzzles, core, counting):
    env = SudokuHaltVectorEnv(2, data=puzzles, core=core)
    env.reset(seed=0)
    state = env.state_dict()
    with pytest.raises(UserError, match="other puzzles"):
        SudokuHaltVectorEnv(2, data=padded_puzzles, core=core).load_state_dict(state)
    with pytest.raises(UserError, match="expected"):
        SudokuHaltVectorEnv(3, data=puzzles, core=core).load_state_dict(state)
    with pytest.raises(UserError, match="expected"):
        SudokuHaltVectorEnv(2, data=puzzles, core=counting(1)).load_state_dict(state)
    with pytest.raises(UserError, match="fields"):
        env.load_state_dict({"tokens": state["tokens"]})


def test_record_episode_statistics(puzzles, counting):
    env = RecordEpisodeStatistics(SudokuHaltVectorEnv(2, data=puzzles, core=counting(2), max_steps=4))
    env.reset(seed=0)
    env.step(np.array([CONTINUE, HALT]))
    *_, info = env.step(np.array([HALT, CONTINUE]))
    assert info["episode"]["r"].tolist() == [1.0, 0.0] and info["episode"]["l"].tolist() == [2, 0]
    assert list(env.return_queue) == [0.0, 1.0] and list(env.length_queue) == [1, 2]
