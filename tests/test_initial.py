"""What training starts from, as published: fixed initial states, a halting bias of -5, float64 inside of stablemax."""

from __future__ import annotations

import pytest
import torch
from hrm_testing import close, small_trainer

from hrm_rl.core import HRMCore
from hrm_rl.core.io import load_core
from hrm_rl.losses import log_stablemax, token_losses


@pytest.mark.parametrize("optim", [dict(optimizer="adamw", weight_decay=1.0, ema=0.5),
                                   dict(optimizer="adam_atan2", embedding="sign_sgd", weight_decay=1.0, ema=0.5)],
                         ids=["adamw", "released"])  # fmt: skip
def test_initial_states_never_move(tmp_path, optim):
    """z^0 is drawn once and stays: no gradient, decay, average, checkpoint or file of a model changes it."""
    trainer = small_trainer(optim=optim)
    core = trainer.core
    start = {name: getattr(core, name).clone() for name in ("H_init", "L_init")}
    assert not any("_init" in name for name in trainer.trained) and not any("_init" in name for name in trainer.ema)
    held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
    moving = core.lm_head.weight.detach().clone()
    for _ in range(5):
        trainer.update()
    path = tmp_path / "model.safetensors"
    path.write_bytes(trainer.model())
    again = small_trainer(optim=optim, seed=8)
    assert not torch.equal(again.core.H_init, start["H_init"])  # another seed, another draw
    tensors, plain = trainer.state()
    again.load_state(tensors, {**plain, "step": 5})
    for name, value in start.items():
        assert id(getattr(core, name)) not in held and getattr(core, name).grad is None
        for where in (core, trainer.evaluation_models()[0], load_core(path).core, again.core):
            assert torch.equal(getattr(where, name), value), name
    assert not torch.equal(core.lm_head.weight, moving)  # negative control: the rest does move


def test_initial_states_are_drawn_as_published():
    """A unit normal cut at two sigmas, one vector for all positions, and every puzzle starts from it."""
    trainer = small_trainer(core=HRMCore(small_trainer().config.core, torch.Generator().manual_seed(4)))
    core = trainer.core
    wide = type(core)(core.config.__class__(hidden_size=1024, num_heads=2, H_layers=1, L_layers=1, puzzle_emb_ndim=0,
                                            expansion=0.25, inner_multiple=64, token_mixing="grid", positions="none"),
                      torch.Generator().manual_seed(0))  # fmt: skip
    for z in (wide.H_init, wide.L_init):
        assert abs(z.mean()) < 0.12 and abs(z.std() - 1) < 0.08 and z.abs().max() <= 2 / 0.8796 + 1e-4
    z_H, z_L = core.initial_state(3)
    assert z_H.shape == (3, core.num_positions, 16)
    assert (z_H == core.H_init).all() and (z_L == core.L_init).all() and not torch.equal(core.H_init, core.L_init)


@pytest.mark.parametrize("arguments, bias", [({}, -5.0), ({"q_bias": -2.5}, -2.5)])
def test_initial_halting_bias(arguments, bias):
    """Both Q-values begin at sigmoid(bias), whatever is observed, and the bias is learned from there."""
    trainer = small_trainer(arguments=arguments)
    head = trainer.agent.q_head
    assert head.bias.tolist() == [bias, bias] and head.weight.eq(0).all()
    z_H = torch.randn(4, trainer.core.num_positions, 16)
    close(trainer.agent.scores(z_H).detach(), torch.full((4, 2), bias).double(), 1e-6)
    trainer.update()
    assert not torch.equal(head.bias, torch.full((2,), bias))


def test_stablemax_computes_in_float64():
    """float32 logits: the result is float64 and right to its last places; in float32 the sum is not."""
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)) * 50
    wide = logits.double()
    s = torch.where(wide >= 0, wide + 1, 1 / (1 - wide))
    wanted = (s / s.sum(-1, keepdim=True)).log()
    got = log_stablemax(logits)
    assert got.dtype == torch.float64
    close(got, wanted, 1e-13)
    narrow = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    assert ((narrow / narrow.sum(-1, keepdim=True)).log().double() - wanted).abs().max() > 1e-9  # negative control


@pytest.mark.parametrize("kind", ["stablemax", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_finite_where_the_branches_meet(kind, dtype):
    """x = 1 (where 1 / (1 - x) is infinite), x = 0 (where the branches meet) and far out."""
    logits = torch.tensor([[1.0, 1.0, 0.0, -0.0, 1e4, -1e4]], dtype=dtype).requires_grad_()
    for label in range(6):
        token_losses(logits[None], torch.tensor([[label]]), kind).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.ne(0).any()
