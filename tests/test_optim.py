"""Which parameter belongs to which optimiser, and that both are saved and restored."""

import pytest
import torch

from hrm_rl.config import OptimConfig
from hrm_rl.core import CoreConfig, HRMCore
from hrm_rl.errors import UserError
from hrm_rl.optim import is_hidden_matrix, load_state_tensors, make_optimizers, set_learning_rate, state_tensors

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


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=muon)])
def test_state_comes_back_number_for_number(optimizer):
    config = OptimConfig(optimizer=optimizer, warmup_steps=0)
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
