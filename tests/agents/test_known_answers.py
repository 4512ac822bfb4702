"""A counting core (right in segments we choose) makes every reward, end and Q-value known by hand.

M is max_steps. Feature 1 + m of z_H is 1 in segment m and 0 elsewhere; with its bias held fixed and the
counter hidden, the linear Q-head is a table with one entry a step and action.
"""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from hrm_testing import counting_core, fed_trainer, golden, small_puzzles, small_trainer

import hrm_rl  # noqa: F401 - registers the environments
from agents import FixedAgent, QHaltingAgent, View, q_targets
from envs.actions import CONTINUE, HALT

M = 4
UNSEEN = torch.tensor(-5.0).sigmoid().item()  # what a table entry holds that nothing ever trains


class TableAgent(QHaltingAgent):
    """A QHaltingAgent whose Q-head sees the one-hot step only."""

    def scores(self, z_H):
        seen = z_H.clone()
        seen[..., 0] = 0
        return self.q_head(seen)


def learn_table(mode: str, right_from: int, right_until: int | None = None, updates: int = 250, prepare=None):
    """Train a table with the trainer; returns sigmoid(Q) as (2, M + 2): action by step (entry 0 unused)."""
    puzzles = small_puzzles(8)
    core = counting_core(puzzles, right_from, right_until)
    trainer = small_trainer(
        TableAgent, {"epsilon": 1.0, "exploration": "per_episode"}, puzzles, core,
        objective="q", bootstrap=mode, augment=False, num_envs=16, max_steps=M,
        optim={"lr": 0.15, "weight_decay": 0.0, "beta1": 0.8},
    )  # fmt: skip
    trainer.agent.q_head.bias.requires_grad_(False)
    if prepare:
        with torch.no_grad():
            prepare(trainer.agent.q_head.weight)
    for _ in range(updates):
        trainer.update()
    head = trainer.agent.q_head
    return (head.weight.detach()[:, 1 : M + 3] + head.bias[:, None]).sigmoid()


def fixed_point(mode: str, right_from: int, right_until: int | None, beyond: float = UNSEEN) -> torch.Tensor:
    """The Q-values (2, M + 2) in closed form. `beyond` is Q(M + 1, HALT), a state no episode reaches."""
    right = [float(right_from <= m <= (right_until or m)) for m in range(M + 2)]
    table = torch.full((2, M + 2), UNSEEN)
    table[0, 1 : M + 1] = torch.tensor(right[1 : M + 1])
    if mode == "none":
        return table
    # extra_forward runs one more segment even from the last step; in the other modes CONTINUE counts as HALT there
    table[1, M] = beyond if mode == "extra_forward" else right[M]
    for m in range(M - 1, 0, -1):
        table[1, m] = table[:, m + 1].max()
    return table


def assert_fixed_point(table, wanted, atol=0.03):
    worst = (table - wanted)[:, 1 : M + 1].abs().max().item()
    assert worst < atol, f"off by {worst:.3f}:\n{table}\n{wanted}"


CASES = [
    pytest.param(mode, *span, marks=pytest.mark.slow if mode == "shared_prefix_all" else ())
    for mode in q_targets.BOOTSTRAPS
    for span in ((3, None), (2, 2))
]
CASES += [("extra_forward", 1, None), ("shared_prefix", 9, None)]


@pytest.mark.parametrize(("mode", "right_from", "right_until"), CASES)
def test_fixed_point_of_the_q_values(mode, right_from, right_until):
    assert_fixed_point(learn_table(mode, right_from, right_until), fixed_point(mode, right_from, right_until))


def lift_beyond(weight):
    """Q(M + 1, CONTINUE) starts near 0.95: a value that the budget must hide."""
    weight[1, 1 + M + 1] = 8.0


def test_the_budget_hides_what_lies_beyond():
    wanted = fixed_point("extra_forward", 2, 2)
    assert_fixed_point(learn_table("extra_forward", 2, 2, prepare=lift_beyond), wanted)


def test_without_at_limit_the_fixed_point_is_another(monkeypatch):
    """Negative control of the test above: max(q_halt', q_continue') also at the budget."""
    own = q_targets.continue_target

    def blind(next_q_logits, at_limit, *more):
        return own(next_q_logits, torch.zeros_like(at_limit), *more)

    monkeypatch.setattr(q_targets, "continue_target", blind)
    table = learn_table("extra_forward", 2, 2, prepare=lift_beyond)
    with pytest.raises(AssertionError, match="off by"):
        assert_fixed_point(table, fixed_point("extra_forward", 2, 2))
    assert table[1, M] > 0.9 and table[1, 2] > 0.9


@pytest.mark.parametrize("mode", ["shared_prefix", "next_observation"])
def test_bootstrapping_across_episodes_is_seen(mode, monkeypatch):
    """Negative control: a continue target also where the episode ended reads the value of the next puzzle."""
    monkeypatch.setattr(q_targets, "continue_mask", lambda mode, continued, at_limit: torch.ones_like(continued))
    with pytest.raises(AssertionError, match="off by"):
        assert_fixed_point(learn_table(mode, 2, 2), fixed_point(mode, 2, 2), atol=0.1)


def lift_last(weight):
    """Q(M, CONTINUE) starts near 0.95."""
    weight[1, 1 + M] = 8.0


@pytest.mark.parametrize("mode", ["shared_prefix", "next_observation"])
def test_the_budget_grounds_the_values_of_puzzles_never_solved(mode, monkeypatch):
    wanted = fixed_point(mode, 9, None)
    assert_fixed_point(learn_table(mode, 9, None, prepare=lift_last), wanted)
    # Negative control: with targets for slots that go on alone, the last value floats and all others read it.
    monkeypatch.setattr(q_targets, "continue_mask", lambda mode, continued, at_limit: continued)
    table = learn_table(mode, 9, None, prepare=lift_last)
    assert (table[1, 1 : M + 1] > 0.9).all() and (table[0, 1 : M + 1] < 0.05).all()


def test_extra_forward_looks_beyond_the_budget():
    """As released: the continue target of the last step is Q(M + 1, HALT), a state that is never trained."""

    def lift(weight):
        weight[0, 1 + M + 1] = 6.0

    beyond = torch.tensor(1.0).sigmoid().item()
    table = learn_table("extra_forward", 2, 2, prepare=lift)
    assert_fixed_point(table, fixed_point("extra_forward", 2, 2, beyond), atol=0.05)
    with pytest.raises(AssertionError, match="off by"):
        assert_fixed_point(table, fixed_point("extra_forward", 2, 2), atol=0.05)


# --- rewards, ends, forced halts ----------------------------------------------------------------------------


def counting_envs(right_from: int, right_until: int | None = None, **keywords):
    puzzles = small_puzzles(8)
    core = counting_core(puzzles, right_from, right_until)
    return gym.make_vec("SudokuHalt-v0", num_envs=3, size=4, data=puzzles, core=core, max_steps=M, augment=False,
                        tensors="torch", flatten=False, **keywords).unwrapped  # fmt: skip


@pytest.mark.parametrize("halt_at", range(1, M + 1))
@pytest.mark.parametrize("right_from", [1, 3, 9])
def test_reward_and_end_of_an_episode(halt_at, right_from):
    envs = counting_envs(right_from, ponder_cost=0.125)
    envs.reset(seed=0)
    for m in range(1, halt_at + 1):
        assert envs.slots.steps.tolist() == [m] * 3
        assert envs.slots.is_correct.tolist() == [m >= right_from] * 3
        action = HALT if m == halt_at else CONTINUE
        _, reward, terminated, truncated, info = envs.step(torch.full((3,), action))
        assert terminated.tolist() == [m == halt_at] * 3 and not truncated.any()
        assert reward.tolist() == [float(m >= right_from) if m == halt_at else -0.125] * 3
        assert not info["final_info"]["forced_halt"].any()
    assert envs.slots.steps.tolist() == [1] * 3  # the next puzzle is in work already


@pytest.mark.parametrize(("right_from", "reward"), [(M, 1.0), (M + 1, 0.0)])
def test_forced_halt(right_from, reward):
    envs = counting_envs(right_from, ponder_cost=0.125)
    envs.reset(seed=0)
    go_on = torch.full((3,), CONTINUE)
    for _ in range(M - 1):
        assert not envs.step(go_on)[2].any()
    _, got, terminated, truncated, info = envs.step(go_on)
    assert terminated.all() and not truncated.any() and info["final_info"]["forced_halt"].all()
    assert got.tolist() == [reward] * 3  # the answer is scored: no ponder cost, no truncation


def test_the_answer_is_judged_at_the_halt_only():
    """Negative control: right in segment 2 alone; the same episode halted elsewhere earns nothing."""
    earned = []
    for halt_at in (1, 2, 3, 4):
        envs = counting_envs(2, 2)
        envs.reset(seed=0)
        for m in range(1, halt_at + 1):
            reward = envs.step(torch.full((3,), HALT if m == halt_at else CONTINUE))[1]
        earned.append(reward.tolist())
    assert earned == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]


# --- pure functions -----------------------------------------------------------------------------------------


def test_targets_by_hand():
    q = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    at_limit = torch.tensor([False, True, False])
    wanted = torch.tensor([2.0, 1.0, 3.0]).sigmoid()
    assert torch.equal(q_targets.continue_target(q, at_limit), wanted)
    assert q_targets.halt_target(torch.tensor([True, False])).tolist() == [1.0, 0.0]


def test_targets_carry_no_gradient():
    q = torch.randn(5, 2, requires_grad=True)
    target = q_targets.continue_target(q, torch.zeros(5, dtype=torch.bool))
    assert not target.requires_grad
    mine = torch.randn(5, 2, requires_grad=True)
    everywhere = torch.ones(5, dtype=torch.bool)
    losses = q_targets.q_losses(mine, q_targets.halt_target(everywhere), target, everywhere, everywhere)
    (losses.halt + losses.cont).sum().backward()
    assert mine.grad is not None and q.grad is None
    assert not losses.td_error_halt.requires_grad and not losses.td_error_continue.requires_grad


def test_a_target_with_gradient_would_be_seen():
    """Negative control: the textbook mistake, a target that is not detached."""
    q = torch.randn(5, 2, requires_grad=True)
    assert q.amax(-1).sigmoid().requires_grad


@pytest.mark.parametrize("mode", q_targets.BOOTSTRAPS)
def test_the_bootstrap_value_carries_no_gradient_in_the_trainer(mode):
    """The target handed to the loss is the same tensor of numbers, gradient or not, in every mode."""
    trainer = small_trainer(bootstrap=mode)
    seen = []
    own = trainer.agent.loss
    trainer.agent.loss = lambda transition: seen.append(transition) or own(transition)
    for _ in range(3):
        trainer.update()
    assert seen
    for transition in seen:
        assert transition.next_z_H is None if mode == "none" else not transition.next_z_H.requires_grad
        assert transition.q_logits.requires_grad


def test_continue_mask():
    continued, at_limit = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    assert q_targets.continue_mask("extra_forward", continued, at_limit).tolist() == [True, True, True]
    assert q_targets.continue_mask("shared_prefix", continued, at_limit).tolist() == [True, False, True]
    assert q_targets.continue_mask("next_observation", continued, at_limit).tolist() == [True, False, True]
    assert q_targets.continue_mask("none", continued, at_limit).tolist() == [False, False, False]
    with pytest.raises(ValueError, match="extra_forward"):
        q_targets.continue_mask("prefix", continued, at_limit)


def test_grounded_target_is_the_reward_at_the_budget():
    guess = torch.tensor([0.3, 0.3, 0.3], requires_grad=True)
    right, at_limit = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    target = q_targets.grounded_target(guess, right, at_limit)
    assert torch.equal(target, torch.tensor([0.3, 1.0, 0.0])) and not target.requires_grad


def test_halting_rule():
    """The table of DESIGN section 4: at the budget always; else by wish, from the floor on."""
    steps = torch.tensor([1, 2, 3, 4, 4])
    wish = torch.tensor([True, True, True, False, True])
    floor = torch.tensor([1, 3, 3, 4, 9])
    assert q_targets.halts(wish, steps, floor, 4).tolist() == [True, False, True, True, True]
    q_logits = torch.tensor([[0.5, 0.0], [0.5, 0.5], [-1.0, -2.0], [0.5, 1.0]])
    assert q_targets.wants_halt(q_logits, "extra_forward").tolist() == [True, False, True, False]
    assert q_targets.wants_halt(q_logits, "none").tolist() == [True, True, False, True]
    drawn = torch.tensor([2, 3, 4])
    assert q_targets.min_steps(torch.tensor([0.05, 0.1, 0.5]), drawn, 0.1).tolist() == [2, 1, 1]


@pytest.mark.parametrize("exploration", ["per_step", "per_episode"])
def test_exploration_floor_is_uniform(exploration):
    """epsilon of the floors are drawn, evenly from 2..M; once an episode or at every step."""
    n = 6000
    agent = QHaltingAgent(small_trainer().core, M, epsilon=0.3, exploration=exploration)
    view = View(None, None, torch.ones(n, dtype=torch.long), torch.ones(n, dtype=torch.bool), torch.arange(n))
    floor = agent._floor(view)
    share = torch.bincount(floor, minlength=M + 1)[1:] / n
    assert (share - torch.tensor([0.7, 0.1, 0.1, 0.1])).abs().max() < 0.02
    again = agent._floor(view._replace(steps=view.steps + 1))
    assert torch.equal(floor, again) == (exploration == "per_episode")
    assert torch.equal(floor, agent._floor(view))
    assert QHaltingAgent(small_trainer().core, 1, epsilon=1.0)._floor(view).eq(1).all()


def test_evaluation_does_not_explore():
    core = small_trainer().core
    agent = QHaltingAgent(core, M, epsilon=1.0)
    agent.q_head.bias.data = torch.tensor([1.0, 0.0])
    view = View(torch.zeros(64, 17, 16), None, torch.ones(64, dtype=torch.long), torch.ones(64, dtype=torch.bool),
                torch.arange(64))  # fmt: skip
    assert (agent.act(view) == HALT).all()
    assert (agent.act(view, explore=True) == CONTINUE).all()  # every floor is at least 2


@pytest.mark.parametrize("k", [1, 3, 0])
def test_fixed_agent(k):
    agent = FixedAgent(M, k)
    steps = torch.arange(1, M + 1)
    view = View(None, None, steps, torch.ones(M, dtype=torch.bool), steps)
    assert (agent.act(view) == HALT).tolist() == [m >= (k or M) for m in range(1, M + 1)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"epsilon": 1.5}, "agent.epsilon"), ({"exploration": "always"}, "per_step or per_episode"),
     ({"bootstrap": "prefix"}, "shared_prefix")],
)  # fmt: skip
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        QHaltingAgent(small_trainer().core, M, **arguments)
    with pytest.raises(ValueError, match="agent.k"):
        FixedAgent(M, M + 1)


# --- padding trains nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", q_targets.BOOTSTRAPS)
def test_padding_trains_nothing(mode):
    empty = small_puzzles(1, padding=4).select(torch.arange(1, 5))
    trainer = small_trainer(puzzles=empty, bootstrap=mode, arguments={"q_bias": 1.0})
    with torch.no_grad():
        trainer.agent.q_head.weight.normal_()
    for _ in range(3):
        trainer.update()
        assert all(p.grad is None or not p.grad.any() for p in trainer.trained.values())
    sums = trainer.sums.take()
    assert sums["loss/total"] == 0 and sums["episodes"] == 0 and sums["exact"] == 0


def test_padding_beside_puzzles_changes_nothing_but_the_scale():
    """Four slots, two of them padding: the gradients are those of the two puzzles alone, over 4 in place of 2."""
    wanted = golden("act_trace")
    inputs, labels = wanted["batch_inputs"][:1, :4].clone(), wanted["batch_labels"][:1, :4].clone()
    inputs[0, 2:], labels[0, 2:] = 0, -100
    four = fed_trainer(inputs, labels, mask_padding=True, optim={"lr": 0.0})
    two = fed_trainer(inputs[:, :2], labels[:, :2], mask_padding=True, optim={"lr": 0.0})
    unmasked = fed_trainer(inputs, labels, optim={"lr": 0.0})
    for trainer in (four, two, unmasked):
        trainer.update()
    for name, p in four.trained.items():
        scale = two.trained[name].grad.abs().max()
        assert (p.grad * 2 - two.trained[name].grad).abs().max() <= 1e-5 * scale, name
    head = "agent.q_head.bias"  # negative control: with the mask off, padding does train the Q-head
    assert (unmasked.trained[head].grad - four.trained[head].grad).abs().max() > 1e-3
