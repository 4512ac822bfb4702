"""Same seed, same machine, same numbers (docs/REPRODUCIBILITY.md)."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hrm_testing import lively_trainer

import hrm_rl  # noqa: F401 - registers the environments
from hrm_rl import train
from hrm_rl.checkpoint import list_checkpoints
from hrm_rl.devices import can_compile, repeatable
from hrm_rl.metrics import read_metrics
from hrm_rl.tasks.generate import PuzzleSpec, generate_puzzles


def lines_of(run) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "system/"))} for line in read_metrics(run)]


@pytest.mark.slow
def test_a_compiled_run_repeats_and_resumes_number_for_number(tmp_path):
    """The default core, compiled, with the kernels of `deterministic`: three ways to the same 24 updates."""
    if not can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    flags = ["--device", "cpu", "--compile", "on", "--optim.schedule", "constant", "--curriculum", "[0,0]", "--out",
             str(tmp_path), "--log-every", "6", "--eval-every", "12", "--eval-puzzles", "32",
             "--test-limit", "32"]  # fmt: skip
    for name, steps in (("one", "24"), ("again", "24"), ("halves", "12")):
        assert train.main([*flags, "--name", name, "--total-steps", steps]) == 0
    assert train.main(["--resume", str(tmp_path / "halves"), "--total-steps", "24"]) == 0
    one = tmp_path / "one"
    for other in (tmp_path / "again", tmp_path / "halves"):
        assert lines_of(one) == lines_of(other)
        models = [(list_checkpoints(run)[-1] / "model.safetensors").read_bytes()[-100_000:] for run in (one, other)]
        assert models[0] == models[1]  # the weights; the header before them holds the run's name
    assert train.main([*flags, "--name", "seed", "--total-steps", "12", "--seed", "1"]) == 0  # the control
    assert lines_of(one)[0] != lines_of(tmp_path / "seed")[0]


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_kernels_are_chosen_for_a_while_only(mode):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with repeatable(mode, "cpu"):
        assert torch.are_deterministic_algorithms_enabled() == (mode != "off")
    assert before == (torch.are_deterministic_algorithms_enabled(),
                      torch.utils.deterministic.fill_uninitialized_memory)  # fmt: skip


def test_the_kernels_change_no_number_of_an_eager_run():
    weights = []
    for mode in ("on", "off"):
        with repeatable(mode, "cpu"):
            trainer = lively_trainer()
            for _ in range(5):
                trainer.update()
            weights.append(torch.cat([p.detach().flatten() for p in trainer.trained.values()]))
    assert torch.equal(*weights)


def rollout(**keywords) -> list[np.ndarray]:
    envs = gym.make_vec("SudokuHalt-v0", num_envs=2, size=4, max_steps=3, **keywords)
    chance = np.random.default_rng(0)
    seen = [envs.reset(seed=5)[0]]
    for _ in range(12):
        seen += envs.step(chance.integers(0, 2, 2))[:3]
    envs.close()
    return seen


@pytest.mark.slow
def test_the_same_with_and_without_workers():
    """Single environments in processes of their own, in this process, and the vector form that calls the core once."""
    def form(mode, **keywords):
        return {"vectorization_mode": mode, "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP, **keywords}}

    alone, workers, vector = rollout(**form("sync")), rollout(**form("async", context="spawn")), rollout()
    assert all(np.array_equal(a, b) for a, b in zip(alone, workers, strict=True))
    for a, b in zip(alone, vector, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # batches of another size may differ in the last bit


def test_the_generator_repeats():
    one, again, other = (generate_puzzles(PuzzleSpec(side=4, count=20, seed=seed)) for seed in (3, 3, 4))
    assert np.array_equal(one.questions, again.questions) and not np.array_equal(one.questions, other.questions)
