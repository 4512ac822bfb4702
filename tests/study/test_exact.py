"""Exact values against hand-worked numbers, brute force and the environment itself. M segments, N puzzles."""

from __future__ import annotations

import itertools

import gymnasium as gym
import pytest
import torch
from hrm_testing import counting_core, small_puzzles
from hypothesis import given, settings
from hypothesis import strategies as st

import hrm_rl  # noqa: F401 - registers the environments
from envs.actions import CONTINUE, HALT
from hrm_rl.calibration import halting_steps
from hrm_rl.scoring import optimal_returns
from hrm_rl.study import exact


def bools(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


# Columns are puzzles: right from segment 2 on; right, then lost; never right; right at the last segment.
CORRECT = bools("0100", "1000", "1001")


def test_optimal_values_by_hand():
    """gamma 0.9, cost 0.1, from the end. Puzzle 1: Q(3) = (1, 1), Q(2, C) = 0.9 - 0.1 < 1 = Q(2, H), Q(1, C) = 0.8."""
    q = exact.optimal_values(CORRECT, 0.9, 0.1)
    assert q.dtype == torch.float64 and q.shape == (3, 4, 2)
    assert torch.equal(q[..., 0], CORRECT.double())
    wanted = [[0.8, 0.9 * max(0, -0.1) - 0.1, -0.1, 0.9 * 0.8 - 0.1], [0.8, -0.1, -0.1, 0.8], [1, 0, 0, 1]]
    assert q[..., 1].tolist() == [pytest.approx(row) for row in wanted]
    paper = exact.optimal_values(CORRECT)[..., 1]  # gamma 1, no cost: right at any later segment
    assert paper.tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1]]


def test_policy_values_by_hand():
    """Halting at segment 2 alone (gamma 0.5, cost 0.1): Q(1, C) = 0.5 right_2 - 0.1, Q(2, C) = 0.5 right_3 - 0.1."""
    wish = bools("0000", "1111", "0000")
    q = exact.policy_values(CORRECT, wish, 0.5, 0.1)
    assert q[..., 1].tolist() == [pytest.approx(row) for row in
                                  ([0.4, -0.1, -0.1, -0.1], [0.4, -0.1, -0.1, 0.4], [1, 0, 0, 1])]  # fmt: skip
    never = exact.policy_values(CORRECT, torch.zeros_like(wish), 0.5, 0.1)
    assert never[0, :, 1].tolist() == pytest.approx([0.1, -0.15, -0.15, 0.1])  # 0.5 (0.5 right_3 - 0.1) - 0.1
    assert exact.policy_return(CORRECT, wish, 0.5, 0.1).tolist() == pytest.approx([0.4, -0.1, -0.1, -0.1])
    at_once = torch.ones_like(wish)
    assert exact.policy_return(CORRECT, at_once, 0.5, 0.1).tolist() == [0, 1, 0, 0]


def test_ties_halt():
    """A puzzle that is never right halts at once, and so does one that is right, with no cost to make it."""
    steps = exact.halt_steps(exact.optimal_wish(CORRECT))
    assert steps.tolist() == [2, 1, 1, 3]
    # A cost of 0.6 a segment is worth one segment, not two; a gamma of 0.5 breaks no tie of zeros.
    assert exact.halt_steps(exact.optimal_wish(CORRECT, 1.0, 0.6)).tolist() == [2, 1, 1, 1]
    assert exact.halt_steps(exact.optimal_wish(CORRECT, 0.5)).tolist() == [2, 1, 1, 3]


def test_a_budget_of_one_segment():
    correct = bools("10")
    assert exact.optimal_values(correct, 0.5, 0.3).tolist() == [[[1, 1], [0, 0]]]
    assert exact.policy_return(correct, torch.zeros_like(correct), 0.5, 0.3).tolist() == [1, 0]
    assert exact.best_return(correct, 0.5, 0.3).tolist() == [1, 0]
    assert exact.best_policy_accuracy(correct, 1.0) == 0.5


def _return(right: list[bool], halt: int, gamma: float, cost: float) -> float:
    """Return of one episode that halts after segment `halt`, reward by reward."""
    rewards = [-cost] * (halt - 1) + [float(right[halt - 1])]
    return sum(gamma**t * reward for t, reward in enumerate(rewards))


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_against_all_halting_steps(seed, segments, gamma, cost):
    generator = torch.Generator().manual_seed(seed)
    correct, wish = (torch.rand(2, segments, 5, generator=generator) < 0.4).unbind(0)
    q = exact.optimal_values(correct, gamma, cost)
    q_policy = exact.policy_values(correct, wish, gamma, cost)
    best, got = exact.best_return(correct, gamma, cost), exact.policy_return(correct, wish, gamma, cost)
    optimal = exact.policy_return(correct, exact.optimal_wish(correct, gamma, cost), gamma, cost)
    steps = exact.halt_steps(wish)
    assert torch.equal(steps, halting_steps(wish.float(), 0.5))
    for n in range(5):
        right = correct[:, n].tolist()
        for m in range(1, segments + 1):
            rest = right[m - 1 :]
            later = [_return(rest, h, gamma, cost) for h in range(2, len(rest) + 1)] or [float(rest[0])]
            assert q[m - 1, n, 1] == pytest.approx(max(later), abs=1e-12)
            halt = next((k for k in range(m + 1, segments) if wish[k - 1, n]), segments)
            after = _return(rest, halt - m + 1, gamma, cost) if m < segments else float(rest[0])
            assert q_policy[m - 1, n, 1] == pytest.approx(after, abs=1e-12)
        returns = [_return(right, h, gamma, cost) for h in range(1, segments + 1)]
        assert best[n] == pytest.approx(max(returns), abs=1e-12)
        assert got[n] == pytest.approx(returns[int(steps[n]) - 1], abs=1e-12)
        assert optimal[n] == pytest.approx(max(returns), abs=1e-12)
    assert torch.allclose(exact.best_return(correct, 1.0, cost), optimal_returns(correct, cost))


def test_learners_in_one_batch_are_those_alone():
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(4, 6, generator=generator) < 0.4
    wish = torch.rand(3, 4, 6, generator=generator) < 0.4
    gamma, cost = torch.tensor([1.0, 0.9, 0.5]), torch.tensor([0.0, 0.1, 0.3])
    together = exact.optimal_values(correct, gamma, cost)
    followed = exact.policy_values(correct, wish, gamma, cost)
    got = exact.policy_return(correct, wish, gamma, cost)
    assert together.shape == followed.shape == (3, 4, 6, 2) and got.shape == (3, 6)
    for i in range(3):
        g, c = gamma[i].double(), cost[i].double()
        assert torch.equal(together[i], exact.optimal_values(correct, g, c))
        assert torch.equal(followed[i], exact.policy_values(correct, wish[i], g, c))
        assert torch.equal(got[i], exact.policy_return(correct, wish[i], g, c))
    assert (followed[..., 1] <= together[..., 1] + 1e-12).all() and (followed[..., 1] < together[..., 1]).any()


@pytest.mark.parametrize("cost", [0.0, 0.25])
@pytest.mark.parametrize(("right_from", "right_until"), [(3, None), (2, 2), (9, None)])
def test_the_environment_pays_these_returns(cost, right_from, right_until):
    """A second witness: the real environment rolled out with a policy that wishes to halt at segment h of 1..M + 1."""
    puzzles, M = small_puzzles(8), 4
    core = counting_core(puzzles, right_from, right_until)
    correct = torch.tensor([[right_from <= m <= (right_until or M) for _ in range(M + 1)] for m in range(1, M + 1)])
    wish = torch.arange(1, M + 1)[:, None] >= torch.arange(1, M + 2)[None]  # column h - 1 halts at segment h
    envs = gym.make_vec("SudokuHalt-v0", num_envs=M + 1, size=4, data=puzzles, core=core, max_steps=M,
                        ponder_cost=cost, augment=False)  # fmt: skip
    envs.reset(seed=0)
    gamma, earned, alive = 0.9, torch.zeros(M + 1).double(), torch.ones(M + 1).bool()
    for m in range(M):
        actions = torch.where(wish[m], HALT, CONTINUE).numpy()
        _, reward, terminated, _, _ = envs.step(actions)
        earned += alive * gamma**m * torch.from_numpy(reward)
        alive &= ~torch.from_numpy(terminated)
    assert not alive.any()
    assert earned.tolist() == pytest.approx(exact.policy_return(correct, wish, gamma, cost).tolist())
    assert earned.max() == pytest.approx(float(exact.best_return(correct, gamma, cost)[0]))
    other = exact.policy_return(correct, wish, 0.5, cost + 0.1)  # control: another process pays otherwise
    assert earned.tolist() != pytest.approx(other.tolist())


# --- the frontier -----------------------------------------------------------------------------------------------


def test_frontier_by_hand():
    """First right at 2, 1, never, 3: one puzzle for free, then 1/4 and 2/4 of a segment on the mean."""
    steps, accuracy = exact.frontier(CORRECT)
    assert steps.tolist() == [1, 1.25, 1.75] and accuracy.tolist() == [0.25, 0.5, 0.75]
    at = exact.best_policy_accuracy(CORRECT, torch.tensor([1.0, 1.125, 1.25, 1.5, 1.75, 3.0]))
    assert at.tolist() == pytest.approx([0.25, 0.375, 0.5, 0.625, 0.75, 0.75])
    assert exact.best_accuracy(CORRECT).tolist() == [0.25, 0.5, 0.75]
    assert exact.fixed_area(CORRECT) == pytest.approx((0.25 + 0.25 + 0.25 + 0.5) / 4)
    area = (0.25 * 0.375 + 0.5 * 0.625 + 1.25 * 0.75) / 2
    assert exact.best_area(CORRECT) == pytest.approx(area)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_halting_beats_the_frontier(seed, segments, count):
    """Against every choice of halting steps: none lies above, each corner is reached."""
    correct = torch.rand(segments, count, generator=torch.Generator().manual_seed(seed)) < 0.4
    points = []
    for halts in itertools.product(range(segments), repeat=count):
        points.append((sum(halts) / count + 1, sum(bool(correct[h, n]) for n, h in enumerate(halts)) / count))
    steps, accuracy = exact.frontier(correct)
    most = exact.best_policy_accuracy(correct, torch.tensor([s for s, _ in points], dtype=torch.float64))
    assert all(got <= top + 1e-9 for (_, got), top in zip(points, most.tolist(), strict=True))
    for s, a in zip(steps.tolist(), accuracy.tolist(), strict=True):
        assert any(abs(s - x) < 1e-9 and abs(a - y) < 1e-9 for x, y in points)
    middle = exact.best_policy_accuracy(correct, (steps[1:] + steps[:-1]) / 2)  # a coin between two corners
    assert torch.allclose(middle, (accuracy[1:] + accuracy[:-1]) / 2)
    assert (steps.diff().diff() >= -1e-12).all()  # costs ascend: concave


def test_nothing_is_ever_right():
    correct = torch.zeros(3, 4).bool()
    assert exact.best_policy_accuracy(correct, torch.tensor([1.0, 2.5])).tolist() == [0, 0]
    assert exact.best_area(correct) == exact.fixed_area(correct) == 0
    assert exact.halt_steps(exact.optimal_wish(correct)).tolist() == [1] * 4
