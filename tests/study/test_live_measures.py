"""What is measured of a live trainer: true to the trajectories, to the gradients, and without a trace in training."""

from __future__ import annotations

import math

import pytest
import torch
from hrm_testing import counting_core, lively_trainer, small_puzzles, small_trainer

from agents import FixedAgent, QHaltingAgent, Transition
from agents.lambda_return import LambdaAgent
from agents.monte_carlo import MonteCarloAgent
from agents.q_targets import BOOTSTRAPS
from envs import HALT
from hrm_rl import evaluation
from hrm_rl.study import exact, measures
from hrm_rl.study.live_measures import gradient_measures, measure_live

PROBE = small_puzzles(10, seed=5)


def trained(kind=lively_trainer, updates: int = 3, **changes):
    trainer = kind(**changes)
    for _ in range(updates):
        trainer.update()
    return trainer


def test_metrics_are_those_of_the_trajectories():
    trainer = trained()
    live = measure_live(trainer, PROBE)
    run = evaluation.trajectories(trainer.core, trainer.agent, PROBE, 4, 8)
    assert torch.allclose(live.q_logits, run.q_logits, atol=1e-4)  # other batches: rounding
    assert torch.equal(live.steps, run.halt_steps(4)) and torch.equal(live.right, run.at(live.steps)[0])
    want, by_step = measures.measure(run.q_logits[None], run.exact)
    for name, value in want.items():
        assert live.metrics[name] == pytest.approx(float(value[0]), abs=1e-4, nan_ok=True), name
    assert set(live.metrics) == set(measures.METRICS) and set(live.by_step) == set(measures.BY_STEP)
    assert torch.allclose(live.by_step["bias_continue"], by_step["bias_continue"][0], atol=1e-4)
    largest = max(float(p.detach().abs().max()) for p in trainer.trained.values())
    assert live.metrics["param_inf_norm"] == pytest.approx(largest)
    assert live.metrics["param_bound_ratio"] == pytest.approx(largest * trainer.config.optim.weight_decay)
    assert 1 <= live.metrics["effective_rank"] <= 16 and math.isnan(live.metrics["target_drift"])
    again = measure_live(trainer, PROBE, live.q_logits)
    assert again.metrics["target_drift"] == again.metrics["sign_flips"] == 0
    trainer.update()
    assert measure_live(trainer, PROBE, live.q_logits).metrics["target_drift"] > 0


def test_adam_atan2_is_held_against_its_own_bound():
    pytest.importorskip("adam_atan2_pytorch")
    trainer = trained(optim={"optimizer": "adam_atan2", "weight_decay": 0.5})
    live = measure_live(trainer, PROBE)
    largest = max(float(p.detach().abs().max()) for p in trainer.trained.values())
    assert live.metrics["param_bound_ratio"] == pytest.approx(largest * 0.5 / (math.pi / 4))


def test_the_truth_is_that_of_the_core():
    """A counting core that is right at segment 3: the exact values are known, and so is the bias of a head at 0."""
    core = counting_core(PROBE, 3)
    trainer = small_trainer(arguments={"q_bias": 0.0}, objective="q", core=core, puzzles=PROBE, augment=False)
    live = measure_live(trainer, PROBE, gamma=0.9, ponder_cost=0.1)
    correct = torch.tensor([0, 0, 1, 1])[:, None].expand(4, 10).bool()
    truth = exact.optimal_values(correct, 0.9, 0.1).mean(1)
    assert torch.allclose(live.by_step["bias_continue"], 0.5 - truth[:, 1])
    assert torch.allclose(live.by_step["bias_halt"], 0.5 - truth[:, 0])
    assert (live.metrics["accuracy"], live.metrics["mean_steps"]) == (1, 4)  # a tie goes on
    best = 0.9 * (0.9 * 1 - 0.1) - 0.1
    late = 0.9 * (0.9 * (0.9 * 1 - 0.1) - 0.1) - 0.1
    assert live.metrics["regret"] == pytest.approx(best - late)


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
def test_measuring_leaves_no_trace(bootstrap):
    measured, plain = (trained(bootstrap=bootstrap, optim={"ema": 0.9}) for _ in range(2))
    torch.manual_seed(1)
    random = torch.get_rng_state()
    before = {n: None if p.grad is None else p.grad.clone() for n, p in measured.trained.items()}
    live = measure_live(measured, PROBE)
    assert live.metrics["grad_norm_q"] > 0
    assert torch.equal(torch.get_rng_state(), random)
    for n, p in measured.trained.items():
        assert (p.grad is None) == (before[n] is None) and (p.grad is None or torch.equal(p.grad, before[n])), n
    for _ in range(3):
        measured.update()
        plain.update()
    states = [trainer.state()[0] for trainer in (measured, plain)]
    assert set(states[0]) == set(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("agent", [LambdaAgent, MonteCarloAgent])
def test_agents_that_remember_are_measured_on_a_copy(agent):
    measured, plain = (trained(small_trainer, agent=agent, arguments={"epsilon": 0.5}) for _ in range(2))
    assert measured.agent.memory
    measure_live(measured, PROBE)
    for _ in range(3):
        measured.update()
        plain.update()
    for name, value in measured.state()[0].items():
        assert torch.equal(value, plain.state()[0][name]), name


@pytest.mark.parametrize("bootstrap", BOOTSTRAPS)
@pytest.mark.parametrize("q_to_core", [True, False])
def test_gradients_are_those_of_the_update(bootstrap, q_to_core):
    """The update that follows has this gradient, before clipping; by loss, those of runs with one loss alone."""
    trainer = trained(bootstrap=bootstrap, q_to_core=q_to_core)
    found = gradient_measures(trainer)
    trainer.update()
    whole = torch.cat([p.grad.flatten() for p in trainer.trained.values() if p.grad is not None]).double().norm()
    assert found["grad_norm"] == pytest.approx(float(whole), rel=1e-4)
    reaches = q_to_core and bootstrap != "next_observation"
    assert math.isnan(found["grad_cosine"]) != reaches
    if reaches:
        assert -1 <= found["grad_cosine"] <= 1
        squares = found["grad_norm_supervised"] ** 2 + found["grad_norm_q"] ** 2
        assert found["grad_norm"] ** 2 != pytest.approx(squares, rel=1e-6)  # the cosine's share
    else:
        squares = found["grad_norm_supervised"] ** 2 + found["grad_norm_q"] ** 2
        assert found["grad_norm"] ** 2 == pytest.approx(squares, rel=1e-4)


def test_cosine_by_hand():
    trainer = trained()
    found = gradient_measures(trainer)
    slots = trainer.envs.slots
    names = [n for n in trainer.trained if n.startswith("core.")]
    view, q_logits, actions = trainer._decide(slots)
    ended = (actions == HALT) | (slots.steps >= 4)
    losses, q = trainer._losses(slots, Transition(view, q_logits, actions, slots.is_correct, None, ended))
    parts = []
    for loss in (losses["loss/supervised"], 0.5 * (q.halt.sum() + q.cont.sum()) / 4):
        grads = torch.autograd.grad(loss, [trainer.trained[n] for n in names], retain_graph=True, allow_unused=True)
        parts.append(torch.cat([(torch.zeros_like(trainer.trained[n]) if g is None else g).flatten()
                                for n, g in zip(names, grads, strict=True)]).double())  # fmt: skip
    assert found["grad_norm_supervised"] == pytest.approx(float(parts[0].norm()), rel=1e-4)
    cosine = float(torch.nn.functional.cosine_similarity(*parts, dim=0))
    assert found["grad_cosine"] == pytest.approx(cosine, abs=1e-4) and abs(cosine) > 1e-3


def test_what_an_objective_does_not_have_is_nan():
    fixed = measure_live(trained(small_trainer, agent=FixedAgent, objective="supervised"), PROBE)
    values = {n: v for n, v in fixed.metrics.items() if not math.isnan(v)}
    assert set(values) == {"accuracy", "mean_steps", "mean_return", "regret", "effective_rank", "dormant", "grad_norm",
                           "grad_norm_supervised", "param_inf_norm", "param_bound_ratio"}  # fmt: skip
    assert fixed.q_logits is None and fixed.metrics["mean_steps"] == 4
    assert fixed.by_step["q_halt"].isnan().all() and not fixed.by_step["accuracy"].isnan().any()
    q_alone = measure_live(trained(small_trainer, objective="q"), PROBE).metrics
    assert q_alone["grad_norm"] == pytest.approx(q_alone["grad_norm_q"]) and q_alone["grad_norm"] > 0
    assert math.isnan(q_alone["grad_norm_supervised"]) and math.isnan(q_alone["grad_cosine"])
    supervised = measure_live(trained(small_trainer, agent=QHaltingAgent, objective="supervised"), PROBE).metrics
    assert math.isnan(supervised["grad_norm_q"]) and not math.isnan(supervised["bias_halt"])


def test_raw_weights_are_measured():
    trainer = trained(optim={"ema": 0.99, "lr": 0.05}, updates=6)
    live = measure_live(trainer, PROBE)
    raw = evaluation.trajectories(trainer.core, trainer.agent, PROBE, 4, 8).q_logits
    averaged = trainer.evaluate(PROBE, 4).q_logits
    assert torch.allclose(live.q_logits, raw, atol=1e-5) and not torch.allclose(live.q_logits, averaged, atol=1e-2)
