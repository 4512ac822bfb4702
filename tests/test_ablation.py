"""Which parameters move, and which do not, for every objective, q_to_core and bootstrap: bit for bit.

AdamW decays a parameter whose gradient is zero, so a frozen part must not be held by the optimiser at all;
every run here has weight decay.
"""

from __future__ import annotations

import pytest
import torch
from hrm_testing import MODES, small_trainer

from agents import FixedAgent
from agents.q_targets import BOOTSTRAPS
from hrm_rl.errors import UserError
from hrm_rl.losses import supervised_loss


def trainer_with_head(decay: float = 0.1, optimizer: str = "adamw", **changes):
    """A trainer whose Q-head is not zero (with zero weights no gradient passes through it)."""
    trainer = small_trainer(
        arguments={"q_bias": -0.5}, optim={"weight_decay": decay, "optimizer": optimizer}, **changes
    )
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        trainer.agent.q_head.weight.copy_(torch.randn(trainer.agent.q_head.weight.shape, generator=generator))
    return trainer


def snapshot(trainer) -> dict[str, torch.Tensor]:
    tensors = {f"core.{n}": t for n, t in trainer.core.state_dict().items()}
    tensors |= {f"agent.{n}": t for n, t in trainer.agent.state_dict().items()}
    return {name: t.detach().clone() for name, t in tensors.items()}


def moved(trainer, updates: int = 4) -> set[str]:
    before = snapshot(trainer)
    for _ in range(updates):
        trainer.update()
    after = snapshot(trainer)
    return {name for name in before if not torch.equal(before[name], after[name])}


def parameters(trainer, part: str) -> set[str]:
    module = trainer.core if part == "core" else trainer.agent
    return {f"{part}.{name}" for name, _ in module.named_parameters()}


@pytest.mark.parametrize("bootstrap", MODES)
@pytest.mark.parametrize("q_to_core", [True, False])
@pytest.mark.parametrize("objective", ["joint", "supervised", "q"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_moves(optimizer, objective, q_to_core, bootstrap):
    settings = dict(objective=objective, q_to_core=q_to_core, bootstrap=bootstrap)
    trainer = trainer_with_head(optimizer=optimizer, **settings)
    core, agent = parameters(trainer, "core"), parameters(trainer, "agent")
    expected = {"joint": core | agent, "supervised": core, "q": agent}[objective]
    assert set(trainer.trained) == expected
    held = [id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.trained.values())  # each of them once
    assert moved(trainer) == expected  # H_init and L_init are buffers: they never move


@pytest.mark.parametrize("bootstrap", MODES)
@pytest.mark.parametrize("q_to_core", [True, False])
def test_what_the_q_loss_does_to_the_core(q_to_core, bootstrap):
    """q_to_core=false: the gradient on the core is the supervised one bit for bit, update after update."""
    trainer = trainer_with_head(objective="joint", q_to_core=q_to_core, bootstrap=bootstrap)
    names = [name for name in trainer.trained if name.startswith("core.")]
    for update in range(4):
        slots = trainer.envs.slots
        alone = supervised_loss(slots.logits, slots.labels, "softmax").sum() / 4
        wanted = torch.autograd.grad(alone, [trainer.trained[n] for n in names], retain_graph=True)
        trainer.update()
        same = all(torch.equal(trainer.trained[n].grad, g) for n, g in zip(names, wanted, strict=True))
        # bootstrap=next_observation learns from a stored observation, which has no gradient
        assert same == (not q_to_core or bootstrap == "next_observation"), update
        assert trainer.agent.q_head.weight.grad is not None


@pytest.mark.parametrize("bootstrap", MODES)
def test_the_first_joint_core_step_without_q_is_the_supervised_one(bootstrap):
    """Two whole runs: the cores of `joint --q-to-core false` and `supervised` are equal after an update."""
    joint = trainer_with_head(objective="joint", q_to_core=False, bootstrap=bootstrap)
    supervised = trainer_with_head(objective="supervised", bootstrap=bootstrap)
    reaching = trainer_with_head(objective="joint", q_to_core=True, bootstrap=bootstrap)
    for trainer in (joint, supervised, reaching):
        trainer.update()
    runs = [snapshot(trainer) for trainer in (joint, supervised, reaching)]
    cores = [{n: t for n, t in run.items() if n.startswith("core.")} for run in runs]
    assert all(torch.equal(cores[0][n], cores[1][n]) for n in cores[0])
    if bootstrap != "next_observation":  # negative control
        assert not all(torch.equal(cores[0][n], cores[2][n]) for n in cores[0])


def test_bootstrap_none_leaves_q_continue_alone():
    """Without decay the CONTINUE row of the Q-head stays as it was; with a continue target it moves."""
    for bootstrap in BOOTSTRAPS:
        trainer = trainer_with_head(decay=0.0, objective="q", bootstrap=bootstrap)
        head = trainer.agent.q_head
        before = head.weight.detach().clone(), head.bias.detach().clone()
        for _ in range(4):
            trainer.update()
        still = torch.equal(head.weight[1], before[0][1]) and torch.equal(head.bias[1], before[1][1])
        assert still == (bootstrap == "none")
        assert not torch.equal(head.weight[0], before[0][0])


def test_a_zero_weight_is_not_a_frozen_part():
    """Negative control: with halt and continue weights 0 the Q-head still decays. Frozen is `supervised`."""
    decays = trainer_with_head(objective="joint", halt_weight=0.0, continue_weight=0.0)
    assert parameters(decays, "agent") <= moved(decays)
    frozen = trainer_with_head(objective="supervised")
    assert not parameters(frozen, "agent") & moved(frozen)


def test_no_gradient_is_made_for_what_does_not_learn():
    frozen_core = trainer_with_head(objective="q")
    frozen_core.update()
    assert all(p.grad is None and not p.requires_grad for p in frozen_core.core.parameters())
    assert not frozen_core.envs.slots.z_H.requires_grad
    frozen_head = trainer_with_head(objective="supervised")
    frozen_head.update()
    assert all(p.grad is None for p in frozen_head.agent.parameters())


def test_loss_terms_of_each_objective():
    terms = {}
    for objective in ("joint", "supervised", "q"):
        trainer = trainer_with_head(objective=objective)
        trainer.update()
        terms[objective] = {name for name in trainer.sums.take() if name.startswith("loss/")}
    q = {"loss/q_halt", "loss/q_continue"}
    assert terms["joint"] == {"loss/total", "loss/supervised"} | q
    assert terms["supervised"] == {"loss/total", "loss/supervised"}
    assert terms["q"] == {"loss/total"} | q


def test_supervised_with_a_fixed_agent():
    trainer = small_trainer(FixedAgent, {"k": 2}, objective="supervised")
    steps = []
    for _ in range(4):
        steps.append(trainer.envs.slots.steps.tolist())
        trainer.update()
    assert steps == [[1] * 4, [2] * 4, [1] * 4, [2] * 4]
    with pytest.raises(UserError, match="FixedAgent"):
        small_trainer(FixedAgent, objective="q")


@pytest.mark.parametrize(("name", "weight"), [("supervised", 2.0), ("halt", 1.0), ("continue", 3.0)])
def test_loss_weights_scale_their_own_term(name, weight):
    """The total is the weighted sum; each weight changes its own term and no other."""
    plain = {"supervised": 1.0, "halt": 0.5, "continue": 0.5}
    trainer = trainer_with_head(bootstrap="extra_forward", **{f"{name}_weight": weight})
    trainer.update()
    sums = trainer.sums.take()
    weights = plain | {name: weight}
    wanted = weights["supervised"] * sums["loss/supervised"] + sum(
        weights[kind] * sums[f"loss/q_{kind}"] for kind in ("halt", "continue")
    )
    assert abs(sums["loss/total"] - wanted) < 1e-5
    assert abs(weight - plain[name]) * sums.get(f"loss/q_{name}", sums["loss/supervised"]) > 1e-3
