"""The signals of the rules, worked out by hand. Cells of logits are written as logs of probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agents import AGENTS, SIGNALS, Memory, View, signals
from agents.random_stop import RandomAgent
from hrm_rl import rng
from hrm_rl.errors import UserError

#: One puzzle of three cells: given, blank, blank; probabilities of two token values.
PROBABILITIES = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.25, 0.75]]])
LOGITS = PROBABILITIES.log()
FREE = torch.tensor([[False, True, True]])
ALL_USED = torch.ones(1, 2, dtype=torch.bool)


def view_of(logits, tokens, step=1, z=None, previous_z=None, previous_answer=None, previous_logits=None):
    count = len(tokens)
    z = torch.zeros(count, tokens.shape[1], 1) if z is None else z
    steps = torch.full((count,), step)
    return View(z, logits, steps, (tokens > 0).any(-1), steps, tokens, previous_z, previous_answer, previous_logits)


def test_confidence():
    certain = signals.top_probability(LOGITS)
    assert_close(certain, torch.tensor([[0.5, 0.9, 0.75]]))
    assert_close(signals.cell_mean(certain, FREE, 1.0), torch.tensor([0.825]))
    assert_close(signals.cell_min(certain, FREE, 1.0), torch.tensor([0.75]))
    # Negative control: with the given cell counted in, both are others.
    assert signals.cell_mean(certain, ~FREE | FREE, 1.0) < 0.8 and signals.cell_min(certain, ~FREE | FREE, 1.0) == 0.5


def test_confidence_of_many_values_is_not_that_of_the_logits():
    assert_close(signals.top_probability(torch.tensor([[[0.0, math.log(3), 0.0]]])), torch.tensor([[0.6]]))


def test_margin_and_entropy():
    assert_close(signals.top_margin(LOGITS), torch.tensor([[0.0, 0.8, 0.5]]))
    nats = [math.log(2), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))]
    assert_close(signals.cell_entropy(LOGITS), torch.tensor([nats]))
    assert_close(signals.cell_entropy(torch.tensor([[[0.0, -1e4]]])), torch.tensor([[0.0]]))  # no 0 * -inf


def test_kl_divergence():
    before = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]]]).log()
    wanted = [0.0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2), 0.25 * math.log(1 / 3) + 0.75 * math.log(3)]
    assert_close(signals.cell_kl(LOGITS, before), torch.tensor([wanted]))
    swapped = signals.cell_kl(before, LOGITS)[0, 1]
    assert (swapped - wanted[1]).abs() > 0.1  # it is not symmetric
    uniform = torch.zeros(1, 3, 2)  # what there is before step 1
    assert_close(signals.cell_kl(LOGITS, uniform), math.log(2) - signals.cell_entropy(LOGITS))


def test_residuals_and_cosine():
    z, before = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    assert_close(signals.step_size(z, before, ALL_USED), torch.tensor([1.0]))
    before = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert_close(signals.step_size(z, before, ALL_USED), torch.tensor([3 / 5]))
    assert_close(signals.largest_step(z, before, ALL_USED), torch.tensor([3 / 4]))
    assert_close(signals.cosine_similarity(z, before, ALL_USED), torch.tensor([13 / (5 * math.sqrt(10))]))
    front = torch.tensor([[True, False]])  # the second position is padding: nothing has moved
    assert signals.step_size(z, before, front) == 0 and signals.largest_step(z, before, front) == 0
    assert_close(signals.cosine_similarity(z, before, front), torch.tensor([1.0]))
    assert_close(signals.cosine_similarity(z, -z, ALL_USED), torch.tensor([-1.0]))
    nothing = torch.zeros(1, 2, 2)  # no division by zero
    for signal in (signals.step_size, signals.largest_step, signals.cosine_similarity):
        assert signal(nothing, nothing, ALL_USED) == 0


def test_change_of_step():
    assert_close(signals.change_of_step(torch.tensor([0.5, 0.2]), torch.tensor([0.2, 0.2])), torch.tensor([0.3, 0.0]))


def test_unchanged_for():
    answer = torch.tensor([[5, 2, 3], [5, 2, 3], [5, 2, 3], [9, 2, 3]])
    before = torch.tensor([[5, 2, 3], [5, 2, 4], [5, 2, 3], [5, 2, 3]])
    free = FREE.expand(4, -1)
    count = signals.unchanged_for(answer, before, free, torch.tensor([3, 3, 1, 3]), torch.full((4,), 2.0))
    assert count.tolist() == [3.0, 0.0, 0.0, 3.0]  # again; changed; the first step; only a given cell changed


def test_patience_over_two_episodes():
    """Slots that begin anew count from 0 again; the other one goes on."""
    compute, memory = SIGNALS["stability"].compute, Memory()
    tokens, answers = torch.ones(2, 3, dtype=torch.int64), torch.full((2, 3), 2)
    logits = torch.nn.functional.one_hot(answers, 4).float()
    counts = []
    for steps in ([1, 1], [2, 2], [3, 1], [4, 2]):
        view = view_of(logits, tokens, previous_answer=answers)._replace(steps=torch.tensor(steps))
        counts.append(compute(view, memory).tolist())
    assert counts == [[0, 0], [1, 1], [2, 0], [3, 1]]


def test_second_order_over_an_episode():
    """|z| = 1 always, steps of 1 (from 0), 0, 2, 2: changes 1, 1, 2, 0."""
    compute, memory = SIGNALS["second_order"].compute, Memory()
    states = [torch.full((1, 1, 1), v) for v in (0.0, 1.0, 1.0, -1.0, 1.0)]
    changes = [
        compute(view_of(torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.int64), m, states[m], states[m - 1]), memory)
        for m in range(1, 5)
    ]
    assert_close(torch.cat(changes), torch.tensor([1.0, 1.0, 2.0, 0.0]))


@pytest.mark.parametrize("name", SIGNALS)
def test_puzzles_without_a_blank_cell_are_settled(name):
    """All given, and all padding: numbers, and the rules on the answer are satisfied whatever the logits say."""
    signal, generator = SIGNALS[name], torch.Generator().manual_seed(0)
    tokens = torch.tensor([[2, 3, 4], [0, 0, 0]])
    logits = torch.randn(2, 3, 5, generator=generator)
    other = torch.randn(2, 3, 5, generator=generator)
    z = torch.randn(2, 4, 3, generator=generator)
    view = view_of(logits, tokens, 2, z, z - 1, torch.zeros_like(tokens), other)
    score = signal.score(view, Memory())
    assert score.shape == (2,) and score.dtype == torch.float32 and score.isfinite().all()
    best = {"confidence": 1.0, "confidence_min": 1.0, "entropy": 0.0, "margin": 1.0, "kl": 0.0, "stability": 1.0}
    if name in best:
        assert score.tolist() == [best[name]] * 2
    blank = signal.score(view._replace(tokens=torch.ones_like(tokens)), Memory())
    assert name not in best or (blank < best[name]).all()  # negative control: with blank cells they are not


@pytest.mark.parametrize("name", SIGNALS)
def test_direction_and_threshold(name):
    """Each rule halts on the side of its signal that means certain, and at the threshold itself."""
    agent, signal = AGENTS[name](8), SIGNALS[name]
    assert signal.direction in (-1, 1) and agent.sees == signal.sees
    assert agent.threshold == signal.direction * type(agent).tau
    view = view_of(torch.zeros(3, 1, 2), torch.ones(3, 1, dtype=torch.int64))
    at = torch.tensor(agent.threshold)
    score = torch.stack((at - 0.01, at, at + 0.01))
    assert agent.halts(view, score).tolist() == [False, True, True]
    settled = {1: 1e3, -1: 0.0}[signal.direction]
    assert agent.halts(view, torch.full((3,), signal.direction * settled)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([-40.0, -3.0, 0.0, 3.0, 40.0]))
def test_signals_of_one_answer_stay_in_their_range(seed, shift):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 5
    certain, margin, entropy = (f(logits) for f in (signals.top_probability, signals.top_margin, signals.cell_entropy))
    assert (certain >= 1 / 5 - 1e-6).all() and (certain <= 1 + 1e-6).all()
    assert (margin >= 0).all() and (margin <= certain + 1e-6).all()
    assert (entropy >= -1e-6).all() and (entropy <= math.log(5) + 1e-5).all()
    assert_close(signals.top_probability(logits + shift), certain, atol=1e-5, rtol=1e-4)  # a softmax has no origin
    assert signals.cell_kl(logits, logits + shift).max() < 1e-4


# --- the rule that looks at nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["geometric", "uniform"])
@pytest.mark.parametrize("mean", [1.0, 1.3, 4.0, 4.9, 8.5, 11.75, 15.9, 16.0])
def test_random_steps_have_the_mean_asked_for(mean, distribution):
    keys = rng.fold(torch.arange(40_000), 5)
    steps = RandomAgent(16, mean, distribution).stop_steps(keys)
    assert steps.min() >= 1 and steps.max() <= 16
    error = steps.double().std().item() / 200
    assert abs(steps.double().mean().item() - mean) <= 4 * error + 1e-9


def test_random_distributions_have_their_shape():
    keys = rng.fold(torch.arange(60_000), 5)
    share = torch.bincount(RandomAgent(16, 4.0, "uniform").stop_steps(keys), minlength=17) / 60_000
    assert_close(share[1:8], torch.full((7,), 1 / 7), atol=0.006, rtol=0)  # 1..7 has the mean 4
    assert share[8:].sum() == 0
    share = torch.bincount(RandomAgent(16, 4.0).stop_steps(keys), minlength=17) / 60_000
    left = 1 - torch.cat((torch.zeros(1), share.cumsum(0)))[1:16]
    hazard = share[1:16] / left
    assert_close(hazard[:10], hazard[:1].expand(10), atol=0.02, rtol=0)


def test_random_arguments():
    assert RandomAgent(16).mean_steps == 8.5
    for arguments, said in (({"mean_steps": 17}, "mean_steps"), ({"distribution": "poisson"}, "geometric or uniform")):
        with pytest.raises(UserError, match=said):
            RandomAgent(16, **arguments)
