"""Which parameter belongs to which optimiser, what its update is and where it ends; state that comes back."""

import math
import sys

import pytest
import torch
from hrm_testing import close, small_trainer

from hrm_rl.config import OptimConfig
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.errors import UserError
from hrm_rl.optim import (
    is_hidden_matrix,
    linf_bound,
    load_state_tensors,
    make_optimizers,
    set_learning_rate,
    shares_of_bound,
    state_tensors,
)

muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


def parameters(mixing="grid"):
    core = HRMCore(CoreConfig(vocab_size=6, seq_len=16, hidden_size=16, num_heads=2, inner_multiple=16,
                              puzzle_emb_ndim=16, token_mixing=mixing), torch.Generator().manual_seed(1))  # fmt: skip
    return {f"core.{name}": p for name, p in core.named_parameters()}


def one_step(named, optimizers):
    for number, parameter in enumerate(named.values()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    for optimizer in optimizers:
        optimizer.step()


def test_adamw_holds_everything():
    named = parameters()
    (only,) = make_optimizers(named, OptimConfig(optimizer="adamw"))
    assert isinstance(only, torch.optim.AdamW)
    assert {id(p) for g in only.param_groups for p in g["params"]} == {id(p) for p in named.values()}


@muon
@pytest.mark.parametrize("mixing", ["grid", "attention", "mlp"])
def test_muon_holds_the_hidden_matrices_and_adamw_the_rest(mixing):
    named = parameters(mixing)
    rest, hidden = make_optimizers(named, OptimConfig(optimizer="muon"))
    of = {id(p): name for name, p in named.items()}
    in_muon = {of[id(p)] for g in hidden.param_groups for p in g["params"]}
    in_adamw = {of[id(p)] for g in rest.param_groups for p in g["params"]}
    assert in_muon | in_adamw == set(named) and not in_muon & in_adamw
    assert in_muon and all(("H_level" in n or "L_level" in n) and n.endswith(".weight") for n in in_muon)
    assert "core.lm_head.weight" in in_adamw and "core.embed_tokens.embedding_weight" in in_adamw
    assert not any("bias" in n for n in in_muon)  # the grid's table of biases is no linear map


def test_muon_step_is_orthogonal_of_the_right_size():
    name, weight = "core.L_level.layers.0.mlp.down_proj.weight", torch.nn.Parameter(torch.zeros(16, 16))
    assert is_hidden_matrix(name, weight)
    optimizers = make_optimizers({name: weight}, OptimConfig(optimizer="muon", muon_lr=0.1, weight_decay=0.0))
    one_step({name: weight}, optimizers)
    singular = torch.linalg.svdvals(weight.detach()) / (0.1 * 0.2 * 4)  # 0.2 sqrt(16) matches AdamW's size
    assert singular.max() < 1.35 and singular.min() > 0.3
    plain = torch.linalg.svdvals(weight.grad)  # negative control: the gradient's own are spread far wider
    assert plain.max() / plain.min() > 10 * singular.max() / singular.min()


def test_the_released_pair_holds_everything():
    named = parameters()
    rest, embedding = make_optimizers(named, OptimConfig(optimizer="adam_atan2", embedding="sign_sgd"))
    of = {id(p): name for name, p in named.items()}
    held = [{of[id(p)] for g in o.param_groups for p in g["params"]} for o in (rest, embedding)]
    assert held[1] == {"core.puzzle_emb.weights"} and held[0] == set(named) - held[1]
    rest, embedding = make_optimizers(named, OptimConfig(optimizer="adam_atan2"))
    assert isinstance(embedding, torch.optim.AdamW) and len(embedding.param_groups[0]["params"]) == 1


def kernel(p, gradients, lr, decay, beta1=0.9, beta2=0.95):
    """adam_atan2_cuda_impl_ of the released package, line by line in float64."""
    p, m, v = p.double(), 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        g = g.double()
        p = p * (1 - lr * decay)
        m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
        p = p - lr / (1 - beta1**t) * torch.atan2(m, v.sqrt() / math.sqrt(1 - beta2**t))
    return p


def run_atan2(start, gradients, lr, decay, spoil=lambda optimizer: None):
    p = torch.nn.Parameter(start.clone())
    (optimizer,) = make_optimizers({"core.lm_head.weight": p},
                                   OptimConfig(optimizer="adam_atan2", lr=lr, weight_decay=decay))  # fmt: skip
    spoil(optimizer)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def correct_inside(optimizer):
    optimizer._optimizer_step_pre_hooks.clear()
    for group in optimizer.param_groups:
        group["a"] = group["b"] = 1.0


@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_adam_atan2_is_the_released_kernel(steps):
    generator = torch.Generator().manual_seed(steps)
    start = torch.randn(5, 3, generator=generator)
    gradients = [torch.randn(5, 3, generator=generator) * 10 ** -(i % 4) for i in range(steps)]
    gradients[0][0] = 0.0
    wanted = kernel(start, gradients, 0.05, 0.1)
    close(run_atan2(start, gradients, 0.05, 0.1), wanted, 2e-6)
    # Negative controls: the correction inside of the arctangent, and no decay.
    assert (run_atan2(start, gradients, 0.05, 0.1, correct_inside) - wanted).abs().max() > 1e-3
    assert (kernel(start, gradients, 0.05, 0.0) - wanted).abs().max() > 1e-3


def test_adam_atan2_begins_as_the_kernel_does():
    """t = 1: lr / 0.1 * atan2(0.1 g, |g|), whatever the size of g."""
    moved = -run_atan2(torch.zeros(2), [torch.tensor([1e-3, -7.0])], 1.0, 0.0)
    close(moved, torch.tensor([1.0, -1.0]).double() * 10 * math.atan(0.1), 1e-6)


def test_sign_sgd_moves_the_rows_that_were_used():
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]]))
    (optimizer,) = make_optimizers({"core.puzzle_emb.weights": p}, OptimConfig(
        optimizer="adam_atan2", embedding="sign_sgd", embedding_lr=0.1, embedding_weight_decay=0.5))  # fmt: skip
    p.grad = torch.tensor([[1e-9, -3.0], [0.0, 0.0], [0.0, 2.0]])
    optimizer.step()
    close(p.detach(), torch.tensor([[0.95 - 0.1, -1.9 + 0.1], [3.0, 4.0], [4.75, 5.7 - 0.1]]).double(), 1e-6)
    assert not state_tensors([optimizer])


def test_sign_sgd_in_training_moves_each_number_by_its_learning_rate():
    trainer = small_trainer(optim=dict(optimizer="adam_atan2", embedding="sign_sgd", embedding_lr=1e-3,
                                       embedding_weight_decay=0.0))  # fmt: skip
    trainer.update()
    close(trainer.core.puzzle_emb.weights.detach().abs(), torch.full((1, 16), 1e-3).double(), 1e-8)


@pytest.mark.parametrize("kind", ["adamw", "adam_atan2", "sign_sgd", pytest.param("muon", marks=muon)])
def test_the_bound_holds_and_is_no_larger_than_it_must(kind):
    """A gradient that never turns pushes the weights out: they end at the bound, or inside by what is stated."""
    name = {"muon": "core.L_level.layers.0.mlp.down_proj.weight", "sign_sgd": "core.puzzle_emb.weights"}.get(kind)
    p = torch.nn.Parameter(torch.full((8, 8), 30.0))
    config = OptimConfig(optimizer="adamw" if kind == "sign_sgd" else kind, lr=0.05, muon_lr=0.05, weight_decay=0.5,
                         embedding="sign_sgd", embedding_lr=0.05, embedding_weight_decay=0.5)  # fmt: skip
    (optimizer,) = make_optimizers({name or "core.lm_head.weight": p}, config)
    assert shares_of_bound([optimizer])[kind] > 5
    gradient = -torch.ones(8, 8)
    for _ in range(400):
        p.grad = gradient.clone()
        optimizer.step()
    share = shares_of_bound([optimizer])[kind]
    wanted = {"adamw": 1.0, "sign_sgd": 1.0, "adam_atan2": 0.5}.get(kind)
    if kind == "muon":  # of rank one: the entries are an eighth of the singular value
        top = torch.linalg.svdvals(p.detach()).max() / linf_bound("muon", 0.5, (8, 8))
        assert 0.5 < top <= 1.0 and share == pytest.approx(float(top) / 8, rel=0.05)
    else:
        assert share == pytest.approx(wanted, rel=1e-2)
    assert linf_bound(kind, 0.0, (8, 8)) == math.inf
    assert linf_bound(kind, 2.0, (8, 8)) * 2 == linf_bound(kind, 1.0, (8, 8))
    if wanted is not None:  # where such a gradient ends
        assert share == pytest.approx(linf_bound(kind, 0.5, steady=True) / linf_bound(kind, 0.5), rel=1e-2)


def test_newton_schulz_stays_below_its_constant():
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert 1.1 < x.max() <= 1.21


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=muon), "adam_atan2"])
def test_state_comes_back_number_for_number(optimizer):
    config = OptimConfig(optimizer=optimizer, warmup_steps=0, embedding="adamw" if optimizer == "muon" else "sign_sgd")
    straight, resumed = parameters(), parameters()
    ours = make_optimizers(straight, config)
    one_step(straight, ours)
    with torch.no_grad():
        for name in resumed:
            resumed[name].copy_(straight[name])
    theirs = make_optimizers(resumed, config)
    load_state_tensors(theirs, {name: value.clone() for name, value in state_tensors(ours).items()})
    one_step(straight, ours)
    one_step(resumed, theirs)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_learning_rates_keep_their_proportion():
    optimizers = make_optimizers(parameters(), OptimConfig(optimizer="adamw", lr=0.5))
    set_learning_rate(optimizers, 0.25)
    assert optimizers[0].param_groups[0]["lr"] == 0.125


def test_without_muon_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match="needs torch >= 2.9"):
        make_optimizers(parameters(), OptimConfig(optimizer="muon"))


def test_without_adam_atan2_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "adam_atan2_pytorch", None)
    make_optimizers(parameters(), OptimConfig(optimizer="adamw"))  # nothing else needs it
    with pytest.raises(UserError, match="needs adam-atan2-pytorch"):
        make_optimizers(parameters(), OptimConfig(optimizer="adam_atan2"))


def test_a_learning_rate_of_nothing():
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    one_step(named, make_optimizers(named, OptimConfig(optimizer="adam_atan2", lr=0.0, embedding="sign_sgd",
                                                       embedding_lr=0.0)))  # fmt: skip
    assert all(torch.equal(before[name], p) for name, p in named.items())
