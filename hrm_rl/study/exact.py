"""Ground truth of halting with a frozen core, by dynamic programming over what the core did with each puzzle.

The process is deterministic (DESIGN, section 3), so whether the answer is right after each segment says all: no value
below is an estimate, and every bias of a study is measured against these. Letters: M segments (row m - 1 is segment m),
N puzzles, ... any leading axes (learners). All results are float64 on the device of their input.

    Q*(m, HALT) = correct_m        Q*(m, CONTINUE) = -ponder_cost + gamma * max_a Q*(m + 1, a)        for m < M
    at m = M CONTINUE counts as HALT: it earns correct_M, costs nothing and is not discounted

Source: Bellman's equations (Sutton & Barto, Reinforcement Learning, 2018, 3.14 and 3.20) on a finite horizon, solved
from its end. gamma and ponder_cost are numbers, or tensors (...) with one for each learner.
"""

from __future__ import annotations

import torch
from torch import Tensor

Number = float | Tensor


def optimal_values(correct: Tensor, gamma: Number = 1.0, ponder_cost: Number = 0.0) -> Tensor:
    """Q*: correct (..., M, N) bool -> (..., M, N, 2), last axis (HALT, CONTINUE). Leading axes broadcast."""
    return _values(correct, None, gamma, ponder_cost)


def policy_values(correct: Tensor, wish: Tensor, gamma: Number = 1.0, ponder_cost: Number = 0.0) -> Tensor:
    """Q of a policy: act so now, and as `wish` says from the next segment on.

    correct, wish (..., M, N) bool, `wish` where it halts (its last row does not matter: the budget halts there).
    Returns (..., M, N, 2), last axis (HALT, CONTINUE). Leading axes broadcast.
    """
    return _values(correct, wish, gamma, ponder_cost)


def _values(correct: Tensor, wish: Tensor | None, gamma: Number, ponder_cost: Number) -> Tensor:
    reward = correct.double()
    gamma, ponder_cost = (torch.as_tensor(x, dtype=torch.float64, device=correct.device)[..., None]
                          for x in (gamma, ponder_cost))  # fmt: skip
    by = () if wish is None else wish.shape[:-2]
    lead = torch.broadcast_shapes(correct.shape[:-2], by, gamma.shape[:-1], ponder_cost.shape[:-1])
    segments, count = correct.shape[-2:]
    later = reward[..., -1, :].expand(*lead, count)  # value of CONTINUE at the budget
    columns = [later]
    for m in range(segments - 2, -1, -1):
        halt = reward[..., m + 1, :]
        ahead = torch.maximum(halt, later) if wish is None else torch.where(wish[..., m + 1, :], halt, later)
        later = gamma * ahead - ponder_cost
        columns.append(later)
    q_continue = torch.stack(columns[::-1], dim=-2)
    return torch.stack((reward.expand_as(q_continue), q_continue), dim=-1)


def optimal_wish(correct: Tensor, gamma: Number = 1.0, ponder_cost: Number = 0.0) -> Tensor:
    """The optimal policy that halts the earliest, (..., M, N) bool: halt where Q*(HALT) >= Q*(CONTINUE).

    A tie halts, which is what any cost however small would choose: a puzzle that is never right halts at once, and one
    that is right halts there and then, though gamma = 1 without a cost would let it go on for nothing.
    """
    q_halt, q_continue = optimal_values(correct, gamma, ponder_cost).unbind(dim=-1)
    return q_halt >= q_continue


def halt_steps(wish: Tensor) -> Tensor:
    """First segment at which a policy halts, the budget where it does not: (..., M, N) bool -> (..., N) int64."""
    budget = torch.ones_like(wish[..., :1, :])
    return torch.cat((wish[..., :-1, :], budget), dim=-2).int().argmax(dim=-2) + 1


def best_return(correct: Tensor, gamma: Number = 1.0, ponder_cost: Number = 0.0) -> Tensor:
    """The largest return of an episode on each puzzle, V*(1): (..., M, N) bool -> (..., N)."""
    return optimal_values(correct, gamma, ponder_cost)[..., 0, :, :].amax(dim=-1)


def policy_return(correct: Tensor, wish: Tensor, gamma: Number = 1.0, ponder_cost: Number = 0.0) -> Tensor:
    """Return of an episode under a policy, V(1): correct, wish (..., M, N) bool -> (..., N)."""
    first = policy_values(correct, wish, gamma, ponder_cost)[..., 0, :, :]
    at_once = wish[..., 0, :] if wish.shape[-2] > 1 else torch.ones_like(wish[..., 0, :])
    return torch.where(at_once, first[..., 0], first[..., 1])


def best_accuracy(correct: Tensor) -> Tensor:
    """Best accuracy of any halting within a budget of 1..M segments: (..., M, N) bool -> (..., M).

    The share of puzzles that were right at any segment so far.
    """
    return correct.int().cummax(dim=-2).values.double().mean(dim=-1)


def frontier(correct: Tensor) -> tuple[Tensor, Tensor]:
    """(mean steps, accuracy), (K + 1,) each, ascending: the corners of what no halting can beat on these puzzles.

    correct (M, N) bool; K puzzles are wrong at segment 1 and right at a later one. The first corner is halting all at
    once. Between two corners lies what halting one more puzzle right with some chance gives on average, so
    `best_policy_accuracy` interpolates.

    Exact, and here is why. Halting a puzzle right takes at least k - 1 segments more than halting it at once, k its
    first right segment, and earns 1 / N whatever k is; halting it wrong takes at least none and earns nothing. So a
    policy is worth no more than the set it halts right at these least costs, and among sets of one size the cheapest
    holds the smallest k. A knapsack of equal gains: the greedy order is optimal at every corner, and since costs ascend
    the corners are concave, so that no mixture of policies lies above the lines between them.
    """
    first = correct.int().argmax(dim=0)[correct.any(dim=0)].double().sort().values  # k - 1 of what can be right
    count = correct.shape[1]
    steps = 1 + torch.cat((first.new_zeros(1), first.cumsum(0))) / count
    accuracy = torch.arange(len(steps), dtype=torch.float64, device=correct.device) / count
    free = int(correct[0].sum())
    return steps[free:], accuracy[free:]


def best_policy_accuracy(correct: Tensor, mean_steps: Number) -> Tensor:
    """Best accuracy of any halting, one that flips coins included, with at most these mean steps.

    correct (M, N) bool, mean_steps (...), below 1 as 1 -> (...). See `frontier`.
    """
    steps, accuracy = frontier(correct)
    wanted = torch.as_tensor(mean_steps, dtype=torch.float64, device=correct.device).clamp(steps[0], steps[-1])
    right = torch.searchsorted(steps, wanted.contiguous()).clamp(min=1)
    if len(steps) == 1:
        return accuracy[0].expand_as(wanted)
    left = right - 1
    share = (wanted - steps[left]) / (steps[right] - steps[left])
    return accuracy[left] + share * (accuracy[right] - accuracy[left])


def fixed_area(correct: Tensor) -> float:
    """Mean over budgets 1 <= s <= M of the accuracy that a fixed number of segments has at mean steps s.

    correct (M, N) bool; between two numbers of segments by interpolation (`hrm_rl.frontier`). NaN for M = 1.
    """
    accuracy = correct.double().mean(dim=1)
    return float(((accuracy[1:] + accuracy[:-1]) / 2).mean()) if len(accuracy) > 1 else float("nan")


def best_area(correct: Tensor) -> float:
    """Mean over budgets 1 <= s <= M of the best accuracy at mean steps s (`best_policy_accuracy`). NaN for M = 1."""
    if len(correct) == 1:
        return float("nan")
    steps, accuracy = frontier(correct)
    inside = torch.trapezoid(accuracy, steps)
    return float((inside + (len(correct) - steps[-1]) * accuracy[-1]) / (len(correct) - 1))
