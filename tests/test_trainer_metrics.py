"""What the trainer reports: every value worked out by hand a second time."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import MODES, lively_trainer, small_trainer

from agents import FixedAgent
from envs.actions import HALT
from hrm_rl.metrics import TAGS
from hrm_rl.trainer import NonFiniteError


@pytest.mark.parametrize("bootstrap", MODES)
@pytest.mark.parametrize("objective", ["joint", "supervised", "q"])
def test_every_logged_tag_is_explained(objective, bootstrap):
    trainer = small_trainer(objective=objective, bootstrap=bootstrap)
    logged = set()
    for _ in range(3):
        trainer.update(before_detailed=True)
        logged |= set(trainer.line(trainer.update(detailed=True), 1.0))
    assert logged <= set(TAGS)
    wanted = {t for t in TAGS if t.startswith(("loss/total", "halt/episodes", "optim/", "time/", "state/"))}
    wanted.add("param/share_of_bound_adamw")
    if objective != "supervised":
        wanted |= {"loss/q_halt", "q/td_error_halt", "q/target_drift", "grad/q_head"}
        wanted |= set() if bootstrap == "none" else {"q/td_error_continue"}
    if objective != "q":
        wanted |= {"loss/supervised", "grad/core_H", "grad/core_L", "grad/core_other"}
    assert wanted <= logged
    assert ("grad/q_head" in logged) == (objective != "supervised")
    assert ("grad/core_H" in logged) == (objective != "q")


def test_halting_metrics_by_hand():
    trainer = lively_trainer(num_envs=8)
    exact, token, steps, agrees = [], [], [], []
    for _ in range(10):
        slots = trainer.envs.slots
        _, q_logits, actions = trainer._decide(slots)
        for i in ((actions == HALT) | (slots.steps >= 4)).nonzero()[:, 0].tolist():
            answer, labels = slots.logits[i].argmax(-1), slots.labels[i]
            exact.append(float((answer == labels).all()))
            token.append((answer == labels).float().mean().item())
            steps.append(slots.steps[i].item())
            agrees.append(float((q_logits[i, 0] >= 0) == (exact[-1] == 1.0)))
        trainer.update()
    values = trainer.line({}, 2.0)
    assert values["halt/episodes"] == len(steps) > 10
    wanted = {"exact_accuracy": exact, "token_accuracy": token, "mean_steps": steps, "q_halt_accuracy": agrees}
    for tag, items in wanted.items():
        assert values[f"halt/{tag}"] == pytest.approx(sum(items) / len(items), abs=1e-6)
    assert values["time/samples_per_second"] == 8 * 10 / 2.0
    for _ in range(2):  # a new line starts from nothing
        trainer.update()
    assert trainer.line({}, 1.0)["halt/episodes"] <= 16


def test_td_errors_by_hand():
    """Means over the slots that have the target in question, those that hit it exactly included."""
    trainer = small_trainer(bootstrap="shared_prefix", objective="q")  # all Q-values equal: no continue error
    trainer.update()
    values = trainer.line({}, 1.0)
    assert values["q/td_error_continue"] == 0
    assert values["q/td_error_halt"] == pytest.approx(torch.tensor(-5.0).sigmoid().item(), rel=1e-4)  # none is right
    trainer = lively_trainer(bootstrap="shared_prefix", num_envs=8)
    errors = []
    own = trainer.agent.loss

    def loss(transition):
        q_logits, at_limit = transition.q_logits.detach(), transition.view.steps >= trainer.config.max_steps
        target = trainer.agent.scores(transition.next_z_H).detach().amax(-1).sigmoid()
        target = torch.where(at_limit, transition.is_correct.float(), target)
        errors.extend((target - q_logits[:, 1].sigmoid()).abs()[~transition.ended | at_limit].tolist())
        return own(transition)

    trainer.agent.loss = loss
    for _ in range(5):
        trainer.update()
    assert 5 < len(errors) < 40
    assert trainer.line({}, 1.0)["q/td_error_continue"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_residuals_compare_neighbouring_segments():
    """|z(m) - z(m-1)| / |z(m)| of the slots that went on, from the states of the update before."""
    trainer = small_trainer(FixedAgent, objective="supervised")
    trainer.update(before_detailed=True)
    before = trainer.core.initial_state(4)
    slots = trainer.envs.slots
    assert (slots.steps == 2).all()
    details = trainer.update(detailed=True)
    assert 0.01 < details["state/residual_z_H"] < 2
    # By hand, with the weights standing still.
    still = small_trainer(FixedAgent, objective="supervised", optim={"lr": 0.0})
    tokens = still.envs.slots.tokens
    still.update(before_detailed=True)
    details = still.update(detailed=True)
    one = still.core(tokens, before).state
    two = still.core(tokens, one).state
    for name in ("z_H", "z_L"):
        a, b = getattr(one, name).detach().flatten(1), getattr(two, name).detach().flatten(1)
        wanted = ((b - a).norm(dim=1) / b.norm(dim=1)).mean().item()
        assert details[f"state/residual_{name}"] == pytest.approx(wanted, rel=1e-4)


def test_residuals_with_every_update_detailed():
    trainer = small_trainer(FixedAgent, objective="supervised")
    seen = [trainer.update(detailed=True, before_detailed=True).get("state/residual_z_H") for _ in range(5)]
    assert seen[0] is None and seen[4] is None  # nothing before; every slot has just begun anew
    assert all(value > 0.01 for value in seen[1:4])


def test_gradient_norms_by_part():
    trainer = lively_trainer()
    details = trainer.update(detailed=True)
    for part, prefix in (("core_H", "core.H_level"), ("core_L", "core.L_level"), ("q_head", "agent.")):
        squares = sum(p.grad.square().sum().item() for n, p in trainer.trained.items() if n.startswith(prefix))
        assert details[f"grad/{part}"] == pytest.approx(squares**0.5, rel=1e-4)
    largest = max(p.abs().max().item() for p in lively_trainer().trained.values())
    assert details["param/share_of_bound_adamw"] <= largest * 0.1 + 1e-6


def test_target_drift_is_zero_where_weights_stand_still():
    drift = {}
    for lr in (0.0, 1e-2):
        trainer = lively_trainer(optim={"lr": lr})
        trainer.update(detailed=True)
        drift[lr] = trainer.update(detailed=True)["q/target_drift"]
    assert drift[0.0] == 0 and drift[1e-2] > 1e-4


def test_a_loss_that_is_not_a_number_stops_the_run():
    trainer = small_trainer()
    trainer.update(detailed=True)
    with torch.no_grad():
        trainer.core.lm_head.weight[0, 0] = float("nan")
    trainer.envs.reset()
    with pytest.raises(NonFiniteError, match="update 2: loss/"):
        trainer.update(detailed=True)
